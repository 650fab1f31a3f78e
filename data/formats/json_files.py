"""Files of JSON -> records, by their content: an object a line, an array of objects, or an object that holds them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.lines import TextFile, locate
from data.formats.options import FileOptions

# The records of a file: (number from 1, which is the id; line, {column: value}); None where an error has been added.
Records = Iterator[tuple[int, int, dict[str, Any] | None]]

NAMES_SHOWN = 6
# Members that hold the rows of a file, also where their columns are not those that are needed.
HOLDERS = {"data", "rows", "examples", "records", "items", "instances", "documents", "samples", "results", "train"}
HOLDERS |= {"validation", "dev", "test"}
_SPACE = re.compile(r"\s*")


def read_json(path: Path, errors: ErrorList, required: Sequence[str], options: FileOptions) -> Records:
    """Yield the records of a .jsonl or .json file, by what it is and not by its name.

    - Objects, one a line: a record's number is its line, so that an empty line shifts no id.
    - An array of objects, or objects one after another on several lines each.
    - An object with one list of objects, as {"data": [...]}; with a column in each member, or a row in each member, as
      pandas writes them; or a single row, which has a required column.

    DataError for a file that is JSON of another form, or begins as such and is not JSON.
    """
    file = TextFile(path, options)
    first = _first_lines(file)
    if first and not (len(first) > 1 and _is_json(first[0])):
        text = file.text() if len(first) == 1 or _is_whole(first) else _text_or_none(file)
        records = None if text is None else _find_records(path, text, first, required, options, errors)
        if text is not None and records is not None:
            yield from _number(path, text, records, errors)
            errors.notes += file.notes
            return
    yield from _read_lines(file, errors)


# Objects, one a line


def _read_lines(file: TextFile, errors: ErrorList) -> Records:
    empty = Gaps()
    for number, text in file.lines(errors):
        if text is not None and (not text or text.isspace()):
            empty.open.append(number)
            continue
        if empty.open:
            empty.close()
        values = None
        if text is not None:
            try:
                value = parse_json(text)
                if "\\" in text and "\\u" in text:
                    check_surrogates(value)
            except DataError as error:
                errors.add(file.path, number, str(error))
            except (ValueError, RecursionError) as error:
                errors.add(file.path, number, f"not JSON: {error}")
            else:
                values = _as_object(file.path, number, value, errors)
        yield number, number, values
    errors.notes += empty.describe()


def _as_object(path: Path, line: int, value: Any, errors: ErrorList) -> dict[str, Any] | None:
    """Return the value of a record; None, and an error, if it is no object."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict):
        return {"text": value[0], **value[1]}  # spaCy's ["Ann left", {"entities": [[0, 3, "PER"]]}]
    errors.add(path, line, f"a JSON object is needed, not a {type(value).__name__}")
    return None


class Gaps:
    """The empty lines between the records of a file; those at its end do not count."""

    def __init__(self) -> None:
        self.first, self.count, self.open = 0, 0, list[int]()

    def close(self) -> None:
        """Count the empty lines since the last record, now that another one follows."""
        if self.open:
            self.first = self.first or self.open[0]
            self.count += len(self.open)
            self.open = []

    def describe(self) -> list[str]:
        """Return a note about the empty lines, or nothing."""
        if not self.count:
            return []
        more = f", and so {'is 1' if self.count == 2 else f'are {self.count - 1:,}'} more" if self.count > 1 else ""
        return [f"line {self.first} is empty{more}: left out"]


def _first_lines(file: TextFile) -> list[str]:
    """Return the first two lines that are not empty, or fewer where there are fewer; [] if one cannot be read."""
    found: list[str] = []
    for _, text in file.lines(ErrorList(), is_whole=True):
        if text is None:
            return []
        found += [text] if text.strip() else []
        if len(found) == 2:
            break
    return found


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except DataError:
        return True  # a key twice
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole(first: list[str]) -> bool:
    """Return whether a file with these first lines can only be JSON as a whole, not an object a line."""
    opens = first[0].rstrip()[-1:] in ("{", "[", ",", ":") or first[0].lstrip().startswith("[{")
    return opens and (first[0].strip() in ("[", "{") or len(first) == 1 or not _is_json(first[1]))


# The file as a whole


def _text_or_none(file: TextFile) -> str | None:
    try:
        return file.text()
    except DataError:
        return None


def _find_records(
    path: Path, text: str, first: list[str], required: Sequence[str], options: FileOptions, errors: ErrorList
) -> list[tuple[int, Any]] | None:
    """Return (position in `text` or -1, value) of each record; None if each line should be read by itself."""
    start = _end_of_space(text, 0)
    try:
        if text[start : start + 1] == "[":
            return list(_iterate_array(path, text, start))
        value, end = _DECODER.raw_decode(text, start)
        if text[end:].strip():
            return list(_iterate_objects(text, start))
        if "\\u" in text:
            check_surrogates(value)
    except (DataError, ValueError, RecursionError) as error:
        if not _is_whole(first):
            return None
        if isinstance(error, json.JSONDecodeError):
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        location = "" if str(error).startswith(str(path)) else f"{path}: not JSON: "
        raise DataError(f"{location}{error}") from None
    if not isinstance(value, dict):
        return None
    rows = _rows_of_object(path, value, required, options, errors.notes)
    return [(start, value)] if rows is None else [(-1, row) for row in rows]


def _iterate_array(path: Path, text: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yield (position, value) of each item of the array that begins at `start`."""
    position = _end_of_space(text, start + 1)
    number = 0
    while text[position : position + 1] != "]":
        number += 1
        try:
            value, end = _DECODER.raw_decode(text, position)
            if "\\u" in text[position:end]:
                check_surrogates(value)
        except json.JSONDecodeError:
            raise
        except (DataError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: record {number}: {error}") from None
        yield position, value
        position = _end_of_space(text, end)
        if text[position : position + 1] == ",":
            position = _end_of_space(text, position + 1)
            if text[position : position + 1] == "]":
                raise json.JSONDecodeError("a comma before the end of the array", text, position)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, _end_of_space(text, position + 1))


def _iterate_objects(text: str, position: int) -> Iterator[tuple[int, Any]]:
    """Yield (position, value) of objects that follow one another on lines of their own, as jq writes them."""
    while position < len(text):
        value, end = _DECODER.raw_decode(text, position)
        if "\\u" in text[position:end]:
            check_surrogates(value)
        yield position, value
        position = _end_of_space(text, end)
        if position < len(text) and "\n" not in text[end:position]:
            raise json.JSONDecodeError("Extra data", text, position)


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _number(path: Path, text: str, records: Sequence[tuple[int, Any]], errors: ErrorList) -> Records:
    """Yield the records with their numbers, and as lines those where they begin, if each begins on a line of its own.

    Otherwise the numbers of the records take the place of lines, and errors say so.
    """
    positions = [position for position, _ in records]
    newlines = (text.count("\n", *pair) for pair in itertools.pairwise([0, *positions]))
    lines = [1 + count for count in itertools.accumulate(newlines)]
    if -1 in positions or len(set(lines)) < len(lines):
        lines = list(range(1, len(records) + 1))
        errors.unit = "record"
    for number, (line, (_, value)) in enumerate(zip(lines, records, strict=True), 1):
        yield number, line, _as_object(path, line, value, errors)


def _rows_of_object(
    path: Path, value: dict[str, Any], required: Sequence[str], options: FileOptions, notes: list[str]
) -> Iterable[dict[str, Any]] | None:
    """Return the rows that an object holds; None if it is a row itself. DataError where it holds several lists."""
    heads = {column if column in value else column.partition(".")[0] for column in required}
    members = list(value.values())
    if (heads | options.settings.keys()) & value.keys():
        rows = _rows_of_columns(value, required, options.has_lists)
        if rows is not None:
            notes.append("an object with a column in each member, as pandas writes it: read as rows")
        return rows
    if not members:
        return None
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names, data = value["columns"], value["data"]
        if all(isinstance(row, list) and len(row) == len(names) for row in data):
            return [dict(zip(map(str, names), row, strict=True)) for row in data]
    if heads and all(isinstance(row, dict) and heads <= row.keys() for row in members):
        notes.append("an object with a row in each member: the names of the members are the ids")
        return [({options.id_column: key} if options.id_column else {}) | row for key, row in value.items()]
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and _are_objects(rows)}
    fitting = {key: rows for key, rows in lists.items() if heads and heads <= rows[0].keys()}
    fitting = fitting or {key: rows for key, rows in lists.items() if key.lower() in HOLDERS}
    if len(fitting) > 1:
        names = ", ".join(map(repr, list(fitting)[:NAMES_SHOWN]))
        raise DataError(f"{path}: lists of objects in {names}: which has the rows? Save each as a file of its own")
    for key, rows in fitting.items():
        others = [name for name in value if name != key]
        more = f"; beside it {', '.join(map(repr, others[:NAMES_SHOWN]))}" if others else ""
        notes.append(f"the rows are the {len(rows):,} objects in {key!r}{more}")
        return rows
    return None


def _are_objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _rows_of_columns(value: dict[str, Any], required: Sequence[str], has_lists: bool) -> list[dict[str, Any]] | None:
    """Return the rows of {column: {number: value}}, the default of pandas' to_json, or of {column: [values]}.

    None for any other object. Lists of words and tags are a row with lists, so that columns are certain only where the
    first one that is required has lists, or texts with spaces where no row `has_lists` there.
    """
    columns = list(value.values())
    first = value.get(required[0]) if required else None
    if isinstance(first, list) and all(isinstance(column, list) and len(column) == len(first) for column in columns):
        if any(
            isinstance(item, list) or (not has_lists and isinstance(item, str) and " " in item.strip())
            for item in first
        ):
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        return None
    if not _are_objects(columns) or not columns[0] or not all(key.isdecimal() for key in columns[0]):
        return None
    keys = columns[0].keys()
    if any(column.keys() != keys for column in columns):
        return None
    return [{name: column[key] for name, column in value.items()} for key in keys]


# JSON


def read_document(name: str, options: FileOptions) -> Any:
    """Return the value of a file that is one JSON value; DataError for a file that cannot be read as such."""
    path = locate(name)
    try:
        text = TextFile(path, options).text()
        values = parse_json(text)
        if "\\u" in text:
            check_surrogates(values)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: this is a folder; name a file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (DataError, ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise DataError(f"{path}: not JSON: {error}") from None
    return values


def parse_json(text: str) -> Any:
    """Return a JSON value, NaN as null. DataError for a key that occurs twice; ValueError for other faults."""
    return json.loads(text, parse_constant=_read_constant, object_pairs_hook=_unique_keys)


def check_surrogates(values: Any) -> None:
    """Raise DataError for half of a surrogate pair, which an escape can name and no UTF-8 file can hold."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"\\u{half:04x} is half of a surrogate pair, not a character") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; DataError for a key that occurs twice, since Python would keep the last value only."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values


def _read_constant(name: str) -> None:
    """Return null for NaN, which Python writes for a missing number; raise ValueError for Infinity."""
    if name == "NaN":
        return
    raise ValueError(f"{name} is not a JSON value; use null, or leave the row out")


_DECODER = json.JSONDecoder(parse_constant=_read_constant, object_pairs_hook=_unique_keys)
