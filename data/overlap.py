"""Texts that are in two splits, and equal texts with different labels, as notes.

Texts and labels are compared by 64-bit hashes, so that a million rows take seconds and a few dozen megabytes.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.notes import count_of, list_ids, quote, warn
from data.row import Row

WARN_OF_OVERLAP = 0.01  # share of a split from which it is a warning that its texts are also in the training data


# What is compared of a row: (what the model reads, what it should answer; None where several answers are right).
ContentOf = Callable[[Row], tuple[Hashable, Hashable]]


class Hashes(NamedTuple):
    """The rows of a split, and the hashes of their contents."""

    rows: Sequence[Row]
    texts: np.ndarray  # (N,) int64
    both: np.ndarray  # (N,) int64: texts with label


def comparable(value: Any) -> Hashable:
    """Return a form that is equal for values that look equal: stripped, with composed characters, lists as tuples."""
    if isinstance(value, str):
        value = value.strip()
        return value if value.isascii() else unicodedata.normalize("NFC", value)
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
    if isinstance(value, dict):
        return tuple((key, comparable(item)) for key, item in sorted(value.items()))
    return value if isinstance(value, Hashable) else repr(value)


def hash_rows(rows: Sequence[Row], content_of: ContentOf) -> Hashes:
    """Return the hashes of the contents of rows."""
    texts, both = array("q"), array("q")
    for row in rows:
        content = content_of(row)
        texts.append(hash(content[0]))
        both.append(hash(content))
    return Hashes(rows, np.array(texts, dtype=np.int64), np.array(both, dtype=np.int64))


def describe_overlap(noun: str, split: Hashes, training: Hashes) -> list[str]:
    """Return a note on the texts of a split that are also in the training data, and how many have another label.

    noun: what the rows are, "validation text".
    """
    is_shared = np.isin(split.texts, training.texts)
    if not (count := int(is_shared.sum())):
        return []
    others = int((is_shared & ~np.isin(split.both, training.both)).sum())
    total = len(split.rows)
    verb = "is" if total == 1 else "are"
    note = f"{count:,} of {count_of(total, noun)} {verb} also in the training data"
    note += f", {others:,} of them with another label" if others else ""
    ids = [split.rows[i].id for i in np.flatnonzero(is_shared).tolist()]
    return [warn(count, total, f"{note} {list_ids(ids)}", WARN_OF_OVERLAP)]


def describe_contradictions(
    noun: str, split: Hashes, content_of: ContentOf, is_shown: bool = True, targets: str = "labels"
) -> list[str]:
    """Return a note on the texts of a split that have several labels, with the first of them.

    noun: what the rows are, "training text". is_shown: whether the note has the text, which may be a checksum.
    targets: what their labels are called.
    """
    in_order = np.sort(split.texts)
    if not (in_order[1:] == in_order[:-1]).any():  # no text twice
        return []
    _, first_rows = np.unique(split.both, return_index=True)
    # One row for each text with a label: a text that is left more than once has several labels.
    texts, counts = np.unique(split.texts[first_rows], return_counts=True)
    contradictory = texts[counts > 1]
    if not len(contradictory):
        return []
    places = np.flatnonzero(np.isin(split.texts, contradictory))
    first = int(places[0])
    same = np.flatnonzero(split.texts == split.texts[first])
    other = int(same[split.both[same] != split.both[first]][0])
    count = len(contradictory)
    verb = "has" if count == 1 else "have"
    a, b = split.rows[first], split.rows[other]
    note = f"{count_of(count, noun)} {verb} several {targets} in {len(places):,} of {len(split.rows):,} rows, such as "
    note += f"{_shown(content_of(a)[0])}: " if is_shown else ""
    note += f"{_shown(content_of(a)[1])} (id {a.id}) and {_shown(content_of(b)[1])} (id {b.id})"
    return [warn(len(places), len(split.rows), note)]


def _shown(value: Any) -> str:
    """Return a value for a note: a text in quotes, shortened."""
    if isinstance(value, tuple) and len(value) == 1:
        return _shown(value[0])
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return quote(", ".join(value))
    return str(value) if isinstance(value, int | float) else quote(str(value))
