"""Questions with choices, in the forms of public data sets -> rows of one form.

Files of rows are SWAG's (sent1, sent2, ending0 ...), HellaSwag's, RACE's (article, question, options, answer),
CommonsenseQA's and ARC's (choices with their keys, answerKey), or have other columns, which settings name. The files
that have several questions to a text are in choice_files.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.choice_files import Record, read_records
from data.formats.columns import describe_missing, name_all
from data.formats.options import FileOptions
from data.label_lists import parse_list_text
from data.notes import count_of
from data.row import Row, Rows

CHOICES = "choices"  # the column of the rows that are returned
# Names of columns in public data sets, where the file lacks the named one
CONTEXTS = ("sent1", "ctx_a", "article", "passage")
QUESTIONS = ("sent2", "ctx_b", "question_stem")
LABELS = ("answer", "answerKey")
LISTS = (CHOICES, "options", "endings", "choice")  # columns that have all choices of a row
_NUMBERED = re.compile(r"(ending|choice|option|answer)_?(\d+)")  # columns with a choice each
_NUMBER, _LETTER = re.compile(r"[-+]?\d{1,9}"), re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class ChoiceColumns:
    """The columns of a file. choices: one with a list, or one for each choice; label: "" without labels."""

    context: str
    question: str
    choices: tuple[str, ...]
    label: str


def read_choices(
    name: str,
    *,
    context: str = "context",
    question: str = "question",
    label: str = "label",
    choices: Sequence[str] = (),
    first_label: int = 0,
    group: str = "",
    options: FileOptions = FileOptions(),
) -> Rows:
    """Return rows with a text in `context` and in `question`, one of which may be "", and CHOICES, a list of texts.

    `label` is the number of the right choice from 0; "" without labels. In the file it is a number from first_label,
    a letter, the key of a choice, or its text. choices: the columns of the choices; (): found by their names.
    group: a column that is kept; where the file lacks it, it is the context, so that its questions stay together.
    Raises one DataError with all errors of the file.
    """
    errors = ErrorList()
    numbered = (f"{stem}{i}" for stem in ("ending", "choice", "option") for i in range(10))
    known = (*CONTEXTS, *QUESTIONS, *LABELS, *LISTS, *numbered, "questions", "answers")
    records = read_records(name, options, errors, (context, question, label, *choices, group, *known))
    names = dict.fromkeys(column for record in records for column in record.row.values)
    wanted = ChoiceColumns(context, question, tuple(choices), label)
    columns = _find_columns(name, list(names), wanted, options) if records else wanted
    if records and (note := _describe_columns(columns, wanted)):
        errors.notes.append(note)
    checks = _Checks(errors, columns, first_label)
    rows = []
    for record in records:
        row = record.row
        if row.line in errors.reasons:
            continue
        values = checks.check(record)
        found = {context: values[0], question: values[1], CHOICES: values[2]} | ({label: values[3]} if label else {})
        if group:
            found = {group: row.values.get(group) or values[0] or row.id} | found
        others = {column: row.values[column] for column in options.kept if column in row.values}
        rows.append(Row(row.id, row.line, others | found))
    errors.notes += checks.describe()
    if not rows and not errors:
        raise DataError(f"{name}: no rows")
    return errors.settle(rows, options)


# Columns


def _find_columns(name: str, names: Sequence[str], wanted: ChoiceColumns, options: FileOptions) -> ChoiceColumns:
    """Return the columns that a file has; DataError where it lacks one that is needed."""
    choices = wanted.choices or next(((column,) for column in LISTS if column in names), ())
    choices = choices or _find_numbered(names)
    defaults = ChoiceColumns("context", "question", (), "label")

    def find(column: str, default: str, others: Sequence[str]) -> str:
        candidates = (column, *others) if column == default else (column,)
        return next((other for other in candidates if other in names), "")

    context = find(wanted.context, defaults.context, CONTEXTS)
    question = find(wanted.question, defaults.question, QUESTIONS)
    label = find(wanted.label, defaults.label, LABELS) if wanted.label else ""
    missing = [column for column in wanted.choices if column not in names]
    if not choices or missing:
        column = missing[0] if missing else CHOICES
        hint = "multiple_choice.choice_columns names the column with the list of choices, or one for each choice"
        raise DataError(f"{name}: no column {column!r}; the columns are {name_all(names)}; {hint}")
    if not (context or question):
        raise DataError(f"{name}: {describe_missing(wanted.question, names, choices, options)}")
    if wanted.label and not label:
        raise DataError(f"{name}: {describe_missing(wanted.label, names, choices, options)}")
    for column, default in ((wanted.context, defaults.context), (wanted.question, defaults.question)):
        if column not in (default, *names):
            raise DataError(f"{name}: {describe_missing(column, names, choices, options)}")
    return ChoiceColumns(context, question, tuple(choices), label)


def _find_numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns ending0, ending1, ... or the like, in the order of their numbers; () for fewer than two."""
    stems: dict[str, list[tuple[int, str]]] = {}
    for column in names:
        if match := _NUMBERED.fullmatch(column):
            stems.setdefault(match[1], []).append((int(match[2]), column))
    found = next((numbered for numbered in stems.values() if len(numbered) > 1), [])
    return tuple(column for _, column in sorted(found))


def _describe_columns(columns: ChoiceColumns, wanted: ChoiceColumns) -> str:
    """Return a note with the columns that were found by other names; "" for none."""
    pairs = [(key, getattr(columns, key), getattr(wanted, key)) for key in ("context", "question", "label")]
    found = [f"the {key} in {ours!r}" for key, ours, theirs in pairs if ours and ours != theirs]
    if not wanted.choices and columns.choices != (CHOICES,):
        first, last = columns.choices[0], columns.choices[-1]
        found.append(f"the choices in {first!r}" + (f" to {last!r}" if last != first else ""))
    return f"read by the names of its columns: {', '.join(found)}" if found else ""


# Checks


class _Checks:
    """The checks of a file's rows, and the counts of what was read in a form that leaves a guess."""

    def __init__(self, errors: ErrorList, columns: ChoiceColumns, first_label: int):
        self.errors, self.columns, self.first_label = errors, columns, first_label
        self.counts = dict.fromkeys(("fewer", "equal", "text", "blank"), 0)

    def check(self, record: Record) -> tuple[str, str, list[str], int]:
        """Return (context, question, choices, number of the right choice); errors of the row are added."""
        path, row, place = record
        values, columns = row.values, self.columns
        before = len(self.errors)

        def add(reason: str, is_empty: bool = False) -> None:
            self.errors.add(path, row.line, reason, place=place, is_empty=is_empty)

        texts = [_read_text(values.get(column)) if column else "" for column in (columns.context, columns.question)]
        for column, text in zip((columns.context, columns.question), texts, strict=True):
            if text is None:
                add(f"{column!r} should be text, not {values[column]!r:.80}")
        context, question = (text or "" for text in texts)
        if None not in texts and not (context.strip() or question.strip()):
            add(f"{columns.question or columns.context!r} is empty", is_empty=True)
        try:
            choices, keys = self._read_choices(values)
        except DataError as error:
            add(str(error))
            return context, question, [], 0
        if reason := _find_fault(choices):
            add(reason)
        right = 0
        if columns.label and len(self.errors) == before:
            try:
                right = self._find_right(values.get(columns.label), choices, keys)
            except DataError as error:
                add(str(error))
        self.counts["equal"] += len(set(map(str.strip, choices))) < len(choices) and len(self.errors) == before
        self.counts["blank"] += "_" in question and bool(context.strip())
        return context, question, choices, right

    def _read_choices(self, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return the choices of a row, and their keys ([]: none); DataError for a value that has none."""
        columns = self.columns.choices
        if len(columns) == 1:
            return read_choice_list(values.get(columns[0]), columns[0])
        cells = [values.get(column) for column in columns]
        while len(cells) > 2 and (cells[-1] is None or not str(cells[-1]).strip()):
            cells.pop()
        self.counts["fewer"] += len(cells) < len(columns)
        return [_as_choice(cell, column) for cell, column in zip(cells, columns, strict=False)], []

    def _find_right(self, value: Any, choices: Sequence[str], keys: Sequence[str]) -> int:
        right, by_text = find_right_choice(value, choices, keys, self.first_label)
        self.counts["text"] += by_text
        if [choice.strip() for choice in choices].count(choices[right].strip()) > 1:
            raise DataError(f"the right choice, {choices[right]!r:.80}, is there twice")
        return right

    def describe(self) -> list[str]:
        """Return a sentence for each kind of row that leaves a guess."""
        counts = self.counts
        found = (
            ("fewer", "fewer choices than columns: the last ones are empty"),
            ("equal", "two equal choices, both wrong"),
            ("text", "the text of the right choice as label"),
            ("blank", "a blank, _, in the question, where each choice is read"),
        )
        return [
            f"{count_of(counts[kind], 'row')} {'has' if counts[kind] == 1 else 'have'} {what}"
            for kind, what in found
            if counts[kind]
        ]


def _read_text(value: Any) -> str | None:
    """Return a text, or the lines of one; None for a value that is neither. null is no text, ""."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return "" if value is None else value if isinstance(value, str) else None


def read_choice_list(value: Any, column: str) -> tuple[list[str], list[str]]:
    """Return (choices, keys) of a list of texts, of objects with a key and a text, or of {"label": [], "text": []}.

    {key: text} and lists as text are read too. Raises DataError, with the reason alone, for any other value.
    """
    given, value = value, parse_list_text(value) if isinstance(value, str) else value
    if isinstance(value, dict) and isinstance(texts := value.get("text"), list):
        keys = value.get("label") or []
        if not isinstance(keys, list):
            raise DataError(f"the labels in {column!r} should be a list, not {keys!r:.80}")
        if keys and len(keys) != len(texts):
            raise DataError(f"{column!r} has {len(texts)} texts and {len(keys)} labels")
        value = {"keys": keys, "texts": texts}
    elif isinstance(value, dict) and value:
        value = {"keys": [*value], "texts": [*value.values()]}
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "text" in item for item in value):
        keys = [item["label"] for item in value if "label" in item]
        value = {"keys": keys if len(keys) == len(value) else [], "texts": [item["text"] for item in value]}
    elif isinstance(value, list):
        value = {"keys": [], "texts": value}
    else:
        raise DataError(f"{column!r} should be a list of choices, not {given!r:.80}")
    return [_as_choice(item, column) for item in value["texts"]], [str(key).strip() for key in value["keys"]]


def _as_choice(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"a choice in {column!r} should be text, not {value!r:.80}")
    return str(value)


def _find_fault(choices: Sequence[str]) -> str:
    """Return why a row cannot be answered from these choices; "" where it can."""
    if empty := [i for i, choice in enumerate(choices) if not choice.strip()]:
        return f"choice {empty[0] + 1} of {len(choices)} is empty"
    if len(choices) < 2:
        return f"{'one choice' if choices else 'no choices'}; a row needs two or more"
    if len({choice.strip() for choice in choices}) == 1:
        return f"all {len(choices)} choices are equal"
    return ""


def find_right_choice(value: Any, choices: Sequence[str], keys: Sequence[str], first_label: int) -> tuple[int, bool]:
    """Return (the number of the right choice from 0, whether the label was its text); DataError for another label."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f"no label: {json.dumps(value, default=repr):.80}")
    count = len(choices)
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    if keys.count(text) > 1:
        raise DataError(f"label {value!r:.80} is the key of {keys.count(text)} choices")
    if text in keys:
        return keys.index(text), False
    if _NUMBER.fullmatch(text):
        number = int(text) - first_label
        if 0 <= number < count:
            return number, False
        hint = "; -1 marks rows without a label, as in SWAG's test file" if text == "-1" else ""
        hint = "; multiple_choice.first_label = 1 counts from 1" if number == count and not first_label else hint
        known = f"numbered from {first_label} to {first_label + count - 1}"
        raise DataError(f"label {value!r:.80} is none of the {count} choices, {known}{hint}")
    if keys:
        raise DataError(f"label {value!r:.80} is none of the {count} choices, {', '.join(keys)}")
    same = [i for i, choice in enumerate(choices) if choice.strip() == text]
    letter = ord(text.upper()) - ord("A") if _LETTER.fullmatch(text) else count
    if letter < count and same and same != [letter]:
        raise DataError(f"label {value!r} is the letter of one choice and the text of another")
    if letter < count:
        return letter, False
    if not same:
        known = f"A to {chr(ord('A') + count - 1)}" if _LETTER.fullmatch(text) else "nor a number or a letter"
        raise DataError(f"label {value!r:.80} is none of the {count} choices, {known}")
    return same[0], True
