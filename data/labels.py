"""The names of classes, for every task that has classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from data.errors import DataError, ErrorList
from data.row import Row


def label_name(value: object) -> str:
    """Return the name of a label: JSON's true, 1 and "1" are 'true', '1' and '1'."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def sort_labels(found: Iterable[str]) -> list[str]:
    """Return the names sorted as text, or as numbers where all are numbers."""
    names = sorted(found)
    numeric = all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names)
    return sorted(names, key=float) if numeric else names


def find_label_names(name: str, rows: Sequence[Row], column: str, declared: Sequence[str]) -> list[str]:
    """Return the classes: those declared, else those found, sorted. DataError where fewer than two occur."""
    found = dict.fromkeys(label_name(row.values[column]) for row in rows)
    all_declared = not declared or found.keys() <= set(declared)  # else check_label_names says which, and where
    if len(found) < 2 and all_declared:
        raise DataError(f"{name}: column {column!r} has only one class, {next(iter(found))!r}; training needs two")
    return list(declared) or sort_labels(found)


def check_label_names(name: str, rows: Sequence[Row], column: str, labels: Sequence[str]) -> None:
    """Raise one DataError for all labels that are not among `labels`."""
    errors, known = ErrorList(), set(labels)
    for row in rows:
        if label_name(row.values[column]) not in known:
            reason = f"unknown label {row.values[column]!r}; the labels are {', '.join(map(repr, labels))}"
            errors.add(name, row.line, reason)
    errors.raise_if_any()
