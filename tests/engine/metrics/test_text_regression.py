"""Metrics of scores against scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.metrics.text_regression import average_ranks, pearson, regression_metrics, regression_statistics
from engine.tasks import TASKS

RNG = np.random.default_rng(0)
SCORES = {
    "random": (RNG.normal(size=200), RNG.normal(size=200)),
    "correlated": (x := RNG.normal(size=50), x + 0.1 * RNG.normal(size=50)),
    "ties": (RNG.integers(0, 4, 60).astype(float), RNG.integers(0, 3, 60).astype(float)),
    "exact": (np.arange(5.0), 3 * np.arange(5.0) + 1),
    "reversed": (np.arange(5.0), -np.arange(5.0)),
    "monotone": (np.arange(9.0), np.exp(np.arange(9.0))),
    "far-from-zero": (1e6 + RNG.normal(size=30), -1e6 + RNG.normal(size=30)),
    "outlier": (np.array([0.0, 0, 0, 1e4]), np.array([1.0, 2, 3, 4])),
    "two": (np.array([1.0, 2]), np.array([5.0, 3])),
    "constant": (np.full(6, 0.1), np.arange(6.0)),
    "one": (np.array([1.0]), np.array([2.0])),
}


@pytest.mark.parametrize(("predicted", "truth"), SCORES.values(), ids=SCORES.keys())
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_metrics_of_scores_are_those_of_scipy_and_sklearn(predicted, truth):
    stats, sklearn = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    p, t = torch.from_numpy(predicted), torch.from_numpy(truth)
    found = regression_metrics(regression_statistics(p, t, tuple(range(len(p))), len(p)))
    mse = sklearn.mean_squared_error(truth, predicted)
    expected = {"loss": mse, "mse": mse, "mae": sklearn.mean_absolute_error(truth, predicted)}
    enough = len(predicted) > 1
    expected["pearson"] = stats.pearsonr(predicted, truth)[0] if enough else math.nan
    expected["spearman"] = stats.spearmanr(predicted, truth)[0] if enough else math.nan
    assert found.keys() == expected.keys() == {*TASKS["text-regression"].metrics}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


def test_ranks_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for size in range(1, 30):
        values = RNG.integers(0, size, size).astype(float)
        assert average_ranks(values).tolist() == stats.rankdata(values).tolist()
    assert np.isnan(average_ranks(np.array([1.0, math.nan]))).all()


def test_a_nan_among_the_predictions_is_a_nan_of_every_metric():
    rows = regression_statistics(torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 2.0, 3.0]), (0, 1, 2), 3)
    assert all(math.isnan(value) for value in regression_metrics(rows).values())
    assert math.isnan(pearson(np.array([]), np.array([])))


@pytest.mark.parametrize("size", [1, 3, 16, 50])
def test_p02_score_metrics_are_equal_in_any_order_and_split(size):
    predicted, truth = (torch.from_numpy(values) for values in SCORES["correlated"])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(size))
    total = regression_statistics(predicted[:0], truth[:0], (), 50)
    for part in order.split(size):
        total += regression_statistics(predicted[part], truth[part], tuple(part.tolist()), 50)
    assert torch.equal(total, regression_statistics(predicted, truth, tuple(range(50)), 50))
