"""Of numbers: correlations and errors, from a row (prediction, truth) for each example, since ranks do not add."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def regression_statistics(predicted: Tensor, truth: Tensor, indices: tuple[int, ...], count: int) -> Tensor:
    """A matrix of `count` rows (prediction, truth), flat in fp64: those of `indices` filled, the others 0.

    predicted, truth: (B,). Each example is in one batch of one rank, so the matrices add to the whole. Returns
    (2 * count,).
    """
    rows = torch.zeros(count, 2, dtype=torch.float64, device=predicted.device)
    rows[list(indices)] = torch.stack([predicted, truth], 1).double()
    return rows.flatten()


def regression_metrics(statistics: Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation, the mean squared error (also the loss) and the mean absolute error."""
    predicted, truth = statistics.view(-1, 2).cpu().numpy().T
    error = predicted - truth
    mse = float(np.mean(error**2)) if len(error) else math.nan
    return {
        "loss": mse,
        "pearson": pearson(predicted, truth),
        "spearman": pearson(average_ranks(predicted), average_ranks(truth)),
        "mse": mse,
        "mae": float(np.mean(np.abs(error))) if len(error) else math.nan,
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of two (N,) arrays, -1 to 1; NaN where there is none: fewer than two values, or one constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    dx, dy = x - x.mean(), y - y.mean()
    correlation = (dx / np.linalg.norm(dx)) @ (dy / np.linalg.norm(dy))
    return float(np.clip(correlation, -1, 1))  # a last digit beyond 1 is rounding


def average_ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value, (N,), in their order from 1; equal ones share the mean of theirs. NaN for any NaN."""
    if np.isnan(values).any():
        return np.full(len(values), math.nan)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
