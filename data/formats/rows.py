"""Files -> rows with ids. Every bad line is reported as `file:line: reason`, all of them before training starts."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, ErrorList
from data.formats.parquet import read_parquet

MAX_LINE = 1_000_000  # characters; a longer line is a broken file, not a text


class Row:
    """One example as read: its id, its line in the file, and its columns.

    Readers give all three: `Row("7", 8, {"text": "..."})`. In Python, keywords are columns: `Row(text="...", label="a")`.
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


def locate(name: str) -> Path:
    """A local path, or `package:NAME/FILE` for a file shipped inside an installed package."""
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
    id_column: str = "id",
    errors: ErrorList | None = None,
    format: str = "auto",
) -> list[Row]:
    """Read a .jsonl, .csv, .tsv or .parquet file; every row must have the `required` columns.

    format: jsonl, csv, tsv or parquet; auto: as the name ends.

    Ids come from `id_column` where the file has it, and then no two are the same, since predictions are matched by id;
    else they are the number of the row from 1. csv is read with quotes (RFC 4180); tsv without any, since a tab cannot
    stand inside a field. Values keep their JSON type; in csv and tsv they are strings.

    errors: bad lines are added to it, for a caller that finds more; without it DataError is raised with all of them.
    A file of which nothing can be read is a DataError at once.
    """
    path = locate(name)
    reader = READERS.get(path.suffix.lower() if format == "auto" else f".{format}")
    errors, collected = ErrorList() if errors is None else errors, errors is not None
    rows: list[Row] = []
    try:
        if path.is_dir():
            raise DataError(f"{name}: this is a folder; name a file, one of {', '.join(READERS)}")
        if reader is None and format != "auto":
            raise DataError(f"{name}: data.format = {format!r} is not of rows; use one of {', '.join(READERS)}")
        if reader is None:
            raise DataError(f"{name}: unknown kind of file {path.suffix!r}; use one of {', '.join(READERS)}")
        for line, values in reader(path, clean_lines(path, errors), errors, required):
            missing = [column for column in required if values.get(column) is None]
            if not missing:
                rows.append(Row(str(len(rows) + 1), line, values))
            elif missing[0] in values:
                errors.add(path, line, f"column {missing[0]!r} is null")
            else:
                have = ", ".join(map(repr, values)) or "nothing"
                errors.add(path, line, f"no column {missing[0]!r}; this row has {have}")
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    _give_ids(path, rows, id_column, errors)
    if not collected:
        errors.raise_if_any()
    if not rows and not errors:
        raise DataError(f"{name}: no rows")
    return rows


def _give_ids(path: Path, rows: list[Row], column: str, errors: ErrorList) -> None:
    """Ids from `column` where any row has it: then every row must, and each its own."""
    if not any(column in row.values for row in rows):
        return
    lines: dict[str, int] = {}
    for row in rows:
        value = row.values.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            have = f"this is {value!r}" if column in row.values else "this row has none"
            errors.add(path, row.line, f"an id in {column!r} should be text or a number, {have}")
            continue
        row.id = str(value)
        if row.id in lines:
            hint = "data.id_column names another column, or one that is not in the file for row numbers"
            errors.add(path, row.line, f"the id {row.id!r} is that of line {lines[row.id]} too; {hint}")
        else:
            lines[row.id] = row.line


def clean_lines(path: Path, errors: ErrorList) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line end) of each line that is clean UTF-8; a BOM is dropped."""
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


# A file's records as (number of the first line, {column: value}).
Records = Iterator[tuple[int, dict[str, Any]]]


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
    """A JSON value; DataError for a key twice in an object, ValueError for what is not JSON, as NaN and Infinity."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two values and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity; JSON has neither, and a label 'nan' is a missing one."""
    raise ValueError(f"{name} is not a JSON value; use null, or leave the row out")


def _read_csv(path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]) -> Records:
    first = 0  # of the lines of a record; it has more than one where a quoted field holds a line end

    def texts() -> Iterator[str]:
        nonlocal first
        for number, text in lines:
            first = first or number
            yield text + "\n"

    def records() -> Iterator[tuple[int, list[str]]]:
        nonlocal first
        reader = csv.reader(texts(), strict=True)
        csv.field_size_limit(MAX_LINE)
        while True:
            first = 0
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = str(error).partition(" - ")[0]
                hint = "a field with a comma, quote or line end stands in quotes, a quote inside it is doubled"
                errors.add(path, first, f"not csv: {reason}; {hint}")
            else:
                if fields:  # not an empty line
                    yield first, fields

    return _name_columns(path, records(), errors, required)


def _read_tsv(path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]) -> Records:
    return _name_columns(path, ((number, text.split("\t")) for number, text in lines if text), errors, required)


def _name_columns(
    path: Path, records: Iterator[tuple[int, list[str]]], errors: ErrorList, required: Sequence[str]
) -> Records:
    """The first record is the header. Nothing is read below a header that is broken."""
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


def sample_rows(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` of the rows drawn by `seed`, in the order of the file; all of them where there are no more, or for 0.

    A larger count has those of a smaller one and others, so that a curve over counts adds to what it began with.
    """
    if not 0 < count < len(rows):
        return rows
    chosen = np.random.default_rng([seed, 0x11317]).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen.tolist())]


def split_rows(
    rows: list[Row], fraction: float, seed: int, group: str = "", label: str = ""
) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows: a random `fraction` held out by `seed`, each in the order of the file.

    With `group`, a column, rows that share its value stay on one side (all sentences of a review, all of a patient).
    Otherwise with `label`, a column, each of its values is held out in proportion, to within one row; a value that only
    one row has is never held out, since nothing else could teach it.
    """
    keys = [str(row.values.get(group)) if group else str(i) for i, row in enumerate(rows)]
    units = sorted(set(keys)) if group else keys
    labels = [str(row.values.get(label)) for row in rows] if label and not group else []
    counts = Counter(labels)
    may_be_held = [i for i in range(len(units)) if not labels or counts[labels[i]] > 1]
    if not may_be_held and len(units) > 1:
        raise DataError(
            f"data.validation_fraction = {fraction} leaves nothing to train on for a label that is held out: "
            f"no two rows have the same {label!r}; name a data.validation file"
        )
    held_units = max(1, round(len(may_be_held) * fraction))
    if held_units >= len(units):
        what = f"values of {group!r}" if group else "rows"
        raise DataError(f"data.validation_fraction = {fraction} leaves nothing to train on: only {len(units)} {what}")
    rng = np.random.default_rng([seed, 0x5EED])
    order = rng.permutation(may_be_held).tolist()
    if labels:
        order.sort(key=lambda i: labels[i])  # stable: still shuffled within a label
    # At equal distances from a random start: each row is as likely as any, each label has its share.
    start = int(rng.integers(len(order)))
    held = {units[order[(i * len(order) + start) // held_units]] for i in range(held_units)}
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in held]
