"""Text regression: a number for each text or pair of texts, such as a rating or a similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, TextExamples
from data import text_regression as targets
from engine.config import ConfigError, GenerateSettings
from engine.metrics import by_example, unusable
from engine.metrics import text_regression as metrics
from engine.tasks import text_classification
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows with a text or a pair of texts, and with labels a number."""
    return text_classification.read_texts(name, settings, labelled, targets.read_scores)


def find_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    """Return the name of the one output: that of data.labels, else that of the column."""
    if len(settings.data.labels) > 1:
        raise ConfigError(
            f"data.labels = {', '.join(settings.data.labels)}: a regression has one score; name one, or none"
        )
    return list(settings.data.labels) or [settings.data.label_column]


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[None]:
    """Encode the texts, and with labels the number of each."""
    examples = text_classification.encode(rows, processor, settings, labels, False)
    return replace(examples, labels=targets.parse_scores(rows, settings.data.label_column)) if labelled else examples


def evaluate_batch(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return a row (prediction, truth) for each example of the data set, flat; zeros for those of other batches."""
    labels = batch.required_labels
    logits = model(batch).logits
    return metrics.regression_statistics(logits[:, 0], labels[:, 0], batch.indices, len(examples))


def evaluate_examples(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return a row (prediction, truth) for each example of the batch."""
    return torch.stack([model(batch).logits[:, 0], batch.required_labels[:, 0]], 1).double()


def references(examples: Any, labels: Sequence[str]) -> list[float]:
    """Return the number of each example."""
    numbers: list[float] = examples.labels[:, 0].tolist()
    return numbers


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return correlations and errors."""
    return metrics.regression_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the score of each example."""
    return [{"score": score} for score in model(batch).logits[:, 0].tolist()]


TEXT_REGRESSION = Task(
    head="sequence-classification",
    caches=True,
    long_texts=("truncate", "head+tail", "windows"),
    predicts="score",
    metrics=("pearson", "spearman", "mse", "mae", "loss"),
    columns=Columns(label="score"),
    problem="regression",
    read=read,
    find_labels=find_labels,
    encode=encode,
    augment=text_classification.augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    collect=by_example.collect_numbers,
    references=references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_scores,
    predict_batch=predict_batch,
)
