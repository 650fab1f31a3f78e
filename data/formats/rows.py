"""Files with a row a line: .jsonl, .csv, .tsv (and .parquet, in parquet.py) -> rows with ids.

Every bad line is reported as `file:line: reason`, all of them before training starts.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.memory import is_in_memory, read_memory
from data.formats.options import FileOptions
from data.formats.parquet import read_parquet
from data.row import Row, Rows

MAX_LINE = 1_000_000  # characters; a longer line is a broken file, not a text

# The records of a file: (number of the first line, {column: value}); None for a record whose error has been added.
Records = Iterator[tuple[int, dict[str, Any] | None]]


def locate(name: str) -> Path:
    """Return the path of a file: a local one, or `package:NAME/FILE` inside an installed package."""
    if not name.startswith("package:"):
        return Path(name)
    package, _, rest = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{name}: the package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / rest


def read_rows(
    name: str,
    required: Sequence[str],
    options: FileOptions = FileOptions(),
    errors: ErrorList | None = None,
) -> Rows:
    """Return the rows of a .jsonl, .csv, .tsv or .parquet file, or of rows in memory; all have the `required` columns.

    - options.format: jsonl, csv, tsv or parquet; auto: by the ending of the name. Rows in memory have no format.
    - Ids come from options.id_column where the file has it. They must be unique, since predictions are matched by id.
      Without the column, ids are the numbers of the records from 1. In .jsonl that is the line, so that an empty line
      shifts no id.
    - csv has quotes (RFC 4180). tsv has none: a tab cannot stand inside a field.
    - Values keep their JSON type; in csv and tsv they are strings.

    errors: bad lines are added to it, for a caller with further checks, who settles them. Without it, raises one
    DataError with all, or leaves them out, as options.bad_rows says.
    Raises DataError at once for a file that cannot be read at all.
    """
    path, collected = locate(name), errors is not None
    errors = ErrorList() if errors is None else errors
    rows: list[Row] = []
    try:
        found = read_memory(name, errors) if is_in_memory(name) else _read_file(name, required, errors, options)
        for row in found:
            missing = [column for column in required if row.values.get(column) is None]
            row.id = row.id or str(row.line)  # of a row in memory, whose line is its number
            if not missing:
                rows.append(row)
                continue
            errors.broken[row.line] = row.id
            if missing[0] in row.values:
                errors.add(path, row.line, f"column {missing[0]!r} is null")
            else:
                columns = ", ".join(map(repr, row.values)) or "no columns"
                errors.add(path, row.line, f"no column {missing[0]!r}; this row has {columns}")
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    _assign_ids(path, rows, options.id_column, errors)
    if not rows and not errors:
        raise DataError(f"{name}: no rows")
    if collected:
        return Rows(rows)
    return errors.settle(name, rows, options)


def _read_file(name: str, required: Sequence[str], errors: ErrorList, options: FileOptions) -> Iterator[Row]:
    path, format = locate(name), options.format
    reader = READERS.get(path.suffix.lower() if format == "auto" else f".{format}")
    if path.is_dir():
        raise DataError(f"{name}: this is a folder; name a file, one of {', '.join(READERS)}")
    if reader is None and format != "auto":
        raise DataError(f"{name}: data.format = {format!r} is not a format of rows; use one of {', '.join(READERS)}")
    if reader is None:
        raise DataError(f"{name}: unknown kind of file {path.suffix!r}; use one of {', '.join(READERS)}")
    for number, (line, values) in enumerate(reader(path, clean_lines(path, errors), errors, required), 1):
        if values is None:
            errors.broken[line] = str(number)
        else:
            yield Row(str(number), line, values)


def _assign_ids(path: Path, rows: list[Row], column: str, errors: ErrorList) -> None:
    """Take the ids from `column` if any row has it; then every row must have one. No two rows may have the same id."""
    has_column = any(column in row.values for row in rows)
    lines: dict[str, int] = {}
    for row in rows:
        if has_column:
            value = row.values.get(column)
            if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
                found = f"this is {value!r}" if column in row.values else "this row has none"
                errors.add(path, row.line, f"an id in {column!r} should be text or a number, {found}")
                continue
            row.id = str(value)
        if row.id in lines:
            hint = "data.id_column names another column, or one that is not in the file for row numbers"
            errors.add(path, row.line, f"the id {row.id!r} is that of line {lines[row.id]} too; {hint}")
        else:
            lines[row.id] = row.line


def clean_lines(path: Path, errors: ErrorList) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without its line end) of each line that is clean UTF-8, without a BOM.

    Every other line is added to `errors`.
    """
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                errors.add(path, number, f"not UTF-8 at byte {error.start} of the line ({byte:#04x})")
                continue
            if "\0" in text:
                errors.add(path, number, "a NUL character")
            elif len(text) > MAX_LINE:
                errors.add(path, number, f"{len(text):,} characters in one line; at most {MAX_LINE:,} are read")
            else:
                yield number, text


# JSON lines


def _read_jsonl(path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]) -> Records:
    for number, text in lines:
        if not text.strip():
            continue
        try:
            values = parse_json(text)
            if "\\u" in text:  # an escape can name half of a surrogate pair, which no UTF-8 file can hold
                json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            errors.add(path, number, f"\\u{half:04x} is half of a surrogate pair, not a character")
        except DataError as error:
            errors.add(path, number, str(error))
        except (ValueError, RecursionError) as error:
            errors.add(path, number, f"not JSON: {error}")
        else:
            if isinstance(values, dict):
                yield number, values
            else:
                errors.add(path, number, f"a JSON object is needed, this is a {type(values).__name__}")


def parse_json(text: str) -> Any:
    """Return a JSON value. DataError for a key that occurs twice; ValueError for other faults, NaN included."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; DataError for a key that occurs twice, since Python would keep the last value only."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python accepts. JSON has neither, and NaN usually means a gap."""
    raise ValueError(f"{name} is not a JSON value; use null, or leave the row out")


# Tables


def _read_csv(path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]) -> Records:
    first_line = 0  # of a record; a record has several lines where a quoted field holds a line end

    def texts() -> Iterator[str]:
        nonlocal first_line
        for number, text in lines:
            first_line = first_line or number
            yield text + "\n"

    def records() -> Iterator[tuple[int, list[str]]]:
        nonlocal first_line
        reader = csv.reader(texts(), strict=True)
        csv.field_size_limit(MAX_LINE)
        while True:
            first_line = 0
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = str(error).partition(" - ")[0]
                hint = "a field with a comma, quote or line end stands in quotes, a quote inside it is doubled"
                errors.add(path, first_line, f"not csv: {reason}; {hint}")
            else:
                if fields:  # not an empty line
                    yield first_line, fields

    return _name_columns(path, records(), errors, required)


def _read_tsv(path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]) -> Records:
    return _name_columns(path, ((number, text.split("\t")) for number, text in lines if text), errors, required)


def _name_columns(
    path: Path, records: Iterator[tuple[int, list[str]]], errors: ErrorList, required: Sequence[str]
) -> Records:
    """Yield the records below the header, which is the first one. Nothing is read below a broken header."""
    line, header = next(records, (0, []))
    missing = [column for column in required if column not in header]
    twice = [column for column in header if header.count(column) > 1]
    if errors or not header:
        return
    if missing:
        errors.add(path, line, f"no column {missing[0]!r}; the header has {', '.join(map(repr, header))}")
    elif twice:
        errors.add(path, line, f"the header names {twice[0]!r} twice")
    else:
        for line, fields in records:
            if len(fields) == len(header):
                yield line, dict(zip(header, fields, strict=True))
            else:
                errors.add(path, line, f"{len(fields)} fields, the header has {len(header)}")


READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": read_parquet}
