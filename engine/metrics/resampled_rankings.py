"""Metrics of a ranking on resamples of the examples, sorted once instead of once for each resample.

A resample is how often it has each example. So a running sum of these numbers, in the order of the scores, has the
examples above each score. All numbers are whole, so only the order of the last sum differs from engine/metrics/ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.metrics import by_example
from engine.metrics.ranking import MAX_SCORES

Counts = np.ndarray  # (N,) fp64, how often a resample has each example


class Weighted(NamedTuple):
    """The metrics of a task from the counts of a resample.

    additive: (N, K), rows whose sum, weighted by the counts, is the statistics without scores.
    rank: returns the metrics of rankings.
    """

    additive: Tensor
    rank: Callable[[Counts], dict[str, float]]


class ResampledRanking:
    """Several rankings of entries that belong to examples; entries of an example are drawn together.

    scores, labels: (L, M), L rankings; a label that is neither 0 nor 1 is no target. owners: (M,) the example of each.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray, owners: np.ndarray):
        order = np.argsort(-scores, axis=1, kind="stable")  # NaN last
        ranked, labels = (np.take_along_axis(x, order, axis=1) for x in (scores, labels))
        self.owners = owners[order]
        self.is_target = ((labels == 0) | (labels == 1)).astype(np.float64)
        self.is_positive = (labels == 1).astype(np.float64)
        self.is_nan = np.isnan(ranked) * self.is_target
        # The first and the last entry with the score of each entry
        is_first = np.ones(ranked.shape, dtype=bool)
        is_first[:, 1:] = np.diff(ranked, axis=1) != 0
        places = np.arange(ranked.shape[1])[None]
        self.first = np.maximum.accumulate(np.where(is_first, places, 0), axis=1)
        is_last = np.roll(is_first, -1, axis=1)
        self.last = np.minimum.accumulate(np.where(is_last, places, places[0, -1])[:, ::-1], axis=1)[:, ::-1]
        self.has_ties = not is_first.all()

    def __call__(self, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Return roc_auc and average_precision of each ranking, both (L,); NaN where they are undefined."""
        weights = counts[self.owners]
        positive = weights * self.is_positive
        targets = weights * self.is_target
        seen, hits = targets.cumsum(1), positive.cumsum(1)
        total, positives = seen[:, -1], hits[:, -1]
        pairs_of_all = positives * (total - positives)
        misses = seen - hits
        before = misses - (targets - positive)
        if self.has_ties:
            seen, hits, misses = (np.take_along_axis(x, self.last, axis=1) for x in (seen, hits, misses))
            before = np.take_along_axis(before, self.first, axis=1)
        precision = (positive * (hits / np.maximum(seen, 1))).sum(1) / np.maximum(positives, 1)
        below = (total - positives)[:, None] - (misses + before) / 2  # negatives, of an equal score one half
        area = np.where(pairs_of_all > 0, (positive * below).sum(1) / np.maximum(pairs_of_all, 1), np.nan)
        is_undefined = (total == 0) | ((weights * self.is_nan).sum(1) > 0)
        return np.where(is_undefined, np.nan, area), np.where(is_undefined, np.nan, precision)


def of_classes(rows: Tensor, labels: Sequence[str]) -> Weighted | None:
    """Return the metrics of by_example.collect_classes; None unless there are two classes, which alone are ranked."""
    if len(labels) != 2:
        return None
    loss, true, predicted, _, log_odds = rows.unbind(1)
    confusion = F.one_hot((true.clamp_min(0) * 2 + predicted).long(), 4) * (true >= 0)[:, None]
    additive = torch.cat([loss[:, None], confusion.double()], 1)
    ranking = ResampledRanking(log_odds[None].numpy(), true[None].numpy(), np.arange(len(rows)))

    def rank(counts: Counts) -> dict[str, float]:
        (area,), (precision,) = ranking(counts)
        return {"roc_auc": float(area), "average_precision": float(precision)}

    return Weighted(additive, rank)


def of_images(rows: Tensor, labels: Sequence[str]) -> Weighted | None:
    """Return the metrics of by_example.collect_images; None unless there are two classes."""
    found = of_classes(rows, labels)
    hits = rows[:, by_example.CLASS_COLUMNS.index("is_in_top")][:, None]
    return found and found._replace(additive=torch.cat([hits, found.additive], 1))


def of_label_sets(rows: Tensor, labels: Sequence[str]) -> Weighted | None:
    """Return the metrics of by_example.collect_label_sets; None where there are too many scores to rank."""
    count = len(rows) * len(labels)
    if not 0 < count <= MAX_SCORES:
        return None
    loss, logits, true, chosen = torch.split(rows, [1, *[len(labels)] * 3], 1)
    is_true, is_chosen = true > 0.5, chosen > 0
    is_exact = (is_true == is_chosen).all(1)[:, None]
    columns = [loss, torch.ones_like(loss), is_exact, is_true & is_chosen, is_chosen, is_true]
    scores, stored = logits.numpy(), true.numpy()
    every = np.arange(len(rows))
    of_each = ResampledRanking(scores.T, stored.T, every)
    together = ResampledRanking(scores.reshape(1, -1), stored.reshape(1, -1), every.repeat(len(labels)))

    def rank(counts: Counts) -> dict[str, float]:
        areas, precisions = of_each(counts)
        (area,), (precision,) = together(counts)
        values = {"roc_auc_micro": area, "roc_auc": areas.mean()}
        values |= {"average_precision_micro": precision, "average_precision": precisions.mean()}
        return {name: float(value) for name, value in values.items()}

    return Weighted(torch.cat([column.double() for column in columns], 1), rank)


# {collect of a task: its metrics from counts}; for the others every resample is collected anew.
WEIGHTED: dict[Callable[..., Tensor], Callable[[Tensor, Sequence[str]], Weighted | None]] = {
    by_example.add_rows: lambda rows, labels: Weighted(rows, lambda counts: {}),
    by_example.collect_classes: of_classes,
    by_example.collect_images: of_images,
    by_example.collect_label_sets: of_label_sets,
}
