"""Warnings on the classes of a training file that are probably not what the file means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from data.label_spelling import describe_difference, is_number, quote_apart, similar_key

# Names, without case, that programs write where a value is missing.
MISSING = {
    *("nan", "none", "null", "nil", "nat", "n/a", "na", "<na>", "#n/a", "#na", "undefined"),
    *("-", "--", "?", "."),
}
FEW_ROWS = 20  # too few to say that there are many classes for them
MANY_NUMBERS = 50  # classes that are numbers: more are probably measurements
SHOWN = 5  # pairs of names in a warning
LABEL_SEPARATORS = (",", ";", "|", "\uff0c", "\u3001", "\uff1b", "\t", "\n")


def warn_of_classes(counts: Mapping[str, int], column: str, none: str = "") -> list[str]:
    """Return warnings on the classes {name: rows} that were found in a column, which has one class a row.

    none: a class that is known to mean that there is none.
    """
    missing = _warn_of_missing({name: count for name, count in counts.items() if name != none})
    others = 'if so, data.labels names the others, and data.bad_rows = "skip" leaves such rows out'
    missing = [f"{warning}; {others}" for warning in missing]
    warnings = [*warn_of_similar(counts), *missing, *_warn_of_many(counts, column)]
    if header := next((name for name in counts if name.casefold() == column.casefold()), ""):
        warnings.append(f"warning: the class {header!r} ({counts[header]:,}) is the name of its column: a header?")
    combined = [name for name in counts if any(separator in name for separator in LABEL_SEPARATORS)]
    for separator in LABEL_SEPARATORS:
        if example := find_combined(counts, separator):
            warnings.append(
                f"warning: {len(combined):,} of {len(counts):,} classes are several labels, such as {example!r}: "
                'run.task = "multi-label-classification" reads them as such'
            )
            break
    return warnings


def warn_of_label_sets(counts: Mapping[str, int], num_rows: int) -> list[str]:
    """Return warnings on the labels {name: rows} of rows with several labels each."""
    warnings = [*warn_of_similar(counts), *_warn_of_missing(counts)]
    if constant := [name for name, count in counts.items() if count == num_rows]:
        warnings.append(f"warning: every row has the label {', '.join(map(repr, constant[:SHOWN]))}")
    return warnings


def find_combined(names: Mapping[str, int] | Sequence[str], separator: str) -> str:
    """Return a name that is several labels with `separator` between them, as far as the names show it; else "".

    The names show it if the parts of one name are names themselves, or if two or more names have no more different
    parts than there are names.
    """
    known = set(names)
    parts = {name: [part.strip() for part in name.split(separator)] for name in names}
    combined = [name for name in names if len(parts[name]) > 1 and all(parts[name])]
    different = {part for name in names for part in parts[name]}
    if len(combined) > 1 and len(different) <= len(known):
        return combined[0]
    return next((name for name in combined if known.issuperset(parts[name])), "")


def warn_of_similar(counts: Mapping[str, int], noun: str = "classes") -> list[str]:
    """Return a warning for each pair of names that look like one."""
    by_key: dict[str, list[str]] = {}
    for name in counts:
        by_key.setdefault(similar_key(name), []).append(name)
    pairs = [names for names in by_key.values() if len(names) > 1]
    warnings = []
    for first, second, *_ in pairs[:SHOWN]:
        shown = [f"{quote_apart(a, b)} ({counts[a]:,})" for a, b in ((first, second), (second, first))]
        warnings.append(f"warning: the {noun} {shown[0]} and {shown[1]} {describe_difference(first, second)}")
    if len(pairs) > SHOWN:
        warnings[-1] += f"; and {len(pairs) - SHOWN:,} more such pairs"
    return warnings


def _warn_of_missing(counts: Mapping[str, int]) -> list[str]:
    if not (missing := [name for name in counts if name.lower() in MISSING]):
        return []
    shown = ", ".join(f"{name!r} ({counts[name]:,})" for name in missing)
    return [f"warning: {shown} is read as a class, but looks like a missing label"]


def _warn_of_many(counts: Mapping[str, int], column: str) -> list[str]:
    """Return a warning where the column is probably no column of classes."""
    rows = sum(counts.values())
    found = f"warning: column {column!r} has {len(counts):,} classes in {rows:,} rows"
    numbers = len(counts) > FEW_ROWS and all(is_number(name) for name in counts)
    fractions = numbers and any(re.search(r"\.0*[1-9]", name) for name in counts)
    if fractions or (numbers and len(counts) > MANY_NUMBERS):
        return [f'{found}, all numbers: run.task = "text-regression" learns them as scores']
    if rows >= FEW_ROWS and 2 * len(counts) > rows:
        return [f"{found}: data.label_column may name the wrong column, such as one of texts or ids"]
    return []
