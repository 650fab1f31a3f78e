"""Questions about contexts: SQuAD's json files (versions 1 and 2), and rows -> rows with checked answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.answers import START, Answer, read_answers, shorten
from data.formats.json_files import read_document
from data.formats.lines import TextFile, locate, read_whole, suffix_of
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.rows import read_rows
from data.label_lists import parse_flag
from data.notes import count_of
from data.row import Row, Rows

__all__ = ["Answer", "read_questions"]

# The columns that the rows of a SQuAD file have.
COLUMNS = ("id", "title", "context", "question", "answers", "is_impossible")


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

    - format "squad" is SQuAD's nested form, version 1 or 2 (CMRC 2018 and DRCD have it too). So is, with auto, a .json
      file whose objects have "paragraphs" or "qas".
    - Any other file is read by read_rows. Its answers are {"text": [..], "answer_start": [..]},
      [{"text": .., "answer_start": ..}, ..], or texts, with starts in a column `answer_start` or without any.

    An answer without a start is read where it occurs in its context once; the notes count them.
    answers: "" for a file without answers, or where they should not be read. others: further required columns.
    Raises one DataError with all errors: `file:line: reason` in rows, `file: question ID: reason` in
    SQuAD's files, where a line has thousands of questions.
    """
    errors = ErrorList()
    id_column = options.id_column
    articles = _read_nested(name, options)
    if articles is not None:
        wanted = [column for column in (question, context, answers, *others, id_column) if column]
        if unknown := [column for column in wanted if column not in COLUMNS and column != id_column]:
            raise DataError(f"{name}: a SQuAD file has no column {unknown[0]!r}; it has {', '.join(COLUMNS)}")
        rows, places = _flatten(name, articles, bool(answers), errors)
        if id_column != "id":
            for row in rows:
                row.id = str(row.line)
    else:
        columns = [column for column in (question, context, answers, *others) if column]
        rows = read_rows(name, columns, options.also_reading((START, "is_impossible", "title")), errors)
        places = {}
    checks = _Checks(name, errors, question, context, answers)
    for row in rows:
        if row.line not in errors.reasons:
            checks.check(row, places.get(row.line, ""))
    errors.notes += checks.describe()
    return errors.settle(rows, options)


class _Checks:
    """The checks of a file's questions, and the counts of what was read in a form that leaves a guess."""

    def __init__(self, name: str, errors: ErrorList, question: str, context: str, answers: str):
        self.name, self.errors = name, errors
        self.question, self.context, self.answers = question, context, answers
        self.num_located = self.num_emptied = 0
        self.first_located = self.first_emptied = ""

    def check(self, row: Row, place: str) -> None:
        """Put the checked answers into the row, or add its errors. place: of the question, where it is not a line."""
        path = locate(self.name)
        values, empty = row.values, []
        for column in (self.question, self.context):
            if not isinstance(values[column], str):
                self.errors.add(path, row.line, f"{column!r} should be text, not {values[column]!r}", place=place)
            elif not values[column].strip():
                empty.append(column)
                self.errors.add(path, row.line, f"{column!r} is empty", place=place, is_empty=True)
        if not self.answers or empty or row.line in self.errors.reasons:
            return
        try:
            found = read_answers(values[self.answers], values[self.context], values.get(START))
        except DataError as error:
            self.errors.add(path, row.line, str(error), place=place)
            return
        impossible = parse_flag(values.get("is_impossible"))
        if impossible is True and found.answers:
            reason = f"is_impossible is true, yet there is the answer {found.answers[0].text!r}"
            self.errors.add(path, row.line, reason, place=place)
        if impossible is False and not found.answers:
            self.errors.add(path, row.line, "is_impossible is false, yet there is no answer", place=place)
        values[self.answers] = found.answers
        where = place or f"{self.errors.unit or 'line'} {row.line}"
        self.num_located += found.num_located
        self.num_emptied += found.is_emptied
        self.first_located = self.first_located or (where if found.num_located else "")
        self.first_emptied = self.first_emptied or (where if found.is_emptied else "")

    def describe(self) -> list[str]:
        """Return a sentence for each kind of answer that was read in a form that leaves a guess."""
        notes = []
        if self.num_located:
            read = "read at the only place where the context has the text"
            notes.append(
                f"{count_of(self.num_located, 'answer')} without a start, {read} (the first: {self.first_located})"
            )
        if self.num_emptied:
            read = "with an empty answer at a negative start, read as without an answer"
            notes.append(f"{count_of(self.num_emptied, 'question')} {read} (the first: {self.first_emptied})")
        return notes


# SQuAD's json: {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}


def _read_nested(name: str, options: FileOptions) -> Any:
    """Return the value of a file in SQuAD's nested form; None for a file of rows, which another reader reads.

    DataError, with format "squad", for a file that is no JSON; with auto that is a matter of the other reader.
    """
    if is_in_memory(name) or options.format not in ("squad", "auto"):
        return None
    if options.format == "squad":
        return read_document(name, options)
    path = locate(name)
    if suffix_of(path) != ".json" or not path.is_file():
        return None
    # In a text inside the JSON a quote is escaped, so these are keys.
    raw = read_whole(path) if path.suffix.lower() == ".json" else TextFile(path, options).text().encode()
    if not any(key.encode() in raw or key.encode("utf-16-le") in raw for key in ('"paragraphs"', '"qas"')):
        return None
    try:
        values = read_document(name, options)
    except DataError as error:
        if "Extra data" in str(error):
            return None  # an object a line
        raise
    items = values.get("data") if isinstance(values, dict) else values
    first = items[0] if isinstance(items, list) and items else None
    return values if isinstance(first, dict) and {"paragraphs", "qas"} & first.keys() else None


def _flatten(name: str, values: Any, labelled: bool, errors: ErrorList) -> tuple[list[Row], dict[int, str]]:
    """Return (rows with COLUMNS, whose lines are the numbers of the questions; {number: the place to name}).

    DataError at once for a file that is not of this form.
    """
    rows: list[Row] = []
    places: dict[int, str] = {}
    locations: dict[str, str] = {}
    number = 0
    for location, title, context, entry in _iterate_questions(name, values):
        number += 1
        if not isinstance(entry, dict):
            errors.broken[number] = str(number)
            reason = f"a question should be an object, not {shorten(entry)}"
            errors.add(locate(name), number, reason, place=location)
            continue
        columns = {"question": entry.get("query_text"), "id": entry.get("query_id"), "answers": None}
        row = Row(str(number), number, {"title": title, "context": context, **columns, **entry})
        rows.append(row)
        key, place, reasons = row.values["id"], location, []
        if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
            reasons.append(f"an id should be text or a number, not {key!r}")
        else:
            row.id, place = str(key), f"question {key}"
            other = locations.setdefault(row.id, location)
            reasons += [f"{other} has this id too"] if other != location else []
        places[number] = place
        if labelled and row.values["answers"] is None and row.values.get("is_impossible") is True:
            row.values["answers"] = []
        missing = [column for column in ("question", "answers")[: 1 + labelled] if row.values[column] is None]
        for reason in reasons + [f"no {column!r}" for column in missing[:1]]:
            errors.add(locate(name), number, reason, place=place)
    if not number:
        raise DataError(f"{name}: no questions")
    return rows, places


def _iterate_questions(name: str, values: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (location in the file, title, context, question object); DataError for a file of another form.

    CMRC 2018 leaves "paragraphs" out: each object is a paragraph, of "context_text", "query_text" and "query_id".
    """

    def members(value: Any, key: str, location: str) -> list[Any]:
        found = value.get(key) if isinstance(value, dict) else None
        if not isinstance(found, list):
            keys = f"an object with {shorten(list(value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
            is_row = isinstance(value, dict) and "question" in value
            hint = "; leave data.format out, since these are rows" if is_row else ""
            raise DataError(
                f"{name}: {location} should have {key!r}, a list, as a SQuAD file does; this is {keys}{hint}"
            )
        return found

    is_list = isinstance(values, list)
    for i, article in enumerate(values if is_list else members(values, "data", "the file")):
        where = f"[{i}]" if is_list else f"data[{i}]"
        is_paragraph = isinstance(article, dict) and "qas" in article
        title = article.get("title", "") if isinstance(article, dict) else ""
        for j, paragraph in enumerate([article] if is_paragraph else members(article, "paragraphs", where)):
            location = where if is_paragraph else f"{where}.paragraphs[{j}]"
            questions = members(paragraph, "qas", location)
            context = paragraph.get("context", paragraph.get("context_text"))
            for k, entry in enumerate(questions):
                yield f"{location}.qas[{k}]", title, context, entry
