"""Metrics of relation extraction: micro F1 over all labels except the one for no relation, as for TACRED."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.metrics.counts import precision_recall_f1
from engine.metrics.text_classification import (
    class_counts,
    classification_metrics,
    classification_statistics,
    per_class_table,
)

NUM_COUNTS = 3  # hits, predicted, actual: they come before classification_statistics


def relation_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor, no_relation: int | None) -> Tensor:
    """Return [hits, predicted, actual of all relations, *classification_statistics], fp64.

    logits: (B, C), labels: (B,). no_relation: the class that is not counted; None: all are counted.
    """
    statistics = classification_statistics(loss_sum, logits, labels)
    per_class = class_counts(statistics)
    classes = torch.arange(per_class.shape[1], device=logits.device)
    is_relation = (classes != (-1 if no_relation is None else no_relation)).double()
    return torch.cat([torch.stack([counts @ is_relation for counts in per_class]), statistics])


def relation_metrics(statistics: Tensor) -> dict[str, float]:
    """Return F1, precision and recall over all relations together (micro), and accuracy and loss over all labels.

    As in Zhang et al. 2017, "Position-aware Attention and Supervised Data Improve Slot Filling":
    - a relation that is predicted where there is none lowers precision;
    - a missed relation lowers recall;
    - a right prediction of no relation does not count.

    A ratio of 0 / 0 is 0.
    """
    scores = precision_recall_f1(*statistics[:NUM_COUNTS])
    class_metrics = classification_metrics(statistics[NUM_COUNTS:])
    return {
        **{name: scores[name].item() for name in ("f1", "precision", "recall")},
        **{name: class_metrics[name] for name in ("accuracy", "loss")},
    }


def relation_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return the table of all labels, including the one for no relation."""
    return per_class_table(statistics[NUM_COUNTS:], labels)
