"""Of classes, from a confusion matrix, and of labels that each are there or not, from three counts a label.

Where a quotient has no denominator it is 0, as scikit-learn's zero_division=0. An average over classes (macro) is over
those that occur, as a label or as a prediction: a file that lacks a class of the model can still be perfect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100
MOST_CLASSES = 20  # that the table shows, each with what it was taken for
MOST_LABELS = 50


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
    """loss, accuracy, precision, recall and F1 averaged over the classes (macro), F1 micro and weighted, and MCC.

    Micro F1 is over the decisions of all classes together; with one label to an example that is the accuracy. Weighted
    F1 gives each class the weight of its examples. All ranks sum first, so they agree on which classes occur.
    """
    confusion = confusion_matrix(statistics)
    count, actual = confusion.sum(), confusion.sum(1)
    occurs = confusion.sum(0) + actual > 0
    per_class = precision_recall_f1(confusion)
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
    """The correlation of labels with predictions, -1 to 1, 0 by chance, and where all are of one class.

    Matthews 1975; of more than two classes Gorodkin 2004, "Comparing two K-category assignments by a K-category
    correlation coefficient": cov(labels, predictions) / sqrt(cov(labels, labels) cov(predictions, predictions)).
    """
    predicted, actual, count = confusion.sum(0), confusion.sum(1), confusion.sum()
    together = confusion.diagonal().sum() * count - predicted @ actual
    apart = (count**2 - predicted @ predicted) * (count**2 - actual @ actual)
    return (together / apart.sqrt()).item() if apart > 0 else 0.0


def confusion_matrix(statistics: Tensor) -> Tensor:
    """(C, C) counts: rows true, columns predicted."""
    num_labels = round((len(statistics) - 1) ** 0.5)
    return statistics[1:].view(num_labels, num_labels)


def precision_recall_f1(confusion: Tensor) -> dict[str, Tensor]:
    """Each (C,), one value a class. A class neither predicted nor present has 0 in all three."""
    return _precision_recall_f1(confusion.diagonal(), confusion.sum(0), confusion.sum(1))


def _precision_recall_f1(hits: Tensor, predicted: Tensor, actual: Tensor) -> dict[str, Tensor]:
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


def multi_label_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """[sum of losses, examples, examples with every label right, then of each label hits, predictions, labels].

    In fp64. logits, labels: (B, C), a label is 1 where it is there, else 0; it is predicted where its probability is
    above a half. Returns (3 + 3 * C,).
    """
    predicted, actual = predicted_labels(logits), labels > 0.5
    counts = [(predicted & actual).sum(0), predicted.sum(0), actual.sum(0)]
    exact = (predicted == actual).all(-1).sum()
    head = torch.stack([loss_sum.double(), exact.new_tensor(len(logits)).double(), exact.double()])
    return torch.cat([head, *(count.double() for count in counts)])


def predicted_labels(logits: Tensor) -> Tensor:
    """Which labels have a probability above a half: (B, C) of logits -> of bool."""
    return logits > 0


def multi_label_metrics(statistics: Tensor) -> dict[str, float]:
    """loss by label; precision, recall and F1 over all decisions (micro) and averaged over the labels (macro).

    subset_accuracy: the share of the examples of which every label is right.
    """
    loss_sum, count, exact = statistics[:3].tolist()
    counts = statistics[3:].view(3, -1)
    occurs = counts[1:].sum(0) > 0
    micro, macro = _precision_recall_f1(*counts.sum(1)), _precision_recall_f1(*counts)
    return {
        "loss": loss_sum / (count * counts.shape[1]) if count else math.nan,
        "subset_accuracy": exact / count if count else math.nan,
        **{f"{name}_micro": value.item() for name, value in micro.items()},
        **{name: values[occurs].mean().item() if occurs.any() else 0.0 for name, values in macro.items()},
    }


def per_label_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Precision, recall, F1 and the counts of each label, the most frequent first."""
    counts = statistics[3:].view(3, -1)
    values = _precision_recall_f1(*counts)
    order = sorted(range(len(labels)), key=lambda i: -counts[2, i].item())[:MOST_LABELS]
    width = max(len(labels[i]) for i in order)
    lines = [f"{'':>{width}}  precision  recall      f1  count  predicted"]
    for i in order:
        p, r, f = (values[name][i].item() for name in ("precision", "recall", "f1"))
        _, predicted, actual = counts[:, i].tolist()
        lines.append(f"{labels[i]:>{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {int(actual):>5}  {int(predicted):>9}")
    if more := len(labels) - len(order):
        lines.append(f"and {more:,} more labels")
    return "\n".join(lines)
