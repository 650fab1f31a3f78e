"""Files -> rows with ids. Every bad line is reported as `file:line: reason`, all of them before training starts."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, ErrorList

MAX_LINE = 1_000_000  # characters; a longer line is a broken file, not a text


@dataclass(slots=True)
class Row:
    """One example as read: its id, where it stands, and the columns asked for."""

    id: str
    line: int
    values: dict[str, Any]


def locate(name: str) -> Path:
    """A local path, or `package:NAME/FILE` for a file shipped inside an installed package."""
    if not name.startswith("package:"):
        return Path(name)
    package, _, rest = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{name}: the package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / rest


def read_rows(name: str, required: Sequence[str], id_column: str = "id") -> list[Row]:
    """Read a .jsonl, .csv or .tsv file; every row must have the `required` columns.

    Ids come from `id_column` where the file has it, else they are the number of the row from 1. csv is read with quotes
    (RFC 4180); tsv without any, since a tab cannot stand inside a field. Values keep their JSON type; in csv and tsv
    they are strings. Raises DataError with every bad line.
    """
    path = locate(name)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{name}: unknown kind of file {path.suffix!r}; use one of {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{name}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    errors = ErrorList()
    rows: list[Row] = []
    for line, values in reader(path, _lines(path, errors), errors, required):
        number = len(rows) + 1
        missing = [column for column in required if values.get(column) is None]
        if missing:
            have = ", ".join(map(repr, values)) or "nothing"
            errors.add(path, line, f"no column {missing[0]!r}; this row has {have}")
            continue
        rows.append(Row(str(values.get(id_column, number)), line, values))
    errors.raise_if_any()
    if not rows:
        raise DataError(f"{name}: no rows")
    return rows


def _lines(path: Path, errors: ErrorList) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line end) of each line that is clean UTF-8; a BOM is dropped."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                errors.add(path, number, f"not UTF-8 at byte {error.start} of the line ({raw[error.start]:#04x})")
                continue
            if "\0" in text:
                errors.add(path, number, "a NUL character")
            elif len(text) > MAX_LINE:
                errors.add(path, number, f"{len(text):,} characters in one line; at most {MAX_LINE:,} are read")
            else:
                yield number, text


def _read_jsonl(
    path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in lines:
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            errors.add(path, number, f"not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            errors.add(path, number, f"a JSON object is needed, this is a {type(values).__name__}")


class _Csv(csv.excel):
    strict = True


class _Tsv(csv.excel_tab):
    strict = True
    quoting = csv.QUOTE_NONE


def _read_delimited(
    path: Path, lines: Iterator[tuple[int, str]], errors: ErrorList, required: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    reached = 0

    def texts() -> Iterator[str]:
        nonlocal reached
        for reached, text in lines:  # noqa: B007 (csv reads ahead over quoted line ends; this says how far)
            yield text + "\n"

    dialect = _Tsv if path.suffix.lower() == ".tsv" else _Csv
    reader = csv.reader(texts(), dialect)
    csv.field_size_limit(MAX_LINE)
    header: list[str] = []
    while True:
        first = reached + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            errors.add(path, first, f"not {path.suffix[1:]}: {error}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        if not header:
            header = fields
            missing = [column for column in required if column not in header]
            if missing:
                columns = ", ".join(map(repr, header))
                raise DataError(f"{path}:{first}: no column {missing[0]!r}; the header has {columns}")
        elif len(fields) != len(header):
            errors.add(path, first, f"{len(fields)} fields, the header has {len(header)}")
        else:
            yield first, dict(zip(header, fields, strict=True))


READERS = {".jsonl": _read_jsonl, ".csv": _read_delimited, ".tsv": _read_delimited}


def split_rows(rows: list[Row], fraction: float, seed: int, group: str = "") -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows: a random `fraction` held out by `seed`, each in the order of the file.

    With `group`, a column, rows that share its value stay on one side (all sentences of a review, all of a patient).
    """
    if group:
        keys = [str(row.values.get(group)) for row in rows]
        units = sorted(set(keys))
    else:
        keys = [str(i) for i in range(len(rows))]
        units = keys
    held_units = max(1, round(len(units) * fraction))
    if held_units >= len(units):
        what = f"values of {group!r}" if group else "rows"
        raise DataError(f"data.validation_fraction = {fraction} leaves nothing to train on: only {len(units)} {what}")
    shuffled = np.random.default_rng([seed, 0x5EED]).permutation(len(units))
    held = {units[i] for i in shuffled[:held_units]}
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in held]
