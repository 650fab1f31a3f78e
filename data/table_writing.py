"""Dicts, such as predictions, written as a table: .csv, or .parquet with pyarrow, an optional package.

- A member of an inner dict is a column, `probabilities.positive`. The columns are in the order in which they occur.
- In .csv a list is JSON and null is an empty field. Floats have all their digits.
- In .parquet a list of texts or of numbers is a list; any other list is JSON.

The rows are read twice, to find all columns first, and never all in memory.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from data.writing import TEXT, replace_file, to_json

SUFFIXES = (".csv", ".parquet")
ROWS_OF_GROUP = 8192  # of a .parquet file, held in memory while it is written
LAST = "reason"  # why a row has no prediction: a column that each table has, at its end
Rows = Callable[[], Iterable[dict[str, Any]]]  # which can be read more than once


def is_table(path: Path) -> bool:
    """Return whether a file is written as a table, by the end of its name."""
    return path.suffix.lower() in SUFFIXES


def can_write(path: Path) -> bool:
    """Return whether the package is installed that writes a table."""
    return path.suffix.lower() != ".parquet" or importlib.util.find_spec("pyarrow") is not None


def write_table(path: Path, rows: Rows) -> None:
    """Write a table as a whole, by the end of its name. Raises OSError."""
    kinds = find_kinds(map(flatten, rows()))
    with replace_file(path) as temporary:
        (_write_parquet if path.suffix.lower() == ".parquet" else _write_csv)(temporary, rows, kinds)


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a row with the members of inner dicts as its own, under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def find_kinds(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return {column: kind of its values} of flat rows, LAST at the end; kinds are those of `_kind`.

    A column that is null or has members, such as `meta` beside `meta.year`, is that of its members.
    """
    kinds: dict[str, str] = {}
    for row in rows:
        for column, value in row.items():
            found, known = _kind(value), kinds.setdefault(column, "")
            if found != known:
                kinds[column] = _join(known, found)
    last = kinds.pop(LAST, "")
    inner = {column[:i] for column in kinds for i, letter in enumerate(column) if letter == "."}
    return {**{column: kind for column, kind in kinds.items() if kind or column not in inner}, LAST: last}


def _kind(value: Any) -> str:
    """Return bool, int, float, str or json; the same with [] for a list, "[]" for one of nulls; "" for null."""
    if isinstance(value, list):
        inner = reduce(_join, map(_kind, value), "")
        return "json" if inner == "json" or inner.endswith("[]") else f"{inner}[]"
    if isinstance(value, dict):
        return "json"
    return "" if value is None else type(value).__name__


def _join(known: str, found: str) -> str:
    """Return the kind of a column that has values of two kinds."""
    if not known or not found or known == found:
        return known or found
    if {known, found} == {"int", "float"}:
        return "float"
    if known.endswith("[]") and found.endswith("[]"):
        inner = _join(known.removesuffix("[]"), found.removesuffix("[]"))
        return "json" if inner == "json" else f"{inner}[]"
    return "json"


def _write_csv(path: Path, rows: Rows, kinds: dict[str, str]) -> None:
    with path.open("w", **TEXT) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(kinds)
        for row in map(flatten, rows()):
            writer.writerow([_as_cell(row.get(column)) for column in kinds])


def _as_cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    cell = to_json(value, ensure_ascii=False)
    return "" if cell == "null" else cell  # NaN


def _write_parquet(path: Path, rows: Rows, kinds: dict[str, str]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    scalars = {"bool": pyarrow.bool_(), "int": pyarrow.int64(), "float": pyarrow.float64()}
    types = {
        column: pyarrow.list_(scalars.get(kind[:-2], pyarrow.string()))
        if kind.endswith("[]")
        else scalars.get(kind, pyarrow.string())
        for column, kind in kinds.items()
    }
    schema = pyarrow.schema(list(types.items()))
    with ParquetWriter(path, schema) as writer:
        for group in _groups(map(flatten, rows()), ROWS_OF_GROUP):
            columns = {
                column: [_as_json(row.get(column)) if kind == "json" else row.get(column) for row in group]
                for column, kind in kinds.items()
            }
            writer.write_table(pyarrow.table(columns, schema=schema))


def _as_json(value: Any) -> str | None:
    return None if value is None else to_json(value, ensure_ascii=False)


def _groups(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in lists of `size`, the last one perhaps shorter."""
    iterator = iter(rows)
    while group := list(itertools.islice(iterator, size)):
        yield group
