"""What engine.evaluate --output has beside the metrics: the values of each class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from engine.metrics.counts import precision_recall_f1
from engine.metrics.multi_label_classification import HEADER_SIZE as LABEL_SETS_HEADER
from engine.metrics.relation_extraction import NUM_COUNTS
from engine.metrics.text_classification import MAX_MATRIX, class_counts, confusion_matrix
from engine.metrics.token_classification import HEADER_SIZE as TAGS_HEADER
from engine.metrics.token_classification import entity_types


def no_tables(statistics: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Return {}, for a task without classes."""
    return {}


def of_classes(statistics: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Return per_class, and the confusion_matrix: a row for each true class, a column for each predicted one.

    Above 1,000 classes there is no matrix.
    """
    tables = {"per_class": _scores(class_counts(statistics), labels)}
    if len(labels) > MAX_MATRIX:
        return tables
    counts = [[int(n) for n in row] for row in confusion_matrix(statistics).tolist()]
    return tables | {"confusion_matrix": {"labels": list(labels), "counts": counts}}


def of_images(statistics: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Return the tables of image_statistics."""
    return of_classes(statistics[1:], labels)


def of_relations(statistics: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Return the tables of relation_statistics."""
    return of_classes(statistics[NUM_COUNTS:], labels)


def of_label_sets(statistics: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Return per_class of multi_label_statistics, the values of each label."""
    end = LABEL_SETS_HEADER + 3 * len(labels)
    return {"per_class": _scores(statistics[LABEL_SETS_HEADER:end].view(3, -1), labels)}


def of_tags(statistics: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """Return per_class of tagging_statistics: the values of each type of entity, or of each tag."""
    counts = statistics[TAGS_HEADER:].view(3, -1)
    units = list(labels) if counts.shape[1] == len(labels) else entity_types(labels)
    return {"per_class": _scores(counts, units)}


def _scores(counts: Tensor, names: Sequence[str]) -> dict[str, dict[str, float | int]]:
    """Return {name: {precision, recall, f1, count, predicted}} of (3, units) hits, predictions and targets."""
    scores = {name: values.tolist() for name, values in precision_recall_f1(*counts).items()}
    return {
        name: {**{key: values[i] for key, values in scores.items()}, "count": int(n), "predicted": int(m)}
        for i, (name, m, n) in enumerate(zip(names, counts[1].tolist(), counts[2].tolist(), strict=True))
    }
