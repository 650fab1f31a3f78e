"""Metrics from sums: each micro-batch adds to one vector, vectors add over ranks, and only then a metric is computed.

So a metric is the same for every evaluation batch size and every number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100


def classification_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """[sum of losses, confusion matrix row by row] in fp64; rows are true classes, columns predicted ones.

    logits: (B, C), labels: (B,) with IGNORE where there is no target. Returns (1 + C * C,).
    """
    num_labels = logits.shape[-1]
    target = labels != IGNORE
    cell = labels.clamp_min(0) * num_labels + logits.argmax(-1)
    confusion = torch.zeros(num_labels * num_labels, dtype=torch.float64, device=logits.device)
    confusion.index_add_(0, cell, target.double())
    return torch.cat([loss_sum.double().reshape(1), confusion])


def classification_metrics(statistics: Tensor) -> dict[str, float]:
    """loss, accuracy, and precision, recall and F1 averaged over the classes (macro), 0 where undefined.

    As in scikit-learn, the average is over the classes that occur, as a label or as a prediction: a file that lacks a
    class of the model can still be perfect. All ranks sum first, so they agree on which those are.
    """
    confusion = confusion_matrix(statistics)
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    per_class = precision_recall_f1(confusion)
    count = confusion.sum()
    return {
        "loss": (statistics[0] / count).item(),
        "accuracy": (confusion.diagonal().sum() / count).item(),
        **{name: values[occurs].mean().item() for name, values in per_class.items()},
    }


def confusion_matrix(statistics: Tensor) -> Tensor:
    """(C, C) counts: rows true, columns predicted."""
    num_labels = round((len(statistics) - 1) ** 0.5)
    return statistics[1:].view(num_labels, num_labels)


def precision_recall_f1(confusion: Tensor) -> dict[str, Tensor]:
    """Each (C,), one value a class. A class neither predicted nor present has 0 in all three (zero_division=0)."""
    hits = confusion.diagonal()
    predicted, actual = confusion.sum(0), confusion.sum(1)
    return {
        "precision": hits / predicted.clamp_min(1),
        "recall": hits / actual.clamp_min(1),
        "f1": 2 * hits / (predicted + actual).clamp_min(1),
    }
