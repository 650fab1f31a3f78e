"""Targets of a text that are not one class: several labels, as rows of 0 and 1, or a number."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.errors import DataError, ErrorList
from data.formats.rows import Row
from data.text_classification import label_name, sort_labels

SEPARATORS = re.compile("[,;]")  # of labels in one field of text; names that contain one need a JSON list


def label_set(value: Any) -> list[str]:
    """The labels of an example, perhaps none: a list of them, or text with commas or semicolons between them.

    DataError with the reason alone where it is neither.
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
        raise DataError(f"an empty label in {value!r}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"the label {twice[0]!r} twice")
    return names


def check_label_sets(name: str, rows: Sequence[Row], column: str, errors: ErrorList) -> None:
    """Every row must have labels that label_set reads."""
    for row in rows:
        try:
            label_set(row.values[column])
        except DataError as error:
            errors.add(name, row.line, str(error))


def label_set_names(name: str, rows: Sequence[Row], column: str, declared: Sequence[str]) -> list[str]:
    """All labels that occur, in the order of sort_labels, or as declared; at least one must occur."""
    found = {label for row in rows for label in label_set(row.values[column])}
    if not found:
        raise DataError(f"{name}: no row has a label in {column!r}; there is nothing to learn")
    return list(declared) or sort_labels(found)


def check_known_labels(name: str, rows: Sequence[Row], column: str, labels: Sequence[str]) -> None:
    """Every label of every row must be one of `labels`; all that are not are reported together."""
    errors, known = ErrorList(), set(labels)
    for row in rows:
        for label in label_set(row.values[column]):
            if label not in known:
                errors.add(name, row.line, f"unknown label {label!r}; the labels are {', '.join(map(repr, labels))}")
    errors.raise_if_any()


def multi_hot(rows: Sequence[Row], column: str, labels: Sequence[str]) -> np.ndarray:
    """(N, C) float32: 1 where the row has the label, else 0. Rows have been checked before."""
    number = {name: i for i, name in enumerate(labels)}
    targets = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for i, row in enumerate(rows):
        targets[i, [number[label] for label in label_set(row.values[column])]] = 1
    return targets


def check_scores(name: str, rows: Sequence[Row], column: str, errors: ErrorList) -> None:
    """Every row must have a number, or text that is one, finite in fp32."""
    for row in rows:
        if math.isnan(_score(row.values[column])):
            errors.add(name, row.line, f"a score in {column!r} should be a number, this is {row.values[column]!r}")


def scores(rows: Sequence[Row], column: str) -> np.ndarray:
    """(N, 1) float32. Rows have been checked before."""
    return np.array([[_score(row.values[column])] for row in rows], dtype=np.float32).reshape(-1, 1)


def _score(value: Any) -> float:
    """NaN for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "_" in str(value):
        return math.nan  # Python would read 1_000 as a number
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= float(np.finfo(np.float32).max) else math.nan
