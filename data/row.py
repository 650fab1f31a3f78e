"""A row: one example before it is encoded."""

from __future__ import annotations

from typing import Any


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
