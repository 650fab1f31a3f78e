"""Precision, recall and F1 from counts that add over batches and ranks. A quotient with denominator 0 is 0."""

from __future__ import annotations

from torch import Tensor

SCORE_HEADER = "precision  recall      f1  count"


def precision_recall_f1(hits: Tensor, predicted: Tensor, actual: Tensor) -> dict[str, Tensor]:
    """Return {"precision", "recall", "f1"}, each of the shape of the counts.

    hits: right predictions; predicted: all predictions; actual: all labels. As with scikit-learn's zero_division=0.
    """
    return {
        "precision": hits / predicted.clamp_min(1),
        "recall": hits / actual.clamp_min(1),
        "f1": 2 * hits / (predicted + actual).clamp_min(1),
    }


def macro_averages(hits: Tensor, predicted: Tensor, actual: Tensor) -> dict[str, float]:
    """Return the means of precision, recall and F1 over all units; one that never occurs counts as 0.

    hits, predicted, actual: (units,). As with scikit-learn's labels=range(units).
    """
    return {name: values.mean().item() for name, values in precision_recall_f1(hits, predicted, actual).items()}


def present_averages(hits: Tensor, predicted: Tensor, actual: Tensor) -> dict[str, float]:
    """Return the means of precision, recall and F1 over the units that occur, as a label or as a prediction.

    hits, predicted, actual: (units,). A data set that lacks a class of the model can still reach 1. The means are 0 if
    no unit occurs.
    """
    occurs = predicted + actual > 0
    scores = precision_recall_f1(hits, predicted, actual)
    return {name: values[occurs].mean().item() if occurs.any() else 0.0 for name, values in scores.items()}


def format_scores(scores: dict[str, Tensor], actual: Tensor, index: int) -> str:
    """Return the columns of SCORE_HEADER for one unit."""
    precision, recall, f1 = (scores[name][index].item() for name in ("precision", "recall", "f1"))
    return f"{precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {int(actual[index]):>5}"
