"""Targets of texts with several labels each: rows of 0 and 1. The texts are encoded by data/text_classification.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.errors import DataError, ErrorList
from data.labels import label_name, sort_labels
from data.row import Row

SEPARATORS = re.compile("[,;]")  # between labels in one field of text; names that contain one need a JSON list


def parse_label_set(value: Any) -> list[str]:
    """Return the labels of an example, perhaps none, from a list, or from text with commas or semicolons between them.

    Raises DataError, with the reason alone, for any other value.
    """
    if isinstance(value, str):
        value = SEPARATORS.split(value) if value.strip() else []
    elif isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"labels should be a list, or text with commas or semicolons between them, this is {value!r}")
    if wrong := [item for item in value if not isinstance(item, str | int | float) or item != item]:
        raise DataError(f"a label should be text or a number, this is {wrong[0]!r}")
    names = [label_name(item) for item in value]
    if "" in names:
        raise DataError(f"{value!r} has an empty label")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"the label {twice[0]!r} occurs twice")
    return names


def check_label_sets(name: str, rows: Sequence[Row], column: str, errors: ErrorList) -> None:
    """Add to `errors` every row whose labels cannot be parsed."""
    for row in rows:
        try:
            parse_label_set(row.values[column])
        except DataError as error:
            errors.add(name, row.line, str(error))


def find_label_set_names(name: str, rows: Sequence[Row], column: str, declared: Sequence[str]) -> list[str]:
    """Return the classes: those declared, else all that occur, sorted. DataError where none occurs."""
    found = {label for row in rows for label in parse_label_set(row.values[column])}
    if not found:
        raise DataError(f"{name}: no row has a label in {column!r}; training needs one at least")
    return list(declared) or sort_labels(found)


def check_label_set_names(name: str, rows: Sequence[Row], column: str, labels: Sequence[str]) -> None:
    """Raise one DataError for all labels that are not among `labels`."""
    errors, known = ErrorList(), set(labels)
    for row in rows:
        for label in parse_label_set(row.values[column]):
            if label not in known:
                errors.add(name, row.line, f"unknown label {label!r}; the labels are {', '.join(map(repr, labels))}")
    errors.raise_if_any()


def multi_hot(rows: Sequence[Row], column: str, labels: Sequence[str]) -> np.ndarray:
    """Return (N, C) float32, 1 where the row has the label, else 0. The rows have been checked."""
    number = {name: i for i, name in enumerate(labels)}
    targets = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for i, row in enumerate(rows):
        targets[i, [number[label] for label in parse_label_set(row.values[column])]] = 1
    return targets
