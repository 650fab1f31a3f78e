"""Metrics of label sets against scikit-learn, and their table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.metrics.multi_label_classification import multi_label_metrics, multi_label_statistics, per_label_table
from engine.tasks import TASKS


def multi_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return multi_label_statistics(F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), logits, labels)


def random_label_sets(count: int, num_labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, num_labels, generator=generator)
    return logits, (torch.rand(count, num_labels, generator=generator) < 0.3).float()


def label_set_case(predicted: list[list[int]], labels: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(predicted).float() * 6 - 3, torch.tensor(labels).float()


LABEL_SETS = {
    "random": random_label_sets(97, 7, 0),
    "one-label": random_label_sets(40, 1, 1),
    "more-labels-than-examples": random_label_sets(3, 25, 2),
    "perfect": label_set_case([[1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [1, 1]]),
    "all-wrong": label_set_case([[1, 0], [0, 1]], [[0, 1], [1, 0]]),
    "none-predicted": label_set_case([[0, 0], [0, 0]], [[1, 0], [1, 1]]),
    "none-present": label_set_case([[1, 0], [1, 1]], [[0, 0], [0, 0]]),
    "one-never-there": label_set_case([[1, 0, 0], [1, 0, 1]], [[1, 0, 0], [1, 0, 0]]),
    "one-example": label_set_case([[1, 0, 1]], [[1, 1, 0]]),
}


@pytest.mark.parametrize(("logits", "labels"), LABEL_SETS.values(), ids=LABEL_SETS.keys())
def test_metrics_of_label_sets_are_those_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy().astype(int), (logits.sigmoid() > 0.5).numpy().astype(int)
    found = multi_label_metrics(multi_label(logits, labels))
    occurs = (true.sum(0) + predicted.sum(0)) > 0
    assert occurs.any()
    expected = {
        "loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
        "subset_accuracy": (true == predicted).all(1).mean(),
    }
    if true.shape[1] > 1:  # scikit-learn would read a single column as classes
        assert expected["subset_accuracy"] == sklearn.accuracy_score(true, predicted)
    for name, function in (
        ("precision", sklearn.precision_score),
        ("recall", sklearn.recall_score),
        ("f1", sklearn.f1_score),
    ):
        one = {"average": "binary"} if true.shape[1] == 1 else {"average": "micro"}
        expected[f"{name}_micro"] = function(true, predicted, zero_division=0, **one)
        if occurs.sum() > 1:
            average = function(true[:, occurs], predicted[:, occurs], average="macro", zero_division=0)
        else:
            average = function(true[:, occurs][:, 0], predicted[:, occurs][:, 0], zero_division=0)
        expected[name] = average
    assert found.keys() == expected.keys() == {*TASKS["multi-label-classification"].metrics}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6 if name == "loss" else 1e-12, abs=1e-12), name


@pytest.mark.parametrize(("logits", "labels"), LABEL_SETS.values(), ids=LABEL_SETS.keys())
def test_the_table_of_labels_is_that_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy().astype(int), (logits > 0).numpy().astype(int)
    names = [f"label{i}" for i in range(true.shape[1])]
    header, *lines = per_label_table(multi_label(logits, labels), names).splitlines()
    assert header.split() == ["precision", "recall", "f1", "count", "predicted"]
    counts = []
    for line in lines:
        name, *values = line.split()
        i = names.index(name)
        theirs = sklearn.precision_recall_fscore_support(true[:, i], predicted[:, i], average="binary", zero_division=0)
        assert [*map(float, values[:3])] == pytest.approx(theirs[:3], abs=5.1e-5)
        assert [*map(int, values[3:])] == [true[:, i].sum(), predicted[:, i].sum()]
        counts.append(true[:, i].sum())
    assert len(lines) == len(names)
    assert counts == sorted(counts, reverse=True)


def test_the_table_shows_the_most_frequent_of_many_labels():
    logits, labels = torch.zeros(1, 60), torch.zeros(1, 60)
    labels[0, 55] = 1
    lines = per_label_table(multi_label(logits, labels), [f"l{i}" for i in range(60)]).splitlines()
    assert lines[1].split()[0] == "l55"
    assert (len(lines), lines[-1]) == (52, "and 10 more labels")


def test_a_probability_of_a_half_is_not_predicted():
    assert multi_label(torch.zeros(1, 1), torch.ones(1, 1))[4] == 0


@pytest.mark.parametrize("sizes", [[1] * 97, [64, 33], [0, 90, 0, 7]])
def test_p02_label_sets_are_measured_the_same_for_every_split(sizes):
    logits, labels = LABEL_SETS["random"]
    added = torch.stack([multi_label(*p) for p in zip(logits.split(sizes), labels.split(sizes), strict=True)]).sum(0)
    torch.testing.assert_close(added, multi_label(logits, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(added[1:], multi_label(logits, labels)[1:], rtol=0, atol=0)
