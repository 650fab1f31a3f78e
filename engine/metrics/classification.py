"""Of classes: accuracy, precision, recall, F1, from a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100
MOST_CLASSES = 20  # that the table shows


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


def per_class_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Precision, recall, F1 and count of each of the first classes, and what it was taken for."""
    confusion = confusion_matrix(statistics)
    values = precision_recall_f1(confusion)
    shown = labels[:MOST_CLASSES]
    more = len(labels) - len(shown)
    width = max(map(len, shown))
    header = f"{', '.join(shown)}{f' and {more:,} more' if more else ''}"
    lines = [f"{'':>{width}}  precision  recall      f1  count  predicted as {header}"]
    for i, label in enumerate(shown):
        p, r, f = (values[name][i].item() for name in ("precision", "recall", "f1"))
        counts = " ".join(f"{int(n)}" for n in confusion[i, : len(shown)])
        if more:
            counts += f" {int(confusion[i, len(shown) :].sum())}"  # taken for one that is not shown
        lines.append(f"{label:>{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {int(confusion[i].sum()):>5}  {counts}")
    if more:
        lines.append(f"and {more:,} more classes")
    return "\n".join(lines)
