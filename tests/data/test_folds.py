"""Folds of cross-validation, compared with scikit-learn's: each row once, shares of the labels, groups whole."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from data.errors import DataError
from data.folds import Fold, assign_folds, parse_fold, split_fold
from data.row import Row


def counts(folds: np.ndarray, labels: np.ndarray, total: int) -> np.ndarray:
    """Return (folds, labels) the rows of each label in each fold."""
    return np.array([[np.sum((folds == fold) & (labels == x)) for x in np.unique(labels)] for fold in range(total)])


def imbalance(table: np.ndarray) -> float:
    """Return what StratifiedGroupKFold makes small: the spread of each label's shares, a mean over the labels."""
    return float((table / table.sum(0)).std(0).mean())


def of_sklearn(splitter, labels: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    folds = np.empty(len(labels), dtype=np.int64)
    for number, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
        folds[held_out] = number
    return folds


def random_rows(case: int):
    """Return (ids, labels, groups, folds) of a random size; groups and labels of very unequal sizes."""
    rng = np.random.default_rng(case)
    rows, total, kinds = int(rng.integers(60, 400)), int(rng.integers(2, 7)), int(rng.integers(2, 5))
    labels = rng.choice(kinds, rows, p=rng.dirichlet(np.full(kinds, 2.0)))
    groups = rng.choice(int(rng.integers(3 * total, 60)), rows)
    return [f"id {i}" for i in range(rows)], labels, groups, total


@pytest.mark.parametrize("case", range(20))
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_rows_are_stratified_as_by_scikit_learn(case):
    ids, labels, _, total = random_rows(case)
    ours = counts(assign_folds(ids, total, case, (), [(str(x),) for x in labels]), labels, total)
    theirs = counts(of_sklearn(StratifiedKFold(total, shuffle=True, random_state=case), labels), labels, total)
    assert np.ptp(ours, axis=0).max() <= 1
    assert np.ptp(ours.sum(1)) <= 1
    assert imbalance(ours) <= imbalance(theirs) + 1e-12


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_groups_are_balanced_no_worse_than_by_scikit_learn():
    """Against the median of its 5 shuffles: a single one is better or worse by chance."""
    ratios = []
    for case in range(20):
        ids, labels, groups, total = random_rows(case)
        folds = assign_folds(ids, total, case, groups.astype(str).tolist(), [(str(x),) for x in labels])
        assert all(len(set(folds[groups == group])) == 1 for group in np.unique(groups))
        assert set(folds) == set(range(total))
        splitters = (StratifiedGroupKFold(total, shuffle=True, random_state=seed) for seed in range(5))
        theirs = [imbalance(counts(of_sklearn(one, labels, groups), labels, total)) for one in splitters]
        ratios.append(imbalance(counts(folds, labels, total)) / np.median(theirs))
    assert np.mean(ratios) < 1
    assert np.mean(np.array(ratios) <= 1 + 1e-9) >= 0.8


@pytest.mark.parametrize("grouped", [False, True])
def test_a_fold_depends_on_the_seed_and_the_ids_only(grouped):
    ids, labels, groups, total = random_rows(3)
    names = groups.astype(str).tolist() if grouped else []
    rows = list(zip(ids, [(str(x),) for x in labels], names or ids, strict=True))
    first = assign_folds(ids, total, 7, names, [own for _, own, _ in rows])
    shuffled = random.Random(0).sample(rows, len(rows))
    again = assign_folds(
        [i for i, _, _ in shuffled],
        total,
        7,
        [g for _, _, g in shuffled] if grouped else [],
        [x for _, x, _ in shuffled],
    )
    assert dict(zip(ids, first.tolist(), strict=True)) == {
        row[0]: fold for row, fold in zip(shuffled, again.tolist(), strict=True)
    }
    assert not np.array_equal(first, assign_folds(ids, total, 8, names, [own for _, own, _ in rows]))


def test_rows_with_several_labels_get_equal_shares():
    rng = np.random.default_rng(0)
    has = rng.random((300, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]
    labels = [[f"l{k}" for k in np.flatnonzero(row)] for row in has]
    folds = assign_folds([str(i) for i in range(300)], 5, 0, (), labels)
    table = np.array([has[folds == fold].sum(0) for fold in range(5)])
    assert np.ptp(table, axis=0).max() <= 2
    assert np.ptp(np.bincount(folds)) <= 2


def test_split_fold_holds_out_each_row_once_in_its_order():
    rows = [Row(str(i), i, {"label": "ab"[i % 2], "group": str(i // 3)}) for i in range(31)]
    labels = [(row.values["label"],) for row in rows]
    for group in ("", "group"):
        parts = [split_fold(rows, Fold(number, 4), 0, group, labels) for number in range(1, 5)]
        assert sorted(row.line for _, held_out, _ in parts for row in held_out) == list(range(31))
        for training, held_out, notes in parts:
            assert sorted([*training, *held_out], key=lambda row: row.line) == rows
            assert [row.line for row in training] == sorted(row.line for row in training)
            assert notes == []


def test_what_cannot_be_stratified_is_said():
    rows = [Row(str(i), i, {"group": str(i % 2)}) for i in range(6)]
    assert split_fold(rows, Fold(1, 3), 0)[2] == [
        "data.fold: the 3 folds are not stratified, since rows have no labels"
    ]
    labels = [("a",), ("a",), ("a",), ("b",), ("b",), ("c",)]
    assert split_fold(rows, Fold(1, 3), 0, "", labels)[2] == [
        "data.fold: fewer rows than folds have b, c: some folds lack them"
    ]
    with pytest.raises(DataError, match=r"^data.fold: 7 folds need as many rows, and there are 6$"):
        split_fold(rows, Fold(1, 7), 0)
    with pytest.raises(DataError, match=r"^data.fold: 3 folds need as many groups, and there are 2$"):
        split_fold(rows, Fold(1, 3), 0, "group")


@pytest.mark.parametrize(
    ("text", "fold"),
    [
        ("1/5", Fold(1, 5)),
        (" 5/5 ", Fold(5, 5)),
        *((bad, None) for bad in ("", "0/5", "6/5", "1/1", "a/5", "1", "-1/5")),
    ],
)
def test_the_text_of_a_fold(text, fold):
    assert parse_fold(text) == fold
