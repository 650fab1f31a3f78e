"""Rows in other forms: a check of the required columns after conversion, and lists and objects written as text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from data.errors import ErrorList
from data.formats.columns import describe_missing
from data.formats.lines import locate
from data.formats.options import FileOptions
from data.row import Row

NUMPY = re.compile(r"\barray\((\[[^][]*\])(?:,\s*dtype=[\w.'<>]+)?\)")  # in the table of a data frame that has lists


def require_columns(
    name: str, rows: Sequence[Row], columns: Sequence[str], hint: str, errors: ErrorList, options: FileOptions
) -> None:
    """Add to `errors` each row without a value in one of `columns`; a column that no row has is one error of the file.

    hint: what the file may have instead, for the message of a column that is absent.
    """
    path = locate(name)
    absent = [column for column in columns if rows and not any(column in row.values for row in rows)]
    if absent:
        reason = describe_missing(absent[0], [*rows[0].values], columns, options, hint)
        errors.add(path, rows[0].line, reason, of_file=True)
        return
    for row in rows:
        missing = next((column for column in columns if row.values.get(column) is None), "")
        if missing and missing in row.values:
            errors.add(path, row.line, f"column {missing!r} is null")
        elif missing:
            found = ", ".join(map(repr, row.values)) or "no columns"
            errors.add(path, row.line, f"no column {missing!r}; this row has {found}")


def parse_cell(value: Any) -> Any:
    """Return the list or object that a text stands for, as the cell of a table does; another value as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] not in ("{", "[") or text[-1:] not in ("}", "]"):
        return value
    for parse in (json.loads, ast.literal_eval):  # as JSON writes it, or as Python's str() does
        try:
            found = parse(NUMPY.sub(r"\1", text) if parse is ast.literal_eval else text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict) or (isinstance(found, list) and all(isinstance(item, str | dict) for item in found)):
            return found
    return value
