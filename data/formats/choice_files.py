"""Files of questions with choices -> records with one question each.

- Files of rows, in any format of rows.py.
- RACE's files, a JSON object each, in a folder; or such objects, one a line. Each has a list of questions.
- C3's nested lists: [[lines of a dialogue or text], [{"question", "choice", "answer"}, ...], id].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError, ErrorList
from data.formats.folders import split_of
from data.formats.json_files import read_document
from data.formats.lines import locate, read_first_line, suffix_of
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.parquet import is_table_folder
from data.formats.rows import read_rows
from data.label_lists import parse_list_text
from data.row import Row

ENDINGS = (".txt", ".json")  # of RACE's files
# Of a text. The questions of text 7 are in the lines 7001, 7002, ...; messages name their places instead.
MOST_QUESTIONS = 1_000


class Record(NamedTuple):
    """A row, and where it is: in a line of `path`, or at a place of it."""

    path: object
    row: Row
    place: str = ""


def read_records(name: str, options: FileOptions, errors: ErrorList, known: Sequence[str] = ()) -> list[Record]:
    """Return a record for each question of a file or folder; `known`: columns of files of rows that may be read."""
    path = locate(name)
    if not is_in_memory(name) and path.is_dir() and not is_table_folder(path):
        return [*_read_folder(name, path, options, errors)]
    if not is_in_memory(name) and suffix_of(path) == ".txt" and path.is_file():
        return [*_split(Record(path, Row("1", 1, _read_object(path, options))), errors)]
    if not is_in_memory(name) and (lists := _read_lists(name, options)) is not None:
        return [*_read_nested(path, lists, errors)]
    rows = read_rows(name, [], options.also_reading(known), errors)
    return [record for row in rows for record in _split(Record(name, row), errors)]


def _read_folder(name: str, path: Path, options: FileOptions, errors: ErrorList) -> Iterator[Record]:
    """Yield the questions of RACE's files, sorted by their paths, which are the ids of their texts."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise DataError(f"{name}: this is a folder without a file {' or '.join(ENDINGS)}, as RACE has; name a file")
    splits = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and split_of(folder.name)]
    if len(splits) > 1:
        raise DataError(f"{name}: it has the splits {', '.join(splits)}; name one of these folders")
    for number, file in enumerate(files, start=1):
        key = str(file.relative_to(path))
        try:
            values = _read_object(file, options)
        except DataError as error:
            errors.add(file, number * MOST_QUESTIONS, str(error).removeprefix(f"{file}: "), place="the file")
            errors.broken[number * MOST_QUESTIONS] = key
            continue
        yield from _split(Record(file, Row(key, number, values), "the file"), errors)


def _read_object(file: Path, options: FileOptions) -> dict[str, Any]:
    values = read_document(str(file), options)
    if not isinstance(values, dict):
        raise DataError(f"{file}: an object with article, questions, options and answers is expected")
    return values


def _read_lists(name: str, options: FileOptions) -> list[Any] | None:
    """Return the value of a file that is a list of lists, as C3's; None for any other file."""
    path = locate(name)
    if suffix_of(path) != ".json" or not path.is_file():
        return None
    first = read_first_line(path, options).replace(" ", "")
    if not (first.startswith("[[") or first == "["):
        return None
    values = read_document(name, options)
    return values if isinstance(values, list) and values and isinstance(values[0], list) else None


def _read_nested(path: Path, lists: list[Any], errors: ErrorList) -> Iterator[Record]:
    for number, item in enumerate(lists, start=1):
        line, place = number * MOST_QUESTIONS, f"text {number}"
        if not isinstance(item, list) or len(item) < 2 or not isinstance(item[1], list):
            errors.add(path, line, "should be [lines of a text, questions, id], as in C3", place=place)
            errors.broken[line] = str(number)
            continue
        key = str(item[2]) if len(item) > 2 else str(number)
        for i, entry in enumerate(item[1][: MOST_QUESTIONS - 1], start=1):
            values = {**entry, "context": item[0]} if isinstance(entry, dict) else {"context": item[0]}
            yield Record(path, Row(f"{key}-{i}", line + i, values), f"{place}, question {i}")


def _split(record: Record, errors: ErrorList) -> Iterator[Record]:
    """Yield a record for each question of a text with a list of them; a question that is an object is taken apart."""
    path, row, place = record
    values = row.values
    questions = values.get("questions")
    if isinstance(stem := values.get("question"), dict):
        values |= {"choices": stem.get("choices"), "question": stem.get("stem")}
    if isinstance(questions, str):
        questions = parse_list_text(questions)
    if not isinstance(questions, list) or "question" in values:
        yield record
        return
    lists = {name: values.get(name) for name in ("options", "answers")}
    sizes = {name: len(items) if isinstance(items, list | str) else -1 for name, items in lists.items()}
    wrong = [name for name, items in lists.items() if items is not None and sizes[name] != len(questions)]
    if wrong or not 0 < len(questions) < MOST_QUESTIONS:
        line = row.line * MOST_QUESTIONS
        reason = f"{wrong[0]} is no list of that length" if wrong else f"1 to {MOST_QUESTIONS - 1} are read"
        reason = f"{len(questions)} questions, and {reason}"
        errors.add(path, line, reason, place=place or f"line {row.line}")
        errors.broken[line] = row.id
        return
    for i, text in enumerate(questions):
        named = {"question": text, "options": (lists["options"] or [None] * len(questions))[i]}
        named |= {} if lists["answers"] is None else {"answer": lists["answers"][i]}
        shared = {key: value for key, value in values.items() if key not in ("questions", "options", "answers")}
        one = Row(f"{row.id}-{i + 1}", row.line * MOST_QUESTIONS + i + 1, shared | named)
        yield Record(path, one, f"question {i + 1}" if place else f"line {row.line}, question {i + 1}")
