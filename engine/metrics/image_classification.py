"""Metrics of image classification: those of text classification, and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.metrics.text_classification import (
    POSITIVE_CLASS_METRICS,
    class_counts,
    classification_metrics,
    classification_statistics,
    per_class_table,
)

TOP_K = 5
METRICS = (
    *("accuracy", "top5_accuracy", "f1", "precision", "recall", "f1_present"),
    *(*POSITIVE_CLASS_METRICS, "loss"),
)


def image_statistics(
    loss_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    indices: Sequence[int] = (),
    count: int = 0,
    predicted: Tensor | None = None,
) -> Tensor:
    """Return [top-5 hits, *classification_statistics], fp64, whose length depends on C.

    logits: (B, C), labels: (B,); the others: as in classification_statistics. Of equal logits the first class ranks
    first, as in argmax, so that a constant model is not always right. A NaN is never a hit.
    """
    true = logits.gather(1, labels[:, None])
    is_earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    is_ahead = ~(logits <= true) | ((logits == true) & is_earlier)
    hits = (is_ahead.sum(1) < TOP_K).double().sum()
    statistics = classification_statistics(loss_sum, logits, labels, indices, count, predicted)
    return torch.cat([hits.reshape(1), statistics])


def image_metrics(statistics: Tensor) -> dict[str, float]:
    """Return accuracy (top-1), top-5 accuracy, macro precision, recall and F1, and the loss; more for two classes.

    They are those of classification_metrics. With fewer than six classes top-5 accuracy is always 1.
    """
    count = class_counts(statistics[1:])[2].sum()
    values = classification_metrics(statistics[1:]) | {"top5_accuracy": (statistics[0] / count).item()}
    return {name: values[name] for name in METRICS if name in values}


def image_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return the table of the classes, with a note if top-5 accuracy is always 1."""
    note = f"\ntop-5 accuracy is always 1 with {len(labels)} classes" if len(labels) <= TOP_K else ""
    return per_class_table(statistics[1:], labels) + note
