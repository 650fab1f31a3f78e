"""Classes of texts, single or in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples, read_rows
from data import text as texts
from data.errors import ErrorList
from engine.config import Data, Generate
from engine.metrics import classification as metrics
from engine.tasks.augmenting import augment_texts
from engine.tasks.task import Task
from models import TaskModel


def _read_texts(name: str, settings: Data, labelled: bool) -> list[Row]:
    columns = [settings.text, *([settings.text_pair] if settings.text_pair else [])]
    extra = [settings.label] if labelled else []
    if labelled and name == settings.train and not settings.validation:  # the one file that is split
        extra += [settings.group] if settings.group else []
    errors = ErrorList()
    rows = read_rows(name, columns + extra, settings.id, errors, settings.format)
    texts.check_rows(name, rows, columns, settings.label if labelled else "", errors)
    errors.raise_if_any()
    return rows


def _find_labels(name: str, rows: list[Row], settings: Data) -> list[str]:
    return texts.label_names(name, rows, settings.label, settings.labels)


def _check_labels(name: str, rows: list[Row], settings: Data, labels: Sequence[str]) -> None:
    texts.check_labels(name, rows, settings.label, labels)


def _encode_texts(
    rows: list[Row], tokenizer: Tokenizer, settings: Data, labels: Sequence[str], labelled: bool
) -> TextExamples:
    return texts.encode_texts(
        rows,
        tokenizer,
        text=settings.text,
        text_pair=settings.text_pair,
        label=settings.label if labelled else "",
        labels=labels,
        max_length=settings.max_length,
    )


def count_classes(model: TaskModel, batch: Batch, examples: Any, generate: Generate) -> Tensor:
    """The sum of the losses and the confusion matrix; for images too."""
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    out = model(batch)
    return metrics.classification_statistics(out.loss_sum, out.logits, batch.labels)


def predict_classes(model: TaskModel, batch: Batch, examples: Any, generate: Generate) -> list[dict[str, Any]]:
    """The likeliest label, and the probability of each; for images too."""
    probabilities = torch.softmax(model(batch).logits.double(), -1).cpu()
    return [
        {"label": model.labels[k], "probabilities": dict(zip(model.labels, p, strict=True))}
        for k, p in zip(probabilities.argmax(-1).tolist(), probabilities.tolist(), strict=True)
    ]


def summarize_classes(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """The metrics of classification_statistics."""
    return metrics.classification_metrics(statistics)


TEXT_CLASSIFICATION = Task(
    head="sequence-classification",
    reads=("data.text_pair", "data.labels"),
    metrics=("accuracy", "precision", "recall", "f1", "loss"),
    problem="single-label",
    stratify=True,
    read=_read_texts,
    find_labels=_find_labels,
    check_labels=_check_labels,
    encode=_encode_texts,
    measure=count_classes,
    summarize=summarize_classes,
    predict=predict_classes,
    table=metrics.per_class_table,
    augment=augment_texts,
)
