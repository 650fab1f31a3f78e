"""Metrics of classes of images against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.metrics.image_classification import image_metrics, image_statistics, image_table
from engine.metrics.text_classification import POSITIVE_CLASS_METRICS
from engine.tasks import TASKS

TASK = TASKS["image-classification"]


@pytest.mark.parametrize("num_labels", [2, 5, 6, 10])
def test_metrics_are_those_of_scikit_learn(num_labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(num_labels)
    labels, logits = rng.integers(0, num_labels, 80), rng.normal(size=(80, num_labels))
    places = range(80)
    of_batches = [
        image_statistics(
            torch.tensor(1.0),
            torch.from_numpy(logits[i : i + 7]),
            torch.from_numpy(labels[i : i + 7]),
            places[i : i + 7],
            80,
        )
        for i in range(0, 84, 7)  # the last one is empty
    ]
    values = image_metrics(sum(of_batches))
    more = {*POSITIVE_CLASS_METRICS} if num_labels > 2 else set()
    assert list(values) == [name for name in TASK.metrics if name not in more]
    if num_labels == 2:
        assert values["roc_auc"] == pytest.approx(sklearn.roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
        assert values["f1_positive"] == pytest.approx(sklearn.f1_score(labels, logits.argmax(1)))
    everything = range(num_labels)
    if num_labels > 5:
        expected = sklearn.top_k_accuracy_score(labels, logits, k=5, labels=everything)
        assert values["top5_accuracy"] == pytest.approx(expected)
    else:
        assert values["top5_accuracy"] == 1
    assert values["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert values["f1"] == pytest.approx(sklearn.f1_score(labels, logits.argmax(1), average="macro"))
    table = image_table(sum(of_batches), [str(i) for i in everything])
    assert ("always 1" in table) == (num_labels < 6)


def test_a_model_that_says_nothing_is_not_among_the_first_five():
    labels = torch.arange(10)
    for logits in (torch.zeros(10, 10), torch.full((10, 10), float("nan"))):
        statistics = image_statistics(torch.tensor(0.0), logits, labels)
        assert statistics[0] == (5 if logits.isfinite().all() else 0)
