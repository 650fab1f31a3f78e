"""Metrics of label sets against scikit-learn, and their table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.metrics import ranking
from engine.metrics.multi_label_classification import multi_label_metrics, multi_label_statistics, per_label_table
from engine.tasks import TASKS


def multi_label(
    logits: torch.Tensor, labels: torch.Tensor, indices: list | None = None, count: int = 0
) -> torch.Tensor:
    loss_sum = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return multi_label_statistics(loss_sum, logits, labels, indices or range(len(logits)), count or len(logits))


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
    num_labels = true.shape[1]
    found = multi_label_metrics(multi_label(logits, labels), num_labels)
    occurs = (true.sum(0) + predicted.sum(0)) > 0
    assert occurs.any()
    expected = {
        "loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
        "subset_accuracy": (true == predicted).all(1).mean(),
    }
    # scikit-learn would read a single column as classes
    micro, macro = (
        {"average": "binary" if num_labels == 1 else name, "zero_division": 0} for name in ("micro", "macro")
    )
    if num_labels > 1:
        assert expected["subset_accuracy"] == sklearn.accuracy_score(true, predicted)
    for name in ("precision", "recall", "f1"):
        function = getattr(sklearn, f"{name}_score")
        expected[f"{name}_micro"] = function(true, predicted, **micro)
        expected[name] = function(true, predicted, **macro)
    present = [sklearn.f1_score(true[:, i], predicted[:, i], zero_division=0) for i in np.flatnonzero(occurs)]
    expected["f1_present"] = np.mean(present)
    scores = logits.double().sigmoid().numpy()
    is_mixed = all(0 < column.sum() < len(column) for column in true.T)
    for name, function in (
        ("average_precision", sklearn.average_precision_score),
        ("roc_auc", sklearn.roc_auc_score),
    ):
        one = {"average": "macro"} if num_labels > 1 else {}
        expected[name] = function(true, scores, **one) if is_mixed or name != "roc_auc" else math.nan
        is_mixed_together = 0 < true.sum() < true.size
        expected[f"{name}_micro"] = (
            function(true.ravel(), scores.ravel()) if is_mixed_together else found[f"{name}_micro"]
        )
    assert found.keys() == expected.keys() == {*TASKS["multi-label-classification"].metrics}
    for name, value in expected.items():
        rel = 1e-6 if name == "loss" else 1e-12
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize(("logits", "labels"), LABEL_SETS.values(), ids=LABEL_SETS.keys())
def test_the_table_of_labels_is_that_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy().astype(int), (logits > 0).numpy().astype(int)
    names = [f"label{i}" for i in range(true.shape[1])]
    header, *lines = per_label_table(multi_label(logits, labels), names).splitlines()
    assert header.split() == ["precision", "recall", "f1", "count", "predicted", "roc_auc", "average_precision"]
    counts = []
    for line in lines:
        name, *values = line.split()
        i = names.index(name)
        theirs = sklearn.precision_recall_fscore_support(true[:, i], predicted[:, i], average="binary", zero_division=0)
        assert [*map(float, values[:3])] == pytest.approx(theirs[:3], abs=5.1e-5)
        assert [*map(int, values[3:5])] == [true[:, i].sum(), predicted[:, i].sum()]
        if 0 < true[:, i].sum() < len(true):
            ranking = [
                function(true[:, i], logits[:, i])
                for function in (sklearn.roc_auc_score, sklearn.average_precision_score)
            ]
            assert [*map(float, values[5:])] == pytest.approx(ranking, abs=5.1e-5)
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
    pieces = [(logits[i], labels[i], i.tolist(), 97) for i in torch.randperm(97).split(sizes)]
    added = torch.stack([multi_label(*piece) for piece in pieces]).sum(0)
    torch.testing.assert_close(added, multi_label(logits, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(added[1:], multi_label(logits, labels)[1:], rtol=0, atol=0)


def test_many_scores_are_not_kept(monkeypatch):
    monkeypatch.setattr(ranking, "MAX_SCORES", 10)
    logits, labels = LABEL_SETS["random"]
    statistics = multi_label(logits, labels)
    found = multi_label_metrics(statistics, 7)
    assert len(statistics) == 3 + 3 * 7
    assert found["f1"] == multi_label_metrics(statistics)["f1"]
    assert math.isnan(found["roc_auc"])
    assert "roc_auc" not in per_label_table(statistics, [*"abcdefg"])
