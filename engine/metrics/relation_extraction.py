"""Of relations: micro-averaged F1 of all but the label that is no relation, as TACRED is scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.metrics import text_classification as classification

COUNTED = 3  # hits, predicted, actual: they come before classification_statistics


def relation_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor, negative: int | None) -> Tensor:
    """[hits, predicted, actual] of all classes but `negative`, then classification_statistics; fp64.

    logits: (B, C), labels: (B,); negative: a class, or None where every class counts. Returns (3 + 1 + C * C,).
    """
    statistics = classification.classification_statistics(loss_sum, logits, labels)
    confusion = classification.confusion_matrix(statistics)
    counted = torch.ones(len(confusion), dtype=torch.float64, device=logits.device)
    if negative is not None:
        counted[negative] = 0
    sums = (confusion.diagonal(), confusion.sum(0), confusion.sum(1))
    return torch.cat([torch.stack([x @ counted for x in sums]), statistics])


def relation_metrics(statistics: Tensor) -> dict[str, float]:
    """f1, precision and recall over all relations together (micro), accuracy, with the negative label, and loss.

    Zhang et al. 2017 (Position-aware Attention and Supervised Data Improve Slot Filling): a relation found where there
    is none costs precision, one missed costs recall, and the negative label rightly found is worth nothing. A ratio of
    0 / 0 is 0.
    """
    hits, predicted, actual = statistics[:COUNTED]
    of_classes = classification.classification_metrics(statistics[COUNTED:])
    return {
        "f1": (2 * hits / (predicted + actual).clamp_min(1)).item(),
        "precision": (hits / predicted.clamp_min(1)).item(),
        "recall": (hits / actual.clamp_min(1)).item(),
        "accuracy": of_classes["accuracy"],
        "loss": of_classes["loss"],
    }


def relation_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Each relation's precision, recall, F1 and count, and what it was taken for; the negative label's too."""
    return classification.per_class_table(statistics[COUNTED:], labels)
