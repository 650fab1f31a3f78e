"""Questions about contexts: SQuAD's json files (versions 1 and 2), and rows -> rows with checked answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError, ErrorList
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.rows import locate, parse_json, read_rows
from data.row import Row, Rows

# The columns that the rows of a SQuAD file have.
COLUMNS = ("id", "title", "context", "question", "answers", "is_impossible")


class Answer(NamedTuple):
    """A span of a context: context[start : start + len(text)] == text, counted in characters (code points)."""

    text: str
    start: int


def read_questions(
    name: str,
    *,
    question: str = "question",
    context: str = "context",
    answers: str = "answers",
    others: Sequence[str] = (),
    options: FileOptions = FileOptions(),
) -> Rows:
    """Return a row for each question, whose `answers` are a list of Answer; [] where there is no answer.

    - format "squad" (auto: a name that ends in .json) is SQuAD's, version 1 or 2.
    - Any other file is read by read_rows, with answers as {"text": [..], "answer_start": [..]} or
      [{"text": .., "answer_start": ..}, ..].

    answers: "" for a file without answers, or where they should not be read. others: further required columns.
    Raises one DataError with all errors: `file:line: reason` in rows, `file: question ID: reason` in
    SQuAD's files, where a line has thousands of questions.
    """
    errors = ErrorList()
    id_column = options.id_column
    is_squad = options.format == "squad" or (options.format == "auto" and locate(name).suffix.lower() == ".json")
    if is_squad and not is_in_memory(name):
        wanted = [column for column in (question, context, answers, *others, id_column) if column]
        if unknown := [column for column in wanted if column not in COLUMNS and column != id_column]:
            raise DataError(f"{name}: a SQuAD file has no column {unknown[0]!r}; it has {', '.join(COLUMNS)}")
        rows = _read_squad(name, bool(answers), errors)
        named = id_column == "id"
    else:
        columns = [column for column in (question, context, answers, *others) if column]
        rows = read_rows(name, columns, options, errors)
        for row in rows:
            for reason in _find_problems(row.values, question, context, answers):
                errors.add(locate(name), row.line, reason)
        named = True
    for number, row in enumerate(rows, 1):
        row.id = row.id if named else str(number)
    good = errors.settle(name, rows, options)
    for row in good:
        if answers:
            row.values[answers] = _parse_answers(row.values[answers])
    return good


def _find_problems(values: dict[str, Any], question: str, context: str, answers: str) -> list[str]:
    """Return the reasons why a row with these columns is wrong."""
    reasons = []
    for column in (question, context):
        value = values[column]
        if not isinstance(value, str):
            reasons.append(f"{column!r} should be text, this is {value!r}")
        elif not value.strip():
            reasons.append(f"{column!r} is empty")
    if not answers or reasons:
        return reasons
    try:
        found = _parse_answers(values[answers])
    except DataError as error:
        return [f"{answers!r} {error}"]
    impossible = values.get("is_impossible")
    if impossible is True and found:
        reasons.append(f"is_impossible is true, yet there is the answer {found[0].text!r}")
    if impossible is False and not found:
        reasons.append("is_impossible is false, yet there is no answer")
    return reasons + [reason for answer in found if (reason := _check_span(answer, values[context]))]


def _parse_answers(value: Any) -> list[Answer]:
    """Return the answers of either form; DataError, with the reason alone, says the right form."""
    wanted = 'should be {"text": [..], "answer_start": [..]} or a list of {"text": .., "answer_start": ..}'
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise DataError(f"{wanted}, this is {_shorten(value)}")
        if len(texts) != len(starts):
            raise DataError(f"has {len(texts)} texts and {len(starts)} starts")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(item, Answer) for item in value):
        pairs = [(item.text, item.start) for item in value]  # of rows that this reader made, in memory
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("text"), item.get("answer_start")) for item in value]
    else:
        raise DataError(f"{wanted}, this is {_shorten(value)}")
    for text, start in pairs:
        if not isinstance(text, str) or type(start) is not int:
            raise DataError(f"{wanted}, with text and whole numbers; this is {text!r} at {start!r}")
    return [Answer(text, start) for text, start in pairs]


def _check_span(answer: Answer, context: str) -> str:
    """Return why the answer is not a span of its context; "" where it is one."""
    text, start = answer
    if not text.strip():
        return "an answer is empty; a question without an answer has an empty list of answers"
    if start >= 0 and context[start : start + len(text)] == text:
        return ""
    if not 0 <= start < len(context):
        what = f"answer_start {start} is outside the context, which has {len(context):,} characters"
    else:
        what = f"the context has {context[start : start + len(text)]!r} at {start}, not the answer {text!r}"
    found = context.find(text)
    return f"{what}; {'it is nowhere in it' if found < 0 else f'it is at {found}, counted in characters from 0'}"


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# SQuAD's json: {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}


def _read_squad(name: str, labelled: bool, errors: ErrorList) -> list[Row]:
    """Return rows with COLUMNS. DataError at once for a file that is no JSON, or not of this form."""
    rows: list[Row] = []
    locations: dict[str, str] = {}
    for location, title, context, entry in _iterate_questions(name, _read_json(name)):
        number = len(rows) + 1
        values = {"title": title, "context": context, "question": None, "answers": None, **entry}
        key = values.get("id")
        if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
            reasons = [f"an id should be text or a number, this is {key!r}"]
        else:
            row = Row(str(key), number, values)
            other = locations.setdefault(row.id, location)
            reasons = [f"{other} has this id too"] if other != location else []
            location = f"question {row.id}"
        missing = [column for column in ("question", "answers")[: 1 + labelled] if values[column] is None]
        reasons += [f"no {column!r}" for column in missing]
        if not missing:
            reasons += _find_problems(values, "question", "context", "answers" if labelled else "")
        # Added without a line number: here the location is a question.
        errors.found += [(number, f"{locate(name)}: {location}: {reason}") for reason in reasons]
        rows.append(Row(str(key), number, values))
    if not rows:
        raise DataError(f"{name}: no questions")
    return rows


def _read_json(name: str) -> Any:
    path = locate(name)
    try:
        raw = path.read_bytes()
        values = parse_json(raw.decode("utf-8-sig"))
        if b"\\u" in raw:  # an escape can name half of a surrogate pair, which no UTF-8 file can hold
            json.dumps(values, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: this is a folder; name a file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = _locate_byte(path, raw, error.start)
        raise DataError(f"{line}: not UTF-8 ({raw[error.start]:#04x} at byte {error.start} of the file)") from None
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(f"{path}: \\u{half:04x} is half of a surrogate pair, not a character") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    return values


def _locate_byte(path: Path, raw: bytes, byte: int) -> str:
    """Return `file:line` of a byte."""
    return f"{path}:{raw.count(bytes([10]), 0, byte) + 1}"


def _iterate_questions(name: str, values: Any) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (location in the file, title, context, question object); DataError for a file of another form."""

    def member(value: Any, key: str, kind: type, location: str) -> Any:
        found = value.get(key) if isinstance(value, dict) else None
        if not isinstance(found, kind):
            actual = (
                f"an object with {_shorten(list(value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
            )
            wanted = "a list" if kind is list else "text"
            raise DataError(f"{name}: {location} should have {key!r}, {wanted}, as a SQuAD file does; this is {actual}")
        return found

    for i, article in enumerate(member(values, "data", list, "the file")):
        title = article.get("title", "") if isinstance(article, dict) else ""
        for j, paragraph in enumerate(member(article, "paragraphs", list, f"data[{i}]")):
            location = f"data[{i}].paragraphs[{j}]"
            context = member(paragraph, "context", str, location)
            for k, entry in enumerate(member(paragraph, "qas", list, location)):
                member(entry, "question", str, f"{location}.qas[{k}]")
                yield f"{location}.qas[{k}]", title, context, entry
