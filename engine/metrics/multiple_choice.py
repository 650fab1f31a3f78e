"""Metrics of multiple choice: the share of the examples whose right choice has the highest score."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def choice_rows(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return [loss, whether the likeliest choice is the right one, 1] of each example, (N, 3) fp64.

    log_probabilities: (N, most choices), -inf behind the last choice of an example. labels: (N,).
    """
    if not len(labels):
        return log_probabilities.new_zeros(0, 3, dtype=torch.float64)
    loss = -log_probabilities.gather(1, labels[:, None]).squeeze(1).double()
    right = (log_probabilities.argmax(1) == labels).double()
    return torch.stack([loss, right, torch.ones_like(loss)], 1)


def choice_metrics(statistics: Tensor) -> dict[str, float]:
    """Return accuracy and the loss of an example; NaN without examples."""
    loss_sum, right, count = statistics.tolist()
    return {
        "loss": loss_sum / count if count else math.nan,
        "accuracy": right / count if count else math.nan,
    }
