"""The rows that are held out for validation, and a sample of the rows that are trained on."""

from __future__ import annotations

from collections import Counter

import numpy as np

from data.errors import DataError
from data.random_streams import TRAINING_SAMPLE, VALIDATION_SPLIT
from data.row import Row


def sample_rows(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows chosen by `seed`, in the order of the file; all rows for 0, or where there are fewer.

    The rows of a smaller count are among those of a larger one, so that a learning curve only adds rows.
    """
    if not 0 < count < len(rows):
        return rows
    chosen = np.random.default_rng([seed, TRAINING_SAMPLE]).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen.tolist())]


def split_rows(
    rows: list[Row], fraction: float, seed: int, group: str = "", label: str = ""
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, validation rows): a random `fraction` is held out by `seed`. Both keep the file's order.

    - group, a column: rows with the same value stay in one split (all sentences of a review, all visits of a patient).
    - label, a column, used without group: the split is stratified, to within one row per value. A value that only one
      row has is never held out, since training would not have it.
    Raises DataError where no row is left to train on.
    """
    keys = [str(row.values.get(group)) if group else str(i) for i, row in enumerate(rows)]
    units = sorted(set(keys)) if group else keys
    labels = [str(row.values.get(label)) for row in rows] if label and not group else []
    counts = Counter(labels)
    candidates = [i for i in range(len(units)) if not labels or counts[labels[i]] > 1]
    if not candidates and len(units) > 1:
        raise DataError(
            f"data.validation_fraction = {fraction} leaves nothing to train on for a label that is held out: "
            f"no two rows have the same {label!r}; use a data.validation file"
        )
    num_held_out = max(1, round(len(candidates) * fraction))
    if num_held_out >= len(units):
        what = f"values of {group!r}" if group else "rows"
        raise DataError(f"data.validation_fraction = {fraction} leaves nothing to train on: only {len(units)} {what}")
    rng = np.random.default_rng([seed, VALIDATION_SPLIT])
    order = rng.permutation(candidates).tolist()
    if labels:
        order.sort(key=lambda i: labels[i])  # stable: still shuffled within a label
    # At equal distances from a random start: all rows are equally likely, and each label gets its share.
    start = int(rng.integers(len(order)))
    held_out = {units[order[(i * len(order) + start) // num_held_out]] for i in range(num_held_out)}
    training = [row for row, key in zip(rows, keys, strict=True) if key not in held_out]
    return training, [row for row, key in zip(rows, keys, strict=True) if key in held_out]
