"""The names of classes: which spellings mean one class, which classes a file has, and the class of each row.

A file's values become the names of classes in two steps. `find_label_names` chooses the names from the training file,
where they are not declared. `check_label_names` then writes into each row of a file the name that its value means, for
training, evaluation and test files alike, so that a spelling means the same class everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import MEMORY, BadRowsError, DataError, ErrorList
from data.label_spelling import (
    as_text,
    canonical_label,
    describe_difference,
    is_number,
    label_name,
    quote_apart,
    similar_key,
)
from data.label_warnings import warn_of_classes
from data.notes import list_some
from data.row import LeftOut, Row, Rows


@dataclass
class Spelling:
    """How often a value occurs in a file, and where first."""

    count: int = 0
    line: int = 0


def sort_labels(found: Iterable[str]) -> list[str]:
    """Return the names sorted as text, or as numbers where all are numbers."""
    names = sorted(found)
    numeric = all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names)
    return sorted(names, key=float) if numeric else names


def count_spellings(rows: Iterable[Row], column: str) -> dict[str, Spelling]:
    """Return {value as text: how often and where it occurs} for a column."""
    found: dict[str, Spelling] = {}
    for row in rows:
        count_spelling(found, as_text(row.values[column]), row.line)
    return found


def count_spelling(found: dict[str, Spelling], text: str, line: int) -> None:
    """Count one more occurrence of a value."""
    spelling = found.get(text)
    if spelling is None:
        found[text] = Spelling(1, line)
    else:
        spelling.count += 1


def count_classes(spellings: Mapping[str, Spelling]) -> dict[str, int]:
    """Return {name: number of its values} of the classes that the spellings mean, sorted.

    A class that is written in several ways has the name that occurs most; of equally many, the canonical form, else the
    first when sorted.
    """
    by_key: dict[str, dict[str, int]] = {}
    for text, spelling in spellings.items():
        names = by_key.setdefault(canonical_label(text), {})
        names[label_name(text)] = names.get(label_name(text), 0) + spelling.count
    counts = {
        min(names, key=lambda name: (-names[name], name != key, name)): sum(names.values())
        for key, names in by_key.items()
    }
    return {name: counts[name] for name in sort_labels(counts)}


def match_labels(found: Iterable[str], labels: Sequence[str]) -> dict[str, str]:
    """Return {value as text: its label} for the values that certainly mean one of `labels`.

    A value means the label that it equals, else the only one with the same canonical form. If none of the values means
    a label so, and all are whole numbers from 0 below the number of labels, they are indices of `labels`, unless labels
    are numbers themselves.
    """
    found = list(found)
    known, by_key = set(labels), dict[str, list[str]]()
    for label in labels:
        by_key.setdefault(canonical_label(label), []).append(label)
    matched = {}
    for text in found:
        same = by_key.get(canonical_label(text), [])
        if text in known:
            matched[text] = text
        elif (name := label_name(text)) in known:
            matched[text] = name
        elif len(same) == 1:
            matched[text] = same[0]
    if matched or any(is_number(label) for label in labels):
        return matched
    places = {text: canonical_label(text) for text in found}
    if all(re.fullmatch("[0-9]{1,9}", place) and int(place) < len(labels) for place in places.values()):
        return {text: labels[int(place)] for text, place in places.items()}
    return {}


def describe_matches(matched: Mapping[str, str], spellings: Mapping[str, Spelling], unit: str = "line") -> list[str]:
    """Return a note on the values that are written differently from their labels; [] where there are none.

    unit: what the row numbers count, such as "line".
    """
    different = {text: label for text, label in matched.items() if text != label}
    places = [text for text in different if canonical_label(text) != canonical_label(matched[text])]
    if places:
        shown = [f"{text} is {matched[text]!r} ({spellings[text].count:,})" for text in sort_labels(places)]
        return [f"the labels are whole numbers, read as indices of the label names, from 0: {list_some(shown)}"]
    shown = [
        f"{quote_apart(text, label)} ({spellings[text].count:,}, first in {unit} {spellings[text].line}) is read as "
        f"the label {quote_apart(label, text)}"
        for text, label in sorted(different.items())
    ]
    return [list_some(shown, 5, "; ")] if shown else []


def check_unknown(
    name: str,
    spellings: Mapping[str, Spelling],
    matched: Mapping[str, str],
    labels: Sequence[str],
    hint_at: Callable[[str], str] = lambda text: "",
    kind: type[DataError] = DataError,
) -> None:
    """Raise one DataError for the values that are none of `labels`, a line for each value.

    hint_at: returns what may be wrong with a value, "" where it cannot be told. kind: the class of the error.
    """
    unknown = {text: spelling for text, spelling in spellings.items() if text not in matched}
    known = f"the labels are {list_some([repr(label) for label in labels])}"
    similar = {similar_key(label): label for label in labels} if unknown else {}
    errors = ErrorList()
    if len(unknown) > 3 and not matched:
        shown = list_some([f"{text!r} ({spelling.count:,})" for text, spelling in unknown.items()], 5)
        first = min(spelling.line for spelling in unknown.values())
        errors.add(name, first, f"none of the labels is known: {shown}; {known}{_hint_at_places(unknown, labels)}")
    else:
        for text, spelling in unknown.items():
            often = f" in {spelling.count:,} rows" if spelling.count > 1 else ""
            hint = hint_at(text) or hint_at_similar(text, similar) or _hint_at_places([text], labels)
            hint = hint or _hint_at_commas(text, labels)
            hint = "; -1 is often written where there is no label" if canonical_label(text) == "-1" else hint
            errors.add(name, spelling.line, f"unknown label {text!r}{often}; {known}{hint}")
    errors.raise_if_any(kind)


def _hint_at_commas(text: str, labels: Sequence[str]) -> str:
    """Return the way to name a label with commas whose parts are `labels`, as on a command line without quotes."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not set(parts) <= set(labels):
        return ""
    return f"; a label with a comma has quotes: data.labels = '[\"{text}\", ...]'"


def hint_at_similar(text: str, similar: Mapping[str, str]) -> str:
    """Return how an unknown value differs from the label that it looks like; "" where there is none.

    similar: {similar_key(label): label}.
    """
    label = similar.get(similar_key(text))
    if label is None:
        return ""
    return f"; {quote_apart(text, label)} and {quote_apart(label, text)} {describe_difference(text, label)}"


def _hint_at_places(found: Iterable[str], labels: Sequence[str]) -> str:
    if all(canonical_label(text).isdecimal() for text in found) and not any(map(is_number, labels)):
        return f"; numbers are read as indices of the names if all are from 0 to {len(labels) - 1}"
    return ""


def find_label_names(name: str, rows: Sequence[Row], column: str, declared: Sequence[str]) -> list[str]:
    """Return the classes: those declared, else those found, sorted. DataError where fewer than two occur."""
    spellings = count_spellings(rows, column)
    classes = count_classes(spellings)
    all_declared = not declared or match_labels(spellings, declared).keys() == spellings.keys()
    if len(classes) < 2 and all_declared:  # else check_label_names says which is unknown, and where
        where = name.removeprefix(MEMORY)
        raise DataError(f"{where}: column {column!r} has only one class, {next(iter(classes))!r}; training needs two")
    return list(declared) or list(classes)


def warn_of_labels(rows: Sequence[Row], column: str, none: str = "") -> list[str]:
    """Return warnings on the classes of a training file that are probably not what it means.

    none: a class that is known to mean that there is none, such as NA.
    """
    return warn_of_classes(count_classes(count_spellings(rows, column)), column, none)


def check_label_names(
    name: str, rows: Rows, column: str, labels: Sequence[str], unit: str = "line", skips: bool = False
) -> None:
    """Write into each row the label that its value means, and note what was written differently.

    unit: what the row numbers count, in a note. skips: whether rows with values that are none of `labels` are left out,
    if others are one; else they are one BadRowsError.
    """
    spellings = count_spellings(rows, column)
    matched = match_labels(spellings, labels)
    if skips and matched:
        _leave_out_unknown(rows, column, spellings, matched)
    check_unknown(name, spellings, matched, labels, kind=BadRowsError if matched else DataError)
    for row in rows:
        row.values[column] = matched[as_text(row.values[column])]
    rows.notes += describe_matches(matched, spellings, unit)


def _leave_out_unknown(rows: Rows, column: str, spellings: dict[str, Spelling], matched: Mapping[str, str]) -> None:
    """Take the rows whose value is not in `matched`, and these values, out; say so in a note."""
    unknown = {text: spellings.pop(text) for text in list(spellings) if text not in matched}
    if not unknown:
        return
    total = len(rows)
    bad = [row for row in rows if as_text(row.values[column]) in unknown]
    rows[:] = [row for row in rows if as_text(row.values[column]) not in unknown]
    rows.left_out += [LeftOut(row.id, row.line, f"unknown label {as_text(row.values[column])!r}") for row in bad]
    rows.left_out.sort(key=lambda row: row.line)
    shown = list_some([f"{text!r} ({spelling.count:,})" for text, spelling in unknown.items()], 5)
    rows.notes.append(f"{len(bad):,} of {total:,} rows left out, whose labels are unknown: {shown}")


def class_numbers(rows: Sequence[Row], column: str, labels: Sequence[str]) -> np.ndarray:
    """Return (N,) int64, the index of each row's label in `labels`. The rows have been checked."""
    number = {label: i for i, label in enumerate(labels)}
    found = [as_text(row.values[column]) for row in rows]
    if not number.keys() >= set(found):  # rows that check_label_names has not seen
        number = {text: number[label] for text, label in match_labels(dict.fromkeys(found), labels).items()}
    return np.array([number[text] for text in found], dtype=np.int64)
