"""Metrics of multiple choice: the share of the examples whose right choice has the highest score."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def choice_statistics(loss_sum: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
    """Return [sum of losses, right answers, examples], (3,) fp64. chosen, labels: (N,) numbers of choices."""
    right, count = (chosen == labels).sum(), loss_sum.new_full((), len(labels), dtype=torch.float64)
    return torch.stack([loss_sum.double(), right.double(), count])


def choice_metrics(statistics: Tensor) -> dict[str, float]:
    """Return accuracy and the loss of an example; NaN without examples."""
    loss_sum, right, count = statistics.tolist()
    return {
        "loss": loss_sum / count if count else math.nan,
        "accuracy": right / count if count else math.nan,
    }
