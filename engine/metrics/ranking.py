"""Metrics of a ranking: the area under the ROC curve and average precision, as in scikit-learn.

Ranks do not add over batches. So the statistics keep every score, at the position of its example in the data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.metrics.text_regression import average_ranks
from models.ops.packing import to_device

MAX_SCORES = 10_000_000  # scores of a data set; with more none are kept, and the metrics are NaN
NEGATIVE, POSITIVE = 1.0, 2.0  # a stored label; 0: no target

Ranked = tuple[np.ndarray, np.ndarray]  # (scores, whether each is of a positive example)


def score_statistics(scores: Tensor, labels: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Return `count` rows of (C scores, C labels), flat, (2 * C * count,) fp64; rows not in `indices` are 0.

    scores, labels: (B, C). labels: 1, 0, or no target (any other value). Returns (0,) for more than MAX_SCORES.
    """
    num_labels = scores.shape[1]
    if count * num_labels > MAX_SCORES:
        return torch.zeros(0, dtype=torch.float64, device=scores.device)
    rows = torch.zeros(count, 2, num_labels, dtype=torch.float64, device=scores.device)
    stored = torch.where(labels == 1, POSITIVE, NEGATIVE).where((labels == 0) | (labels == 1), 0.0)
    positions = to_device(torch.tensor(list(indices), dtype=torch.int64), scores.device)
    return rows.index_copy_(0, positions, torch.stack([scores.double(), stored.double()], 1)).flatten()


def ranked_by_label(statistics: Tensor, num_labels: int) -> list[Ranked]:
    """Return the scores and labels of all targets, for each of the C labels, from score_statistics."""
    rows = statistics.view(-1, 2, num_labels).cpu().numpy()
    targets = ((rows[:, 0, i], rows[:, 1, i]) for i in range(num_labels))
    return [(scores[stored > 0], stored[stored > 0] == POSITIVE) for scores, stored in targets]


def roc_auc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs in the right order, a tie counting half; NaN without a pair.

    This is the area under the ROC curve (Hanley & McNeil 1982).
    """
    positives = int(is_positive.sum())
    negatives = len(is_positive) - positives
    if not positives or not negatives:
        return math.nan
    rank_sum = average_ranks(scores)[is_positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the sum of precision * gain in recall over the distinct scores, the highest first; 0 without a positive.

    Equal scores are one step, as in scikit-learn. NaN for any NaN, and without an example.
    """
    if not len(scores) or np.isnan(scores).any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(is_positive[order])[last_of_ties]
    precision = hits / (last_of_ties + 1)
    return float(np.diff(hits, prepend=0) @ precision / max(int(is_positive.sum()), 1))
