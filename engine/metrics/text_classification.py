"""Metrics of text classification, from the counts of each class, or a confusion matrix where there are few classes.

A quotient with denominator 0 is 0, as with scikit-learn's zero_division=0. A macro average is over all classes of the
model (scikit-learn: labels=range(C)). On a file that lacks one it cannot reach 1; `f1_present` can.

Of two classes the second is the positive one, as with scikit-learn's pos_label=1. Then precision, recall and F1 of this
class are metrics too, and those of the ranking by its probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX
from data.notes import align_right, display_width, short_label
from engine.errors import TrainingError
from engine.metrics.counts import SCORE_HEADER, format_scores, macro_averages, precision_recall_f1, present_averages
from engine.metrics.ranking import average_precision, ranked_by_label, roc_auc, score_statistics

MAX_CLASSES_SHOWN = 20  # rows and columns of the table
POSITIVE_CLASS_METRICS = ("f1_positive", "precision_positive", "recall_positive", "roc_auc", "average_precision")
MAX_MATRIX = 1_000  # classes of a confusion matrix, which then has 8 MB; of more, only counts of each class
HEADER_SIZE_OF_TWO = 1 + 2 * 2  # numbers before the scores of two classes


def classification_statistics(
    loss_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    indices: Sequence[int] = (),
    count: int = 0,
    predicted: Tensor | None = None,
) -> Tensor:
    """Return [sum of losses, confusion matrix row by row], (1 + C * C,) fp64; rows: true classes, columns: predicted.

    The matrix of more than MAX_MATRIX classes would not fit into memory. For them return (4 * C,): a row with the sum
    of losses and zeros, then rows with the hits, the predictions and the targets of each class.

    logits: (B, C). labels: (B,), IGNORE_INDEX where there is no target.
    indices: the positions of the examples in their data set of `count`. With them, and for two classes, the scores of
    all examples follow, (2 * (count | 1),). Their number is odd, so that the length is 3 modulo 4, which neither
    1 + C * C nor 4 * C ever is.
    predicted: (B,), the predicted classes; None: those with the largest logits, of equal ones the first.
    """
    num_labels = logits.shape[-1]
    weights = (labels != IGNORE_INDEX).double()
    true, predicted = labels.clamp_min(0), logits.argmax(-1) if predicted is None else predicted
    if num_labels > MAX_MATRIX:
        rows = torch.zeros(4, num_labels, dtype=torch.float64, device=logits.device)
        rows[0, 0] = loss_sum.double()
        for row, classes, counted in (
            (1, true, weights * (true == predicted)),
            (2, predicted, weights),
            (3, true, weights),
        ):
            rows[row].index_add_(0, classes, counted)
        return rows.flatten()
    confusion = torch.zeros(num_labels * num_labels, dtype=torch.float64, device=logits.device)
    confusion.index_add_(0, true * num_labels + predicted, weights)
    statistics = torch.cat([loss_sum.double().reshape(1), confusion])
    if num_labels != 2 or not count:
        return statistics
    scores = logits[:, 1].double() - logits[:, 0].double()  # the log-odds, which are in the order of probabilities
    return torch.cat([statistics, score_statistics(scores[:, None], labels[:, None], indices, count | 1)])


def classification_metrics(statistics: Tensor) -> dict[str, float]:
    """Return loss, accuracy, macro precision, recall and F1, micro and weighted F1, MCC; for two classes also others.

    - f1_present is the mean over the classes that occur, as a label or as a prediction (scikit-learn's default macro).
    - Micro F1 is over the decisions on all classes together; with one label per example it equals the accuracy.
    - Weighted F1 weights each class by its number of examples.
    - Statistics are summed over all ranks beforehand, so the ranks agree on which classes occur.
    """
    counts = class_counts(statistics)
    hits, actual = counts[0], counts[2]
    count = actual.sum()
    per_class = precision_recall_f1(*counts)
    accuracy = (hits.sum() / count).item()
    values = {
        "loss": (statistics[0] / count).item(),
        "accuracy": accuracy,
        **macro_averages(*counts),
        "f1_present": present_averages(*counts)["f1"],
        "f1_micro": accuracy,
        "f1_weighted": (per_class["f1"] @ actual / count).item(),
        "mcc": matthews_correlation(*counts),
    }
    return values | _positive_class_metrics(statistics, per_class) if len(actual) == 2 else values


def _positive_class_metrics(statistics: Tensor, per_class: dict[str, Tensor]) -> dict[str, float]:
    """Return precision, recall and F1 of the second of two classes, the area under the ROC curve, average precision."""
    values = {f"{name}_positive": scores[1].item() for name, scores in per_class.items()}
    scores = statistics[HEADER_SIZE_OF_TWO:]
    if not len(scores):
        return values | {"roc_auc": math.nan, "average_precision": math.nan}
    (ranked,) = ranked_by_label(scores, 1)
    return values | {"roc_auc": roc_auc(*ranked), "average_precision": average_precision(*ranked)}


def matthews_correlation(hits: Tensor, predicted: Tensor, actual: Tensor) -> float:
    """Return the correlation of labels with predictions, in [-1, 1]; 0 by chance, and if all are of one class.

    hits, predicted, actual: (C,), as class_counts returns them.
    Matthews 1975. For more than two classes Gorodkin 2004, "Comparing two K-category assignments by a K-category
    correlation coefficient": cov(labels, predictions) / sqrt(cov(labels, labels) cov(predictions, predictions)).
    """
    count = actual.sum()
    covariance = hits.sum() * count - predicted @ actual
    variances = (count**2 - predicted @ predicted) * (count**2 - actual @ actual)
    return (covariance / variances.sqrt()).item() if variances > 0 else 0.0


def class_counts(statistics: Tensor) -> Tensor:
    """Return (3, C): the hits, predictions and targets of each class, of classification_statistics."""
    if _has_counts_alone(statistics):
        return statistics.view(4, -1)[1:]
    confusion = confusion_matrix(statistics)
    return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])


def confusion_matrix(statistics: Tensor) -> Tensor:
    """Return the (C, C) counts of classification_statistics; rows: true classes, columns: predicted.

    TrainingError for more than MAX_MATRIX classes, whose matrix is not kept.
    """
    if _has_counts_alone(statistics):
        raise TrainingError(
            f"the confusion matrix of {len(statistics) // 4:,} classes is not kept, only that of up to {MAX_MATRIX:,}; "
            "class_counts returns the hits, predictions and targets of each class"
        )
    has_scores = len(statistics) % 4 == 3
    num_labels = 2 if has_scores else round((len(statistics) - 1) ** 0.5)
    return statistics[1 : 1 + num_labels * num_labels].view(num_labels, num_labels)


def _has_counts_alone(statistics: Tensor) -> bool:
    return len(statistics) % 4 == 0  # 1 + C * C is 1 or 2 modulo 4, and 3 with scores


def per_class_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return a line for each of the first classes: its scores, its count, and what its examples were predicted as."""
    counts = class_counts(statistics)
    scores, actual = precision_recall_f1(*counts), counts[2]
    confusion = None if _has_counts_alone(statistics) else confusion_matrix(statistics)
    shown = [short_label(label) for label in labels[:MAX_CLASSES_SHOWN]]
    more = len(labels) - len(shown)
    width = max(map(display_width, shown))
    columns = f"{', '.join(shown)}{f' and {more:,} more' if more else ''}"
    lines = [f"{'':>{width}}  {SCORE_HEADER}" + ("" if confusion is None else f"  predicted as {columns}")]
    for i, label in enumerate(shown):
        line = f"{align_right(label, width)}  {format_scores(scores, actual, i)}"
        if confusion is not None:
            line += "  " + " ".join(f"{int(n)}" for n in confusion[i, : len(shown)])
            line += f" {int(confusion[i, len(shown) :].sum())}" if more else ""  # classes that are not shown
        lines.append(line)
    if more:
        lines.append(f"and {more:,} more classes")
    if len(labels) == 2:
        lines.append(f"the positive class is {labels[1]!r}, the second of data.labels")
    return "\n".join(lines)
