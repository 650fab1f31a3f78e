"""Parquet files -> rows, with pyarrow, an optional package. A row's number from 1 takes the place of its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList

MAX_TEXT = 1_000_000  # characters of a value, as many as of a line in text files
BATCH_ROWS = 1_000  # read at a time


def read_parquet(
    path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, {column: value}) of each row. `lines`, of a text file, is not read.

    Values keep their type: text, whole numbers, floats, lists. NaN is null, since pandas writes missing numbers so.
    A row that cannot be in a text file (bad UTF-8, a NUL) is added to `errors`. DataError for a file that cannot be
    read.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"{path}: parquet files need the package pyarrow: pip install pyarrow; or save the table as .jsonl"
        ) from None
    number = 0
    with path.open("rb") as stream:
        try:
            file = ParquetFile(stream, page_checksum_verification=True)
            _check_columns(path, file.schema_arrow.names, required)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for values in _iterate_rows(batch):
                    number += 1
                    if isinstance(values, UnicodeDecodeError):
                        byte = values.object[values.start]
                        errors.add(path, number, f"not UTF-8 at byte {values.start} of a text ({byte:#04x})")
                    elif reason := unreadable_reason(values):
                        errors.add(path, number, reason)
                    else:
                        yield number, {name: None if value != value else value for name, value in values.items()}
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split()).removesuffix(".")
            raise DataError(f"{path}: not a parquet file that can be read: {reason}") from None


def _check_columns(path: Path, columns: list[str], required: Sequence[str]) -> None:
    found = ", ".join(map(repr, columns)) or "none"
    for column in required:
        if column not in columns:
            raise DataError(f"{path}: no column {column!r}; the columns are {found}")
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}")


def _iterate_rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield each row of a pyarrow batch, or the error of a text that is not UTF-8, which parquet does not check."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(len(batch)):
        try:
            yield from batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield error


def unreadable_reason(values: dict[str, Any]) -> str:
    """Return why a text file cannot have this row; "" where it can."""
    for column, value in values.items():
        if isinstance(value, str) and "\0" in value:
            return f"a NUL character in {column!r}"
        if isinstance(value, str) and len(value) > MAX_TEXT:
            return f"{len(value):,} characters in {column!r}; at most {MAX_TEXT:,} are read"
    return ""
