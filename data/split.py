"""The rows that are held out for validation, and a sample of the rows that are trained on."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from data.errors import DataError
from data.notes import count_of
from data.order import keyed_order
from data.prepared import PreparedRows
from data.random_streams import TRAINING_SAMPLE, VALIDATION_SPLIT
from data.row import Row

GROUP_NOUNS = {"same_context": "the context"}  # of a column that readers add (data/formats/choices.py), for messages


def sample_rows(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return `count` rows chosen by `seed`, in the order of the file; all rows for 0, or where there are fewer.

    The rows of a smaller count are among those of a larger one, so that a learning curve only adds rows.
    """
    if isinstance(rows, PreparedRows):
        return rows.choose(count, seed)
    if not 0 < count < len(rows):
        return rows
    return [rows[i] for i in sample_places(len(rows), count, seed).tolist()]


def sample_places(num_rows: int, count: int, seed: int) -> np.ndarray:
    """Return (C,) the places of the rows that sample_rows chooses, in their order."""
    if not 0 < count < num_rows:
        return np.arange(num_rows)
    return np.sort(keyed_order([seed, TRAINING_SAMPLE], num_rows)[np.arange(count)])


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
    groups = [str(row.values.get(group)) for row in rows] if group else []
    is_held_out = hold_out(len(rows), fraction, seed, group, label, groups, values, labels).tolist()
    training = [row for row, is_held in zip(rows, is_held_out, strict=True) if not is_held]
    return training, [row for row, is_held in zip(rows, is_held_out, strict=True) if is_held]


def hold_out(
    num_rows: int,
    fraction: float,
    seed: int,
    group: str,
    label: str,
    groups: Sequence[str],
    values: Sequence[str],
    labels: Sequence[Collection[str]],
) -> np.ndarray:
    """Return (num_rows,) whether each row is held out, as split_rows says.

    group, label: names of columns, for messages. groups, values: those of each row in these columns; empty: none.
    """
    units, unit_of_row = _find_units(num_rows, groups)
    strata = [] if groups else values
    candidates = np.arange(units)
    if strata:
        counts = Counter(strata)
        candidates = candidates[np.fromiter((counts[value] > 1 for value in strata), dtype=bool, count=units)]
    if not len(candidates) and units > 1:
        raise DataError(
            f"data.validation_fraction = {fraction} leaves nothing to train on for a label that is held out: "
            f"no two rows have the same {label!r}; use a data.validation file, or another data.label_column"
        )
    num_held_out = max(1, round(len(candidates) * fraction))
    if num_held_out >= units:
        what = (
            f"{count_of(units, 'value')} of {GROUP_NOUNS.get(group, repr(group))}, whose rows stay in one split"
            if group
            else count_of(units, "row")
        )
        hint = "; data.group_column names another column" if group else ""
        raise DataError(
            f"data.validation_fraction = {fraction} leaves nothing to train on: only {what}; "
            f"data.validation names a file{hint}"
        )
    rng = np.random.default_rng([seed, VALIDATION_SPLIT])
    order = rng.permutation(candidates)
    if strata:
        rank = {value: i for i, value in enumerate(sorted(counts))}
        ranks = np.fromiter((rank[value] for value in strata), dtype=np.int64, count=units)
        order = order[np.argsort(ranks[order], kind="stable")]  # still shuffled within a label
    # At equal distances from a random start: all rows are equally likely, and each label gets its share.
    start = int(rng.integers(len(order)))
    held_out = order[(np.arange(num_held_out) * len(order) + start) // num_held_out]
    one_label = {value: (value,) for value in dict.fromkeys(values)}
    labels = labels or [one_label[value] for value in values]
    if labels:
        of_units = _labels_of_units(labels, units, unit_of_row)
        held_out = np.array(sorted(_cover_labels(set(held_out.tolist()), of_units, unit_of_row, rng)), dtype=np.int64)
    is_held_out = np.zeros(units, dtype=bool)
    is_held_out[held_out] = True
    return is_held_out if isinstance(unit_of_row, range) else is_held_out[np.asarray(unit_of_row, dtype=np.int64)]


def _find_units(num_rows: int, groups: Sequence[str]) -> tuple[int, Sequence[int]]:
    """Return the number of units that stay whole, groups in the order of their names or rows, and that of each row."""
    if not groups:
        return num_rows, range(num_rows)
    number = {name: i for i, name in enumerate(sorted(set(groups)))}
    return len(number), [number[name] for name in groups]


def _labels_of_units(
    labels: Sequence[Collection[str]], units: int, unit_of_row: Sequence[int]
) -> Sequence[Collection[str]]:
    """Return the labels that occur in each unit."""
    if isinstance(unit_of_row, range):
        return labels
    found: list[set[str]] = [set() for _ in range(units)]
    for unit, names in zip(unit_of_row, labels, strict=True):
        found[unit].update(names)
    return found


class _Exchange:
    """A split that exchanges units while no label loses its last example in either of its parts.

    held_out: the units that are held out. labels: those of each unit. order: all units, in the order of preference.
    """

    def __init__(self, held_out: set[int], labels: Sequence[Collection[str]], order: list[int]):
        self.held_out, self.labels, self.order = set(held_out), labels, order
        self.total = Counter(label for names in labels for label in names)
        self.held = Counter(label for unit in held_out for label in labels[unit])

    def move(self, unit: int) -> None:
        """Move a unit to the other part."""
        change = -1 if unit in self.held_out else 1
        self.held_out.symmetric_difference_update({unit})
        for label in self.labels[unit]:
            self.held[label] += change

    def can_move(self, unit: int) -> bool:
        """Return whether each label of the unit has another example in its part."""
        is_held = unit in self.held_out
        counts = (self.held[x] if is_held else self.total[x] - self.held[x] for x in self.labels[unit])
        return all(count > 1 for count in counts)

    def units_with(self, wanted: list[str]) -> dict[str, list[int]]:
        """Return the units of each of these labels, in the order of preference."""
        found: dict[str, list[int]] = {label: [] for label in wanted}
        for unit in self.order:
            for label in found.keys() & self.labels[unit]:
                found[label].append(unit)
        return found

    def movable(self, from_held_out: bool) -> Iterator[int]:
        """Yield units of one part that can be moved, those first whose labels have most beyond their share there."""
        share = len(self.held_out) / len(self.labels)
        sign = 1 if from_held_out else -1

        def excess(unit: int) -> float:
            over = (sign * (self.held[x] - share * self.total[x]) for x in self.labels[unit])
            return min(over, default=math.inf)

        heap = [(-excess(u), place, u) for place, u in enumerate(self.order) if (u in self.held_out) == from_held_out]
        heapq.heapify(heap)
        while heap:
            key, place, unit = heapq.heappop(heap)
            if -excess(unit) > key:  # it has become less since
                heapq.heappush(heap, (-excess(unit), place, unit))
            elif (unit in self.held_out) == from_held_out and self.can_move(unit):
                yield unit


def _cover_labels(
    held_out: set[int], labels: Sequence[Collection[str]], unit_of_row: Sequence[int], rng: np.random.Generator
) -> set[int]:
    """Return the held-out units after a few exchanges, so that both parts have every label that two units have.

    A label that one unit has is for training. The rarest labels come first, as in iterative stratification (Sechidis et
    al. 2011, "On the stratification of multi-label data"). Labels may still lack an example where the part is too small
    for one of each. Nothing changes if no label lacks an example.
    """
    total = Counter(label for names in labels for label in names)
    held = Counter(label for unit in held_out for label in labels[unit])
    if all((0 < held[label] < count) or (count == 1 and not held[label]) for label, count in total.items()):
        return held_out
    order = rng.permutation(len(labels)).tolist()
    if not isinstance(unit_of_row, range):  # small groups first, to keep the sizes
        rows = Counter(unit_of_row)
        order.sort(key=lambda unit: rows[unit])
    split = _Exchange(held_out, labels, order)
    rarest_first = sorted(total, key=lambda label: (total[label], label))
    everything_held = [label for label in rarest_first if held[label] == total[label]]
    replacements = split.movable(from_held_out=False)
    for label, units in split.units_with(everything_held).items():
        replacement = next(replacements, None) if split.held[label] == total[label] else None
        if replacement is not None:
            split.move(replacement)
            split.move(units[0])
    nothing_held = [label for label in rarest_first if total[label] > 1 and not split.held[label]]
    replacements = split.movable(from_held_out=True)
    for label, units in split.units_with(nothing_held).items():
        chosen = next((unit for unit in units if split.can_move(unit)), None) if not split.held[label] else None
        replacement = next(replacements, None) if chosen is not None else None
        if chosen is not None and replacement is not None:
            split.move(replacement)
            split.move(chosen)
    return split.held_out
