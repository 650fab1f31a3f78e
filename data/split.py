"""The rows that are held out for validation, and a sample of the rows that are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

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
    rows: list[Row],
    fraction: float,
    seed: int,
    group: str = "",
    label: str = "",
    labels: Sequence[Collection[str]] = (),
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, validation rows): a random `fraction` is held out by `seed`. Both keep the file's order.

    - group, a column: rows with the same value stay in one split (all sentences of a review, all visits of a patient).
    - label, a column, used without group: the split is stratified, to within one row per value. A value that only one
      row has is never held out, since training would not have it.
    - labels, those of each row; by default the value of `label`: where a split has no example of one, rows (or groups)
      are exchanged, so that both have an example of every label that two have, as far as the sizes allow.
    Raises DataError where no row is left to train on.
    """
    values = [str(row.values.get(label)) for row in rows] if label else []
    units, unit_of_row = _find_units(rows, group)
    strata = [] if group else values
    counts = Counter(strata)
    candidates = [i for i in range(units) if not strata or counts[strata[i]] > 1]
    if not candidates and units > 1:
        raise DataError(
            f"data.validation_fraction = {fraction} leaves nothing to train on for a label that is held out: "
            f"no two rows have the same {label!r}; use a data.validation file"
        )
    num_held_out = max(1, round(len(candidates) * fraction))
    if num_held_out >= units:
        what = f"values of {group!r}" if group else "rows"
        raise DataError(f"data.validation_fraction = {fraction} leaves nothing to train on: only {units} {what}")
    rng = np.random.default_rng([seed, VALIDATION_SPLIT])
    order = rng.permutation(candidates).tolist()
    if strata:
        order.sort(key=lambda i: strata[i])  # stable: still shuffled within a label
    # At equal distances from a random start: all rows are equally likely, and each label gets its share.
    start = int(rng.integers(len(order)))
    held_out = {order[(i * len(order) + start) // num_held_out] for i in range(num_held_out)}
    one_label = {value: (value,) for value in values}
    labels = labels or [one_label[value] for value in values]
    if labels:
        held_out = _cover_labels(held_out, _labels_of_units(labels, units, unit_of_row), rng)
    training = [row for row, unit in zip(rows, unit_of_row, strict=True) if unit not in held_out]
    return training, [row for row, unit in zip(rows, unit_of_row, strict=True) if unit in held_out]


def _find_units(rows: list[Row], group: str) -> tuple[int, Sequence[int]]:
    """Return the number of units that stay whole, groups in the order of their names or rows, and that of each row."""
    if not group:
        return len(rows), range(len(rows))
    names = [str(row.values.get(group)) for row in rows]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return len(number), [number[name] for name in names]


def _labels_of_units(
    labels: Sequence[Collection[str]], units: int, unit_of_row: Sequence[int]
) -> Sequence[Collection[str]]:
    """Return the labels that occur in each unit."""
    if units == len(unit_of_row) and isinstance(unit_of_row, range):
        return labels
    found: list[set[str]] = [set() for _ in range(units)]
    for unit, names in zip(unit_of_row, labels, strict=True):
        found[unit].update(names)
    return found


def _cover_labels(held_out: set[int], labels: Sequence[Collection[str]], rng: np.random.Generator) -> set[int]:
    """Return the held-out units after a few exchanges, so that both splits have every label that two units have.

    A label that one unit has is for training. The rarest labels come first, as in iterative stratification (Sechidis et
    al. 2011, "On the stratification of multi-label data"). A unit is exchanged only if its split keeps an example of
    each of its labels, so some labels may still lack one. Nothing changes if no label lacks an example.
    """
    total = Counter(label for names in labels for label in names)
    held = Counter(label for unit in held_out for label in labels[unit])
    rarest_first = sorted(total, key=lambda label: (total[label], label))
    if all(0 < held[label] < total[label] or (total[label] == 1 and not held[label]) for label in rarest_first):
        return held_out
    held_out, shuffled = set(held_out), rng.permutation(len(labels)).tolist()

    def move(unit: int) -> None:
        change = -1 if unit in held_out else 1
        held_out.symmetric_difference_update({unit})
        for label in labels[unit]:
            held[label] += change

    def can_move(unit: int) -> bool:
        is_held = unit in held_out
        return all((held[label] if is_held else total[label] - held[label]) > 1 for label in labels[unit])

    def units_with(wanted: list[str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {label: [] for label in wanted}
        for unit in shuffled:
            for label in found.keys() & labels[unit]:
                found[label].append(unit)
        return found

    everything_held = [label for label in rarest_first if held[label] == total[label]]
    replacements = (unit for unit in shuffled if unit not in held_out and can_move(unit))
    for label, units in units_with(everything_held).items():
        replacement = next(replacements, None) if held[label] == total[label] else None
        if replacement is not None:
            move(replacement)
            move(units[0])
    nothing_held = [label for label in rarest_first if total[label] > 1 and not held[label]]
    replacements = (unit for unit in shuffled if unit in held_out and can_move(unit))
    for label, units in units_with(nothing_held).items():
        chosen = next((unit for unit in units if can_move(unit)), None) if not held[label] else None
        replacement = next(replacements, None) if chosen is not None else None
        if chosen is not None and replacement is not None:
            move(replacement)
            move(chosen)
    return held_out
