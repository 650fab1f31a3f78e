"""The folds of cross-validation: parts of the training rows, each held out once.

The fold of a row is a function of the seed, the ids (or groups) and the labels, not of the order of the file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.notes import list_some
from data.row import Row

MAX_PASSES = 10  # over all units, to improve a greedy assignment
ATTEMPTS, FEW_UNITS = 10, 2000  # other orders that are tried, where there are few units


class Fold(NamedTuple):
    """One of `total` folds; number: from 1."""

    number: int
    total: int


def parse_fold(text: str) -> Fold | None:
    """Return the fold of "2/5", the second of five; None for text that names none."""
    number, slash, count = text.strip().partition("/")
    if not slash or not (number.isdecimal() and count.isdecimal()) or max(len(number), len(count)) > 9:
        return None
    fold = Fold(int(number), int(count))
    return fold if 1 <= fold.number <= fold.total and fold.total >= 2 else None


def split_fold(
    rows: list[Row], fold: Fold, seed: int, group: str = "", labels: Sequence[Collection[str]] = ()
) -> tuple[list[Row], list[Row], list[str]]:
    """Return (training rows, the rows of the fold, notes), both in the file's order.

    group, a column: rows with the same value are in one fold. labels, those of each row: the folds have equal shares of
    each, as far as that is possible; (): they are not stratified.
    Raises DataError where there are fewer rows (or groups) than folds.
    """
    groups = [str(row.values.get(group)) for row in rows] if group else []
    number = assign_folds([row.id for row in rows], fold.total, seed, groups, labels)
    is_held_out = (number == fold.number - 1).tolist()
    training = [row for row, is_held in zip(rows, is_held_out, strict=True) if not is_held]
    held_out = [row for row, is_held in zip(rows, is_held_out, strict=True) if is_held]
    if not labels:
        return training, held_out, [f"data.fold: the {fold.total} folds are not stratified, since rows have no labels"]
    units = groups or range(len(rows))
    found = Counter(label for _, label in {(unit, x) for unit, own in zip(units, labels, strict=True) for x in own})
    rare = sorted(label for label, times in found.items() if times < fold.total)
    what = "groups" if groups else "rows"
    notes = [f"data.fold: fewer {what} than folds have {list_some(rare, 5)}: some folds lack them"] if rare else []
    return training, held_out, notes


def assign_folds(
    ids: Sequence[str],
    count: int,
    seed: int,
    groups: Sequence[str] = (),
    labels: Sequence[Collection[str]] = (),
) -> np.ndarray:
    """Return (N,) the fold of each row, from 0. groups: that of each row, kept in one fold; labels: those of each row.

    - At most one label a row, no groups: rows are dealt out in the order of their labels, so that each label's share of
      a fold, and the fold itself, are equal to within one row.
    - Else: a greedy assignment, large groups and rare labels first, to the fold that has the smallest share of the
      labels; then single moves as long as they make the shares more equal.
    """
    names = sorted(set(groups)) if groups else list(ids)
    if len(names) < count:
        what = "groups" if groups else "rows"
        raise DataError(f"data.fold: {count} folds need as many {what}, and there are {len(names)}")
    order = np.argsort(np.array([_hash(seed, name) for name in names], dtype=np.uint64), kind="stable")
    if not groups and all(len(own) < 2 for own in labels):
        values = [next(iter(own), "") for own in labels]
        rank = {name: i for i, name in enumerate(sorted(set(values)))}
        if values:
            order = order[np.argsort(np.array([rank[values[i]] for i in order]), kind="stable")]
        folds = np.empty(len(names), dtype=np.int64)
        folds[order] = np.arange(len(names)) % count
        return folds
    number = {name: i for i, name in enumerate(names)}
    unit_of_row = np.array([number[name] for name in groups]) if groups else np.arange(len(names))
    of_units = _assign_units(_count_labels(len(names), unit_of_row, labels), order, count)
    return np.asarray(of_units[unit_of_row])


def _hash(seed: int, name: str) -> int:
    text = f"{seed} {name}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Unit(NamedTuple):
    """Rows that stay together. columns: labels; counts: the rows of each. The last column is the number of rows."""

    columns: np.ndarray
    counts: np.ndarray


def _count_labels(num_units: int, unit_of_row: np.ndarray, labels: Sequence[Collection[str]]) -> list[Unit]:
    column = {name: i for i, name in enumerate(sorted({name for own in labels for name in own}))}
    found: list[Counter[int]] = [Counter() for _ in range(num_units)]
    for row, unit in enumerate(unit_of_row.tolist()):
        found[unit][len(column)] += 1
        if labels:
            found[unit].update(column[name] for name in set(labels[row]))
    return [Unit(np.array([*own]), np.array([*own.values()], dtype=np.float64)) for own in found]


def _assign_units(units: list[Unit], order: np.ndarray, count: int) -> np.ndarray:
    """Return the fold of each unit, with a small sum over folds and labels of (the fold's share of the label)^2.

    The best of several assignments: one that begins with the largest units, and ATTEMPTS in other orders.

    order: of units that are equally large.
    """
    totals = np.zeros(1 + max(int(unit.columns.max()) for unit in units))
    for unit in units:
        totals[unit.columns] += unit.counts
    weights = 1 / totals**2
    own = np.array([float(weights[unit.columns] @ unit.counts**2) for unit in units])
    orders = [order[np.argsort(-own[order], kind="stable")]]
    if len(units) <= FEW_UNITS:
        orders += [order[np.random.default_rng(attempt).permutation(len(order))] for attempt in range(ATTEMPTS)]
    assigned = [_assign_in_order(units, order, count, weights) for order in orders]
    return min(assigned, key=lambda found: found[1])[0]


def _assign_in_order(units: list[Unit], order: np.ndarray, count: int, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (the fold of each unit, the sum to minimise), assigned greedily in this order and then improved."""
    shares, folds = np.zeros((count, len(weights))), np.full(len(units), -1)
    for _ in range(MAX_PASSES):
        moved = 0
        for i in order.tolist():
            columns, counts = units[i]
            before = int(folds[i])
            if before >= 0:
                shares[before, columns] -= counts
            costs = shares[:, columns] @ (weights[columns] * counts)
            best = int(costs.argmin())
            if before >= 0 and costs[best] > costs[before] - 1e-12:
                best = before
            shares[best, columns] += counts
            moved += best != before
            folds[i] = best
        if not moved:
            break
    return folds, float((shares**2 @ weights).sum())
