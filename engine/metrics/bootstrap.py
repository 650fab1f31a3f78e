"""Percentile bootstrap over examples (Efron & Tibshirani 1993): intervals of metrics, and paired tests of two models.

A resample takes as many examples as the data set has, with replacement, and every metric is computed anew from their
rows, as of a data set of its own. So it serves metrics of a corpus (BLEU, F1 of entities, perplexity) as well as means.
The resamples depend on the number of examples alone: the seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.metrics.resampled_rankings import WEIGHTED

RESAMPLES = 1000
SEED = 0
MAX_NUMBERS = 40_000_000  # of all rows together, 320 MB; with more there are no intervals

Collect = Callable[[Tensor, Sequence[str]], Tensor]
Compute = Callable[[Tensor, Sequence[str]], dict[str, float]]
Interval = tuple[float, float]


def resamples(count: int) -> Iterator[np.ndarray]:
    """Yield the examples of each resample, (count,) int64."""
    rng = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield rng.integers(0, count, count)


def resampled_metrics(rows: Tensor, collect: Collect, compute: Compute, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Return each metric of each resample, (RESAMPLES,); NaN where it is undefined there.

    rows: (N, K) fp64, those of the examples.
    """
    found: list[dict[str, float]] = []
    weighted = WEIGHTED[collect](rows, labels) if collect in WEIGHTED else None
    for chosen in resamples(len(rows)):
        if weighted is None:
            found.append(compute(collect(rows[torch.from_numpy(chosen)], labels), labels))
        else:  # without a copy of the rows, and without sorting the scores again
            counts = np.bincount(chosen, minlength=len(rows)).astype(np.float64)
            values = compute(torch.from_numpy(counts) @ weighted.additive, labels)
            found.append(values | weighted.rank(counts))
    names = dict.fromkeys(name for values in found for name in values)
    return {name: np.array([values.get(name, math.nan) for values in found]) for name in names}


def interval_of(values: np.ndarray, confidence: float) -> Interval:
    """Return the quantiles of the values that leave out (1 - confidence) / 2 on each side; NaN are left out before."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):  # between two infinite values
        low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def confidence_intervals(
    rows: Tensor, collect: Collect, compute: Compute, labels: Sequence[str], confidence: float
) -> dict[str, Interval]:
    """Return {metric: (low, high)} of all metrics."""
    values = resampled_metrics(rows, collect, compute, labels)
    return {name: interval_of(of_metric, confidence) for name, of_metric in values.items()}


def explain_groups(group_column: str) -> str:
    """Return that groups are not resampled; "" where the data has none. group_column: data.group_column."""
    if not group_column:
        return ""
    return (
        f"the intervals resample examples, not the groups of data.group_column = {group_column!r}: they are too narrow "
        "where the examples of a group are alike"
    )


def describe_metrics(
    metrics: Mapping[str, float], intervals: Mapping[str, Interval], confidence: float, group_column: str = ""
) -> str:
    """Return a line for each metric, with its interval where it has one."""
    width = max(10, *map(len, metrics))
    bounds = {name: f"  [{low:.4f}, {high:.4f}]" for name, (low, high) in intervals.items()}
    lines = [f"{name:>{width}}  {value:.4f}{bounds.get(name, '')}" for name, value in metrics.items()]
    if bounds:
        lines.append(f"in brackets: {confidence:.4g} bootstrap intervals over the examples")
        lines += [note] if (note := explain_groups(group_column)) else []
    return "\n".join(lines)


class Comparison(NamedTuple):
    """A metric of two models on the same examples: a minus b, its interval, and the p-value of no difference."""

    a: float
    b: float
    difference: float
    interval: Interval
    p_value: float
    test: str


def compare_metrics(
    rows: tuple[Tensor, Tensor], collect: Collect, compute: Compute, labels: Sequence[str], confidence: float
) -> dict[str, Comparison]:
    """Return each metric of two models compared on the same resamples, by a two-sided approximate permutation test.

    rows: (N, K) of both models, in the same order. The test exchanges the two models' results on each example with
    probability one half (Noreen 1989); p = (1 + exchanges with at least this difference) / (1 + all).
    """
    a, b = (compute(collect(of_model, labels), labels) for of_model in rows)
    values = [resampled_metrics(of_model, collect, compute, labels) for of_model in rows]
    names = [name for name in a if name in b and name in values[0] and name in values[1]]
    exceeding, tried = _count_exchanges(rows, collect, compute, labels, {name: a[name] - b[name] for name in names})
    found = {}
    for name in names:
        interval = interval_of(values[0][name] - values[1][name], confidence)
        p = (1 + exceeding[name]) / (1 + tried[name]) if tried[name] else math.nan
        found[name] = Comparison(a[name], b[name], a[name] - b[name], interval, p, "permutation")
    return found


def _count_exchanges(
    rows: tuple[Tensor, Tensor], collect: Collect, compute: Compute, labels: Sequence[str], observed: dict[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return, for each metric, the exchanges with at least the observed difference, and those where it is defined."""
    rng = np.random.default_rng(SEED)
    exceeding, tried = dict.fromkeys(observed, 0), dict.fromkeys(observed, 0)
    for _ in range(RESAMPLES):
        exchanged = torch.from_numpy(rng.integers(0, 2, len(rows[0])) == 1)[:, None]
        a, b = torch.where(exchanged, rows[1], rows[0]), torch.where(exchanged, rows[0], rows[1])
        values = [compute(collect(of_model, labels), labels) for of_model in (a, b)]
        for name, difference in observed.items():
            found = values[0].get(name, math.nan) - values[1].get(name, math.nan)
            if not math.isnan(found):
                tried[name] += 1
                exceeding[name] += abs(found) >= abs(difference) - 1e-12
    return exceeding, tried


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947): a binomial test of the examples that differ.

    only_a, only_b: the numbers of examples that only one of the two models has right.
    """
    total, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    largest = max(logs)
    tail = largest + math.log(sum(math.exp(value - largest) for value in logs)) - total * math.log(2)
    return min(1.0, 2 * math.exp(tail))
