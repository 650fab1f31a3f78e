"""Targets of texts with several labels each: rows of 0 and 1. The texts are encoded by data/text_classification.py.

A reader makes each cell of the label column a list of names (`read_label_sets`, or `read_label_columns` for a file with
a column for each label). `check_label_set_names` then writes the labels that the names mean.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from data.errors import DataError, ErrorList
from data.label_lists import ESCAPES, parse_flag, parse_list_text, split_labels
from data.label_warnings import find_combined, warn_of_label_sets
from data.labels import (
    Spelling,
    check_unknown,
    count_classes,
    count_spelling,
    describe_matches,
    match_labels,
)
from data.notes import count_of, list_some
from data.row import Row, Rows

ALWAYS_SEPARATORS = ("|", "\t", "\n")  # refused in a label unless data.label_separator is given
MAYBE_SEPARATORS = (",", ";", "/", "&", "+", "#", " ")  # usual within a label too; commas only in lists
MEMBERS = ("label", "labels", "name", "text", "value", "category", "tag")  # of objects, where labels are


def read_label_sets(name: str, rows: Sequence[Row], column: str, errors: ErrorList, separator: str = "") -> None:
    """Make the label cell of each row a list of names; add rows whose cell cannot be read to `errors`.

    Lists as text are read, empty labels and repetitions in a cell are left out; all of these are noted.
    """
    listed, empty, twice = (list[Row]() for _ in range(3))
    mark, is_separated = ESCAPES.get(separator, separator), not separator
    for row in rows:
        value = row.values[column]
        if isinstance(value, str) and (items := parse_list_text(value)) is not None:
            listed.append(row)
            value = items
        is_separated = is_separated or any(mark in item for item in _texts_of(value))
        try:
            names = split_labels(value, separator)
        except DataError as error:
            errors.add(name, row.line, f"{error}{_hint_at_member(value, column)}")
            continue
        if "" in names:
            empty.append(row)
            names = [label for label in names if label]
        if len(names) > 1 and len(set(names)) < len(names) and not _are_flags(names):
            twice.append(row)
            names = list(dict.fromkeys(names))
        row.values[column] = names
    for found, noun, what in (
        (listed, "list", "as text, read as such"),
        (empty, "cell", "with an empty label, which is left out"),
        (twice, "cell", "with a label twice, which counts once"),
    ):
        if found:
            errors.notes.append(f"{column!r} has {count_of(len(found), noun)} {what}, first in line {found[0].line}")
    if not is_separated:
        errors.notes.append(f"warning: data.label_separator = {separator!r} is in no cell of {column!r}")


def _texts_of(value: object) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _hint_at_member(value: object, column: str) -> str:
    """Return the setting that reads the labels from objects with one member, or one of MEMBERS; "" for none."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return ""
    members = list(dict.fromkeys(str(key) for item in value for key in item))
    usual = [key for key in members if key in MEMBERS] if len(members) > 1 else members
    return f'; data.label_column = "{column}.{usual[0]}" reads them' if len(usual) == 1 else ""


def read_label_columns(columns: Sequence[str], name: str, rows: Sequence[Row], column: str, errors: ErrorList) -> None:
    """Make `column` of each row the list of those `columns` that are 1 or true; other values than 0 are errors."""
    for row in rows:
        flags = [parse_flag(row.values[label]) for label in columns]
        if None in flags:
            label = columns[flags.index(None)]
            reason = (
                f"column {label!r} should be 0 or 1, as it is a label of data.labels; this is {row.values[label]!r}"
            )
            errors.add(name, row.line, reason)
        row.values[column] = [label for label, flag in zip(columns, flags, strict=True) if flag]
    shown = list_some([repr(label) for label in columns], 5)
    errors.notes.append(f"there is no column {column!r}; the labels are read from the columns {shown}")


def find_flag_columns(row: Row, others: Collection[str]) -> list[str]:
    """Return the columns with 0 or 1 in a row, except `others`."""
    return [column for column, value in row.values.items() if column not in others and parse_flag(value) is not None]


def find_label_set_names(name: str, rows: Rows, column: str, declared: Sequence[str], separator: str = "") -> list[str]:
    """Return the classes: those declared, else all that occur, sorted; with notes on what looks wrong with them.

    DataError where none occurs, and for labels that data.labels or data.label_separator has to explain.
    """
    spellings = _count_spellings(rows, column)
    if not spellings:
        raise DataError(f"{name}: no row has a label in {column!r}; training needs at least one")
    if declared:
        return list(declared)
    if width := _flag_width(rows, column):
        raise DataError(
            f"{name}: {column!r} has {width} numbers 0 and 1 in each row; data.labels should name the {width} labels "
            "that they stand for, in their order"
        )
    counts = count_classes(spellings)
    if not separator:
        rows.notes += _check_separators(name, counts)
    rows.notes += warn_of_label_sets(counts, len(rows))
    return list(counts)


def check_label_set_names(name: str, rows: Rows, column: str, labels: Sequence[str]) -> None:
    """Make each row's names the labels that they mean, and note what was written differently.

    Rows with a 0 or 1 for each label become lists of labels. Raises one DataError for all names that are no label.
    """
    if (width := _flag_width(rows, column)) == len(labels) and not {"0", "1"} <= set(labels):
        for row in rows:
            flags = map(parse_flag, row.values[column])
            row.values[column] = [label for label, flag in zip(labels, flags, strict=True) if flag]
        rows.notes.append(f"{column!r} has {width} numbers 0 and 1 in each row, one for each label in their order")
        return
    # A reader leaves repetitions only in rows of 0 and 1.
    if wrong := next((row for row in rows if len(set(row.values[column])) < len(row.values[column])), None):
        found = f"{len(wrong.values[column])} numbers 0 and 1, such as {wrong.values[column]}"
        raise DataError(f"{name}:{wrong.line}: {found}: each row should have one for each of the {len(labels)} labels")
    spellings = _count_spellings(rows, column)
    matched = match_labels(spellings, labels)
    check_unknown(name, spellings, matched, labels, lambda text: _hint_at_separator(text, labels))
    for row in rows:
        row.values[column] = list(dict.fromkeys(matched[label] for label in row.values[column]))
    rows.notes += describe_matches(matched, spellings)


def multi_hot(rows: Sequence[Row], column: str, labels: Sequence[str]) -> np.ndarray:
    """Return (N, C) float32, 1 where the row has the label, else 0. The rows have been checked."""
    number = {name: i for i, name in enumerate(labels)}
    targets = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for i, row in enumerate(rows):
        targets[i, [number[label] for label in row.values[column]]] = 1
    return targets


def _count_spellings(rows: Sequence[Row], column: str) -> dict[str, Spelling]:
    found: dict[str, Spelling] = {}
    for row in rows:
        for label in row.values[column]:
            count_spelling(found, label, row.line)
    return found


def _are_flags(names: Sequence[str]) -> bool:
    return all(parse_flag(label) is not None for label in names)


def _flag_width(rows: Sequence[Row], column: str) -> int:
    """Return how many numbers 0 and 1 each row has, two at least; 0 where some row has anything else."""
    width = len(rows[0].values[column]) if rows else 0
    if width < 2 or any(len(row.values[column]) != width or not _are_flags(row.values[column]) for row in rows):
        return 0
    return width


def _hint_at_separator(text: str, labels: Sequence[str]) -> str:
    """Return the setting that splits a text into known labels; "" for none."""
    for separator in (*ALWAYS_SEPARATORS, *MAYBE_SEPARATORS):
        parts = [part for part in text.split(separator) if part.strip()]
        if len(parts) > 1 and match_labels(parts, labels).keys() == set(parts):
            return f"; data.label_separator = {json.dumps(separator)} splits it"
    return ""


def _check_separators(name: str, counts: Mapping[str, int]) -> list[str]:
    """Return warnings on labels that may be several; DataError where they certainly are."""
    warnings = []
    for separator in (*ALWAYS_SEPARATORS, *MAYBE_SEPARATORS):
        having = [label for label in counts if separator in label]
        example = find_combined(counts, separator)
        shown = json.dumps(separator)
        if separator in ALWAYS_SEPARATORS and example:
            raise DataError(
                f"{name}: labels such as {example!r} are several labels: data.label_separator = {shown} splits them, "
                'and data.label_separator = "," keeps them'
            )
        if example or (separator in ALWAYS_SEPARATORS and having):
            count = f"{len(having):,} of {len(counts):,} labels contain {separator!r}, such as {example or having[0]!r}"
            warnings.append(f"warning: {count}: data.label_separator = {shown} would split them")
    return warnings
