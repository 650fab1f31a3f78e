"""Metrics of text regression: correlations and errors. Ranks do not add, so every (prediction, truth) is kept."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from models.ops.packing import to_device


def regression_statistics(predicted: Tensor, truth: Tensor, indices: tuple[int, ...], count: int) -> Tensor:
    """Return a matrix of `count` rows (prediction, truth), flat, (2 * count,) fp64; rows not in `indices` are 0.

    predicted, truth: (B,). Each example is in one batch of one rank, so the sum of the matrices has all rows.
    """
    rows = torch.zeros(count, 2, dtype=torch.float64, device=predicted.device)
    positions = to_device(torch.tensor(indices, dtype=torch.int64), predicted.device)
    return rows.index_copy_(0, positions, torch.stack([predicted, truth], 1).double()).flatten()


def regression_metrics(statistics: Tensor) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, the mean squared error (also the loss) and mean absolute error."""
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
    """Return the correlation of two (N,) arrays, in [-1, 1]; NaN for fewer than two values or a constant array."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    dx, dy = x - x.mean(), y - y.mean()
    correlation = (dx / np.linalg.norm(dx)) @ (dy / np.linalg.norm(dy))
    return float(np.clip(correlation, -1, 1))  # rounding can exceed 1 in the last digit


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, (N,), from 1; equal values share the mean of their ranks. All NaN for any NaN."""
    if np.isnan(values).any():
        return np.full(len(values), math.nan)
    _, order, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[order])
