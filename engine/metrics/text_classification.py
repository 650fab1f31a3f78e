"""Metrics of text classification, from a confusion matrix.

A quotient with denominator 0 is 0, as with scikit-learn's zero_division=0. A macro average is over the classes that
occur, as a label or as a prediction. A file that lacks a class of the model can therefore still reach 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX
from engine.metrics.counts import SCORE_HEADER, format_scores, precision_recall_f1

MAX_CLASSES_SHOWN = 20  # rows and columns of the table


def classification_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return [sum of losses, confusion matrix row by row], (1 + C * C,) fp64; rows: true classes, columns: predicted.

    logits: (B, C). labels: (B,), IGNORE_INDEX where there is no target.
    """
    num_labels = logits.shape[-1]
    is_target = labels != IGNORE_INDEX
    cell = labels.clamp_min(0) * num_labels + logits.argmax(-1)
    confusion = torch.zeros(num_labels * num_labels, dtype=torch.float64, device=logits.device)
    confusion.index_add_(0, cell, is_target.double())
    return torch.cat([loss_sum.double().reshape(1), confusion])


def classification_metrics(statistics: Tensor) -> dict[str, float]:
    """Return loss, accuracy, macro precision, recall and F1, micro and weighted F1, and MCC.

    - Micro F1 is over the decisions on all classes together; with one label per example it equals the accuracy.
    - Weighted F1 weights each class by its number of examples.
    - Statistics are summed over all ranks beforehand, so the ranks agree on which classes occur.
    """
    confusion = confusion_matrix(statistics)
    count, actual = confusion.sum(), confusion.sum(1)
    occurs = confusion.sum(0) + actual > 0
    per_class = per_class_scores(confusion)
    accuracy = (confusion.diagonal().sum() / count).item()
    return {
        "loss": (statistics[0] / count).item(),
        "accuracy": accuracy,
        **{name: values[occurs].mean().item() for name, values in per_class.items()},
        "f1_micro": accuracy,
        "f1_weighted": (per_class["f1"] @ actual / count).item(),
        "mcc": matthews_correlation(confusion),
    }


def matthews_correlation(confusion: Tensor) -> float:
    """Return the correlation of labels with predictions, in [-1, 1]; 0 by chance, and if all are of one class.

    Matthews 1975. For more than two classes Gorodkin 2004, "Comparing two K-category assignments by a K-category
    correlation coefficient": cov(labels, predictions) / sqrt(cov(labels, labels) cov(predictions, predictions)).
    """
    predicted, actual, count = confusion.sum(0), confusion.sum(1), confusion.sum()
    covariance = confusion.diagonal().sum() * count - predicted @ actual
    variances = (count**2 - predicted @ predicted) * (count**2 - actual @ actual)
    return (covariance / variances.sqrt()).item() if variances > 0 else 0.0


def confusion_matrix(statistics: Tensor) -> Tensor:
    """Return the (C, C) counts of classification_statistics; rows: true classes, columns: predicted."""
    num_labels = round((len(statistics) - 1) ** 0.5)
    return statistics[1:].view(num_labels, num_labels)


def per_class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 of each class, (C,) each; 0 for a class neither predicted nor present."""
    return precision_recall_f1(confusion.diagonal(), confusion.sum(0), confusion.sum(1))


def per_class_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return a line for each of the first classes: its scores, its count, and what its examples were predicted as."""
    confusion = confusion_matrix(statistics)
    scores, actual = per_class_scores(confusion), confusion.sum(1)
    shown = labels[:MAX_CLASSES_SHOWN]
    more = len(labels) - len(shown)
    width = max(map(len, shown))
    columns = f"{', '.join(shown)}{f' and {more:,} more' if more else ''}"
    lines = [f"{'':>{width}}  {SCORE_HEADER}  predicted as {columns}"]
    for i, label in enumerate(shown):
        counts = " ".join(f"{int(n)}" for n in confusion[i, : len(shown)])
        if more:
            counts += f" {int(confusion[i, len(shown) :].sum())}"  # predictions of classes that are not shown
        lines.append(f"{label:>{width}}  {format_scores(scores, actual, i)}  {counts}")
    if more:
        lines.append(f"and {more:,} more classes")
    return "\n".join(lines)
