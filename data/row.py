"""A row: one example before it is encoded; and the rows of a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Row:
    """One example as read: its id, its line in the file, and its columns.

    Readers give all three: `Row("7", 8, {"text": "..."})`. In Python, keywords are columns: `Row(text="...")`.
    """

    __slots__ = ("id", "line", "values")

    def __init__(self, id: str = "", line: int = 0, values: dict[str, Any] | None = None, /, **columns: Any):
        self.id, self.line = id, line
        self.values = {**(values or {}), **columns}

    def __repr__(self) -> str:
        return f"Row({self.id!r}, {self.line}, {self.values!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Row):
            return NotImplemented
        return (self.id, self.line, self.values) == (other.id, other.line, other.values)

    def updated(self, values: dict[str, Any]) -> Row:
        """Return a copy in which the columns of `values` are replaced."""
        return Row(self.id, self.line, self.values | values)


class LeftOut(NamedTuple):
    """A row of a file that is not used; a prediction for it is null, with the reason."""

    id: str
    line: int
    reason: str


class Rows(list[Row]):
    """The rows of a file, in its order, and what is to be said about them.

    notes: sentences about what was left out, repaired or guessed. left_out: the rows that are not used, by line.
    """

    def __init__(self, rows: Iterable[Row] = (), *, notes: Sequence[str] = (), left_out: Sequence[LeftOut] = ()):
        super().__init__(rows)
        self.notes = list(notes)
        self.left_out = list(left_out)
