"""Metrics of multi-label classification, from three counts of each label: hits, predictions and occurrences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.metrics.counts import SCORE_HEADER, format_scores, macro_averages, precision_recall_f1

MAX_LABELS_SHOWN = 50
HEADER_SIZE = 3  # numbers before the counts


def multi_label_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return [sum of losses, examples, examples with every label right, hits, predictions, occurrences of each label].

    logits: (B, C). labels: (B, C), 1 where the example has the label, else 0. A label is predicted where its
    probability is above one half. Returns (3 + 3 * C,) fp64.
    """
    predicted, actual = predicted_labels(logits), labels > 0.5
    counts = [(predicted & actual).sum(0), predicted.sum(0), actual.sum(0)]
    exact = (predicted == actual).all(-1).sum()
    header = torch.stack([loss_sum.double(), exact.new_tensor(len(logits)).double(), exact.double()])
    return torch.cat([header, *(count.double() for count in counts)])


def predicted_labels(logits: Tensor) -> Tensor:
    """Return (B, C) bool: which labels have a probability above one half."""
    return logits > 0


def multi_label_metrics(statistics: Tensor) -> dict[str, float]:
    """Return the loss per label, precision, recall and F1 over all decisions (micro) and as means of labels (macro).

    subset_accuracy is the share of the examples whose labels are all right.
    """
    loss_sum, num_examples, exact = statistics[:HEADER_SIZE].tolist()
    counts = _counts(statistics)
    micro = precision_recall_f1(*counts.sum(1))
    return {
        "loss": loss_sum / (num_examples * counts.shape[1]) if num_examples else math.nan,
        "subset_accuracy": exact / num_examples if num_examples else math.nan,
        **{f"{name}_micro": value.item() for name, value in micro.items()},
        **macro_averages(*counts),
    }


def per_label_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return a line for each label, the most frequent first: its scores, its count and its predictions."""
    counts = _counts(statistics)
    _, predicted, actual = counts
    scores = precision_recall_f1(*counts)
    order = sorted(range(len(labels)), key=lambda i: -actual[i].item())[:MAX_LABELS_SHOWN]
    width = max(len(labels[i]) for i in order)
    lines = [f"{'':>{width}}  {SCORE_HEADER}  predicted"]
    lines += [f"{labels[i]:>{width}}  {format_scores(scores, actual, i)}  {int(predicted[i]):>9}" for i in order]
    if more := len(labels) - len(order):
        lines.append(f"and {more:,} more labels")
    return "\n".join(lines)


def _counts(statistics: Tensor) -> Tensor:
    """Return (3, C): hits, predictions, occurrences."""
    return statistics[HEADER_SIZE:].view(3, -1)
