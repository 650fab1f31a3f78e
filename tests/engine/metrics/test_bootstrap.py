"""Bootstrap intervals and paired tests, against scipy and by hand on the same resamples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from engine.config import EvalSettings
from engine.judging import describe_judging
from engine.metrics import bootstrap, by_example, image_classification, text_classification
from engine.metrics.bootstrap import (
    SEED,
    compare_metrics,
    confidence_intervals,
    describe_metrics,
    interval_of,
    mcnemar,
    resamples,
)
from engine.metrics.by_example import add_rows
from engine.metrics.multi_label_classification import multi_label_metrics


def mean_of(statistics: torch.Tensor, labels: object) -> dict[str, float]:
    """The mean of the first column of rows (value, 1)."""
    return {"mean": (statistics[0] / statistics[1]).item()}


def rows_of(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.stack([values, np.ones(len(values))], 1))


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(3).exponential(size=37)
    found = confidence_intervals(rows_of(values), add_rows, mean_of, [], 0.9)["mean"]
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=1000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(SEED)
    ).confidence_interval
    assert found == pytest.approx(tuple(expected), rel=1e-12)


def test_a_metric_of_the_corpus_is_computed_on_each_resample():
    """F1 of counts is no mean of examples: here from hits, predictions and targets of each of 23 examples."""
    counts = np.random.default_rng(1).integers(0, 4, (23, 3)).astype(float)

    def f1(statistics: torch.Tensor, labels: object) -> dict[str, float]:
        hits, predicted, actual = statistics.tolist()
        return {"f1": 2 * hits / (predicted + actual)}

    by_hand = [counts[chosen].sum(0) for chosen in resamples(23)]
    values = np.array([2 * hits / (predicted + actual) for hits, predicted, actual in by_hand])
    found = confidence_intervals(torch.tensor(counts), add_rows, f1, [], 0.95)["f1"]
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), rel=1e-12)


def test_resamples_where_a_metric_is_undefined_are_left_out():
    assert interval_of(np.array([np.nan, 1.0, 2.0, np.nan, 3.0]), 0.5) == (1.5, 2.5)
    assert np.isnan(interval_of(np.array([np.nan]), 0.5)).all()


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (1, 0), (12, 3), (2, 31), (400, 330)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    total = only_a + only_b
    expected = scipy.stats.binomtest(only_a, total).pvalue if total else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_a_pair_is_compared_on_the_same_resamples():
    rng = np.random.default_rng(5)
    a = rng.normal(size=60)
    b = a - 0.15 + 0.5 * rng.normal(size=60)
    found = compare_metrics((rows_of(a), rows_of(b)), add_rows, mean_of, [], 0.95)["mean"]
    differences = [float((a - b)[chosen].mean()) for chosen in resamples(60)]
    assert found.difference == pytest.approx((a - b).mean())
    assert found.interval == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=5000, rng=1
    )
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.03)
    same = compare_metrics((rows_of(a), rows_of(a)), add_rows, mean_of, [], 0.95)["mean"]
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_have_the_true_mean():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        low, high = confidence_intervals(rows_of(rng.normal(size=80)), add_rows, mean_of, [], 0.95)["mean"]
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.985


def random_rows(kind: str, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Rows of examples with ties, examples without a target, and in some a label that nobody has."""
    logits = torch.tensor(rng.normal(size=(count, 3 if kind == "label sets" else 2))).mul(4).round().div(4)
    if kind == "label sets":
        labels = torch.tensor(rng.choice([0.0, 1.0, -100.0], size=logits.shape, p=[0.5, 0.4, 0.1]))
        labels[:, 2] *= rng.integers(0, 2)
        return by_example.label_set_rows(logits, labels, logits > 0.5), ["a", "b", "c"]
    classes = torch.tensor(rng.choice([0, 1, -100], size=count, p=[0.6, 0.3, 0.1]))
    return by_example.class_rows(logits, classes), ["a", "b"]


RANKED = {
    "classes": (by_example.collect_classes, text_classification.classification_metrics),
    "images": (by_example.collect_images, image_classification.image_metrics),
    "label sets": (by_example.collect_label_sets, lambda statistics: multi_label_metrics(statistics, 3)),
}


@pytest.mark.parametrize("kind", RANKED)
def test_rankings_of_counts_are_those_of_the_chosen_rows(kind, monkeypatch):
    """NaN where a resample has no positive, no negative or no target, or a NaN score, as in the metrics themselves."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 60)
    collect, metrics = RANKED[kind]

    def compute(statistics: torch.Tensor, labels: object) -> dict[str, float]:
        return metrics(statistics)

    for seed, count in enumerate([2, 5, 30, 30]):
        rows, labels = random_rows("label sets" if kind == "label sets" else "", count, np.random.default_rng(seed))
        if seed == 3:
            rows[0, 1 if kind == "label sets" else 4] = torch.nan
        found = bootstrap.resampled_metrics(rows, collect, compute, labels)
        by_hand = [compute(collect(rows[torch.from_numpy(chosen)], labels), labels) for chosen in resamples(count)]
        assert found.keys() == by_hand[0].keys()
        for name, values in found.items():
            np.testing.assert_allclose(values, [row[name] for row in by_hand], rtol=1e-12, atol=1e-15, err_msg=name)


def test_that_groups_are_not_resampled_is_said():
    metrics, intervals = {"f1": 0.5}, {"f1": (0.4, 0.6)}
    assert "not the groups of data.group_column = 'author'" in describe_metrics(metrics, intervals, 0.95, "author")
    assert "group" not in describe_metrics(metrics, intervals, 0.95)
    assert "group" not in describe_metrics(metrics, {}, 0.0, "author")
    assert ["data.group_column" in note for note in describe_judging(EvalSettings(confidence=0.9), "author")] == [True]
    assert not describe_judging(EvalSettings(), "author")
