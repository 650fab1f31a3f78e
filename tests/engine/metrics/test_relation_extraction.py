"""F1 of relations without the label for no relation, against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine import predict
from engine.config import Config
from engine.metrics.relation_extraction import relation_metrics, relation_statistics, relation_table
from engine.tasks import TASKS

TASK = TASKS["relation-extraction"]


def measured(logits: torch.Tensor, labels: torch.Tensor, negative: int | None) -> torch.Tensor:
    return relation_statistics(F.cross_entropy(logits, labels, reduction="sum"), logits, labels, negative)


def predicting(predicted: list[int], labels: list[int], num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return F.one_hot(torch.tensor(predicted), num_labels).float() * 4, torch.tensor(labels)


def random_case(count: int, num_labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_labels, (count,), generator=generator)
    return torch.randn(count, num_labels, generator=generator), labels


METRIC_CASES = {
    "random": random_case(211, 5, 0),
    "more-classes-than-examples": random_case(4, 12, 1),
    "two-classes": random_case(50, 2, 2),
    "perfect": predicting([0, 1, 2, 0], [0, 1, 2, 0], 3),
    "all-wrong": predicting([1, 2, 0, 1], [0, 1, 2, 0], 3),
    "none-found": predicting([0, 0, 0], [0, 1, 2], 3),
    "none-present": predicting([0, 1, 2], [0, 0, 0], 3),
    "only-the-negative": predicting([0, 0], [0, 0], 3),
    "never-the-negative": predicting([1, 2, 1], [1, 1, 2], 3),
}


@pytest.mark.parametrize("negative", [0, 1, None])
@pytest.mark.parametrize(("logits", "labels"), METRIC_CASES.values(), ids=METRIC_CASES.keys())
def test_metrics_are_those_of_sklearn_without_the_negative_label(logits, labels, negative):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy(), logits.argmax(-1).numpy()
    counted = [k for k in range(logits.shape[1]) if k != negative]
    options = {"labels": counted, "average": "micro", "zero_division": 0}
    expected = sklearn.precision_recall_fscore_support(true, predicted, **options)[:3]
    found = relation_metrics(measured(logits, labels, negative))
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected, abs=1e-12)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted), abs=1e-12)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert [*found] == [*TASK.metrics]


def test_the_table_is_of_each_relation():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = METRIC_CASES["random"]
    header, *lines = relation_table(measured(logits, labels, 0), [f"r{i}" for i in range(5)]).splitlines()
    assert header.split()[:4] == ["precision", "recall", "f1", "count"]
    theirs = sklearn.precision_recall_fscore_support(labels.numpy(), logits.argmax(-1).numpy(), zero_division=0)
    for i, line in enumerate(lines):
        name, *values = line.split()
        assert name == f"r{i}"
        assert [*map(float, values[:4])] == pytest.approx([column[i] for column in theirs], abs=5.1e-5)


@pytest.mark.parametrize("sizes", [[1] * 211, [200, 11], [0, 90, 0, 121]])
def test_p02_metrics_are_the_same_for_every_split(sizes):
    logits, labels = METRIC_CASES["random"]
    added = sum(measured(*part, 0) for part in zip(logits.split(sizes), labels.split(sizes), strict=True))
    torch.testing.assert_close(added, measured(logits, labels, 0), rtol=1e-6, atol=0)
    torch.testing.assert_close(added[4:], measured(logits, labels, 0)[4:], rtol=0, atol=0)


def predicted(config: Config, source: Path, output: Path) -> list[dict]:
    assert predict.main([config.run.folder, "--input", str(source), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]
