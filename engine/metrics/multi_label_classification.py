"""Metrics of multi-label classification: counts of each label, and the ranking of the examples by its score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.notes import align_right, display_width, short_label
from engine.metrics.counts import SCORE_HEADER, format_scores, macro_averages, precision_recall_f1, present_averages
from engine.metrics.ranking import average_precision, ranked_by_label, roc_auc, score_statistics

MAX_LABELS_SHOWN = 50
HEADER_SIZE = 3  # numbers before the counts
RANKINGS = {"roc_auc": roc_auc, "average_precision": average_precision}


def multi_label_statistics(
    loss_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    indices: Sequence[int] = (),
    count: int = 0,
    predicted: Tensor | None = None,
) -> Tensor:
    """Return [sum of losses, examples, examples with every label right, hits, predictions, occurrences of each label].

    logits: (B, C). labels: (B, C), 1 where the example has the label, else 0. A label is predicted where its
    probability is above one half. Returns (3 + 3 * C,) fp64.
    indices: the positions of the examples in their data set of `count`. With them the scores of all examples follow,
    (2 * C * count,).
    predicted: (B, C) bool, the predicted labels, where the model has thresholds of its own.
    """
    predicted, actual = predicted_labels(logits) if predicted is None else predicted, labels > 0.5
    counts = [(predicted & actual).sum(0), predicted.sum(0), actual.sum(0)]
    exact = (predicted == actual).all(-1).sum()
    header = torch.stack([loss_sum.double(), loss_sum.new_full((), len(logits), dtype=torch.float64), exact.double()])
    scores = [score_statistics(logits, labels, indices, count)] if count else []
    return torch.cat([header, *(count.double() for count in counts), *scores])


def predicted_labels(logits: Tensor) -> Tensor:
    """Return (B, C) bool: which labels have a probability above one half."""
    return logits > 0


def multi_label_metrics(statistics: Tensor, num_labels: int = 0) -> dict[str, float]:
    """Return the loss per label; precision, recall and F1 over all decisions (micro) and as means of labels (macro).

    - subset_accuracy is the share of the examples whose labels are all right.
    - Macro averages are over all labels, and a label that never occurs counts as 0 (scikit-learn's default). f1_present
      is over the labels that occur, as a label or as a prediction.
    - The area under the ROC curve and average precision are means of labels too; micro ranks the scores of all labels
      together. The area is NaN for a label that no example has, or all have, and then the mean is NaN too.

    num_labels: C; 0 for statistics without scores.
    """
    loss_sum, num_examples, exact = statistics[:HEADER_SIZE].tolist()
    counts, ranked = _counts(statistics, num_labels), _ranked(statistics, num_labels)
    micro = precision_recall_f1(*counts.sum(1))
    values = {
        "loss": loss_sum / (num_examples * counts.shape[1]) if num_examples else math.nan,
        "subset_accuracy": exact / num_examples if num_examples else math.nan,
        **{f"{name}_micro": value.item() for name, value in micro.items()},
        **macro_averages(*counts),
        "f1_present": present_averages(*counts)["f1"],
    }
    together = [np.concatenate(column) for column in zip(*ranked, strict=True)]
    for name, function in RANKINGS.items():
        values[f"{name}_micro"] = function(*together) if ranked else math.nan
        values[name] = float(np.mean([function(*label) for label in ranked])) if ranked else math.nan
    return values


def per_label_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return a line for each label, the most frequent first: its scores, its count, its predictions, its ranking."""
    counts, ranked = _counts(statistics, len(labels)), _ranked(statistics, len(labels))
    _, predicted, actual = counts
    scores = precision_recall_f1(*counts)
    order = sorted(range(len(labels)), key=lambda i: -actual[i].item())[:MAX_LABELS_SHOWN]
    names = {i: short_label(labels[i]) for i in order}
    width = max(map(display_width, names.values()))
    lines = [f"{'':>{width}}  {SCORE_HEADER}  predicted" + "".join(f"  {name}" for name in RANKINGS if ranked)]
    for i in order:
        line = f"{align_right(names[i], width)}  {format_scores(scores, actual, i)}  {int(predicted[i]):>9}"
        values = {name: function(*ranked[i]) for name, function in RANKINGS.items()} if ranked else {}
        lines.append(line + "".join(f"  {value:>{len(name)}.4f}" for name, value in values.items()))
    if more := len(labels) - len(order):
        lines.append(f"and {more:,} more labels")
    return "\n".join(lines)


def _counts(statistics: Tensor, num_labels: int) -> Tensor:
    """Return (3, C): hits, predictions, occurrences."""
    end = HEADER_SIZE + 3 * num_labels if num_labels else len(statistics)
    return statistics[HEADER_SIZE:end].view(3, -1)


def _ranked(statistics: Tensor, num_labels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the scores and labels of all examples, for each label; [] where there are none."""
    scores = statistics[HEADER_SIZE + 3 * num_labels :]
    return ranked_by_label(scores, num_labels) if num_labels and len(scores) else []
