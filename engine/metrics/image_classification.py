"""Of classes of images: those of any classes, and whether the true one is among the five likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.metrics.text_classification import (
    classification_metrics,
    classification_statistics,
    confusion_matrix,
    per_class_table,
)

TOP = 5
SHOWN = ("accuracy", "top5_accuracy", "f1", "precision", "recall", "loss")


def image_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """[hits among the first five, then classification_statistics] in fp64. logits: (B, C), labels: (B,).

    Of equal logits the first class comes first, as in argmax, so that a constant model is not right; a NaN is behind
    nothing.
    """
    true = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead = ~(logits <= true) | ((logits == true) & earlier)
    hits = (ahead.sum(1) < TOP).double().sum()
    return torch.cat([hits.reshape(1), classification_statistics(loss_sum, logits, labels)])


def image_metrics(statistics: Tensor) -> dict[str, float]:
    """Accuracy (top-1), top-5 accuracy, precision, recall and F1 averaged over the classes (macro), and the loss.

    With fewer than six classes top-5 accuracy is always 1.
    """
    count = confusion_matrix(statistics[1:]).sum()
    values = classification_metrics(statistics[1:]) | {"top5_accuracy": (statistics[0] / count).item()}
    return {name: values[name] for name in SHOWN}


def image_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """The table of the classes, and what top-5 accuracy is worth."""
    note = f"\ntop-5 accuracy says nothing of {len(labels)} classes" if len(labels) <= TOP else ""
    return per_class_table(statistics[1:], labels) + note
