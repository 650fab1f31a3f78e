"""Rows in memory, which readers accept in the place of a file.

    with in_memory(train_rows=[{"text": "A fine film.", "label": "good"}, Row(text="Dull.", label="bad")]) as names:
        names["train_rows"]  # "memory:train_rows", which every reader accepts as the name of a file

A row has the values that a line of .jsonl would have. An image is a PIL image or an array of uint8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

from data.errors import MEMORY, DataError, ErrorList
from data.formats.values import to_json_value, unreadable_reason
from data.row import Row

_ROWS: dict[str, list[Any]] = {}  # by name, while their `in_memory` is active


def as_list(name: str, rows: Iterable[Any]) -> list[Any]:
    """Return the rows as a list, since they are read more than once; DataError for what is not a list of rows.

    A text, a dict of columns and a data frame can be iterated over, but give characters and the names of columns.
    """
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping | PathLike):
        if not hasattr(rows, "columns"):
            return list(rows)
        hint = "a data frame gives its rows by to_dict('records')"
    else:
        hint = "a file is named in the settings, and a dict of columns is one row"
    raise DataError(f"{name} = {rows!r:.80} is not a list of rows; {hint}")


@contextmanager
def in_memory(**given: Iterable[Row | Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Make rows readable under the names that it gives: {"train_rows": "memory:train_rows"}.

    Inside another `in_memory` with the same name, the inner rows are read until the inner one ends.
    """
    rows = {name: as_list(name, values) for name, values in given.items()}
    outer = {name: _ROWS[name] for name in rows if name in _ROWS}
    _ROWS.update(rows)
    try:
        yield {name: MEMORY + name for name in rows}
    finally:
        for name in rows:
            del _ROWS[name]
        _ROWS.update(outer)


def is_in_memory(name: str) -> bool:
    """Return whether `name` is one that `in_memory` gives."""
    return name.startswith(MEMORY)


def read_memory(name: str, errors: ErrorList) -> Iterator[Row]:
    """Yield a copy of each row, with its number from 1 as its line; its id is "" where it is a dict.

    Values become those of JSON, but images stay as they are (values.py). A row that cannot be written
    to a file is added to `errors`. DataError for rows that are no longer in memory.
    """
    rows = _ROWS.get(name.removeprefix(MEMORY))
    if rows is None:
        raise DataError(f"{name}: these rows are not in memory any more; give them again, or name a file")
    for number, row in enumerate(rows, 1):
        if isinstance(row, Row | Mapping):
            columns = row.values if isinstance(row, Row) else row
            values = {str(column): to_json_value(value) for column, value in columns.items()}
            if reason := unreadable_reason(values) or _find_surrogate(values):
                errors.add(name, number, reason)
            else:
                yield Row(row.id if isinstance(row, Row) else "", number, values)
        else:
            errors.add(name, number, f"a row should be a Row, or a dict of columns, not {row!r:.80}")


def _find_surrogate(value: Any) -> str:
    """Return the reason for a value with half of a surrogate pair, which is not text; "" for any other value."""
    if isinstance(value, str):
        half = next((character for character in value if "\ud800" <= character <= "\udfff"), "")
        return half and f"\\u{ord(half):04x} is half of a surrogate pair, not a character"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((reason for item in items if (reason := _find_surrogate(item))), "")
