"""Texts, single or in pairs: one class each, several labels each, or a number each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples, read_rows
from data import labels as label_sets
from data import text_classification as texts
from data.errors import ErrorList
from engine.config import ConfigError, GenerateSettings
from engine.metrics import text_classification as metrics
from engine.metrics import text_regression as regression
from engine.tasks.augmentation import augment_texts
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel

CheckLabels = Callable[[str, list[Row], str, ErrorList], None]  # (file, rows, label column, where errors go)


def _read_texts(name: str, settings: TaskSettings, labelled: bool, check: CheckLabels | None = None) -> list[Row]:
    """check: of labels that are no class; a class is checked with the texts."""
    columns = [settings.data.text_column, *([settings.data.text_pair_column] if settings.data.text_pair_column else [])]
    extra = [settings.data.label_column] if labelled else []
    if settings.is_training_split(name, labelled):  # the one file that is split
        extra += [settings.data.group_column] if settings.data.group_column else []
    errors = ErrorList()
    rows = read_rows(name, columns + extra, settings.data.id_column, errors, settings.data.format)
    texts.check_rows(name, rows, columns, settings.data.label_column if labelled and check is None else "", errors)
    if labelled and check is not None:
        check(name, rows, settings.data.label_column, errors)
    errors.raise_if_any()
    return rows


def _find_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    return texts.label_names(name, rows, settings.data.label_column, settings.data.labels)


def _check_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    texts.check_labels(name, rows, settings.data.label_column, labels)


def _encode_texts(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    return texts.encode_texts(
        rows,
        tokenizer,
        text=settings.data.text_column,
        text_pair=settings.data.text_pair_column,
        label=settings.data.label_column if labelled else "",
        labels=labels,
        max_length=settings.data.max_length,
    )


def count_classes(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    """The sum of the losses and the confusion matrix; for images too."""
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    out = model(batch)
    return metrics.classification_statistics(out.loss_sum, out.logits, batch.labels)


def predict_classes(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> list[dict[str, Any]]:
    """The likeliest label, and the probability and the logit of each; for images too."""
    logits = model(batch).logits.double().cpu()
    probabilities = logits.softmax(-1)
    chosen = [model.labels[k] for k in probabilities.argmax(-1).tolist()]
    return [
        {"label": label, **of_one} for label, of_one in zip(chosen, _named(model, probabilities, logits), strict=True)
    ]


def _named(model: TaskModel, probabilities: Tensor, logits: Tensor) -> list[dict[str, Any]]:
    """(B, C) each -> {"probabilities": {label: value}, "logits": {label: value}} of each example.

    The logits are what a student learns from (data/teacher.py).
    """
    return [
        {"probabilities": dict(zip(model.labels, p, strict=True)), "logits": dict(zip(model.labels, z, strict=True))}
        for p, z in zip(probabilities.tolist(), logits.tolist(), strict=True)
    ]


def summarize_classes(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """The metrics of classification_statistics."""
    return metrics.classification_metrics(statistics)


TEXT_CLASSIFICATION = Task(
    head="sequence-classification",
    metrics=("accuracy", "precision", "recall", "f1", "f1_micro", "f1_weighted", "mcc", "loss"),
    problem="single-label",
    stratify=True,
    read=_read_texts,
    find_labels=_find_labels,
    check_labels=_check_labels,
    encode=_encode_texts,
    evaluate_batch=count_classes,
    compute_metrics=summarize_classes,
    predict_batch=predict_classes,
    format_table=metrics.per_class_table,
    augment=augment_texts,
)


# Several labels to a text, or none.


def _read_label_sets(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    return _read_texts(name, settings, labelled, label_sets.check_label_sets)


def _find_label_sets(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    return label_sets.label_set_names(name, rows, settings.data.label_column, settings.data.labels)


def _check_label_sets(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    label_sets.check_known_labels(name, rows, settings.data.label_column, labels)


def _encode_label_sets(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    examples = _encode_texts(rows, tokenizer, settings, labels, False)
    return (
        replace(examples, labels=label_sets.multi_hot(rows, settings.data.label_column, labels))
        if labelled
        else examples
    )


def _count_labels(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    out = model(batch)
    return metrics.multi_label_statistics(out.loss_sum, out.logits, batch.labels)


def _predict_labels(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> list[dict[str, Any]]:
    """The labels above one half, most likely first, and the probability and the logit of each."""
    logits = model(batch).logits
    wide = logits.double()
    rows = []
    for chosen, row in zip(metrics.predicted_labels(logits).tolist(), _named(model, wide.sigmoid(), wide), strict=True):
        names = [name for name, above in zip(model.labels, chosen, strict=True) if above]
        names.sort(key=lambda name: -row["probabilities"][name])
        rows.append({"labels": names, **row})
    return rows


def _summarize_labels(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    return metrics.multi_label_metrics(statistics)


MULTI_LABEL_CLASSIFICATION = Task(
    head="sequence-classification",
    metrics=(
        *("f1_micro", "precision_micro", "recall_micro", "f1", "precision", "recall"),
        *("subset_accuracy", "loss"),
    ),
    columns=Columns(label="labels"),
    problem="multi-label",
    read=_read_label_sets,
    find_labels=_find_label_sets,
    check_labels=_check_label_sets,
    encode=_encode_label_sets,
    evaluate_batch=_count_labels,
    compute_metrics=_summarize_labels,
    predict_batch=_predict_labels,
    augment=augment_texts,
    format_table=metrics.per_label_table,
)


# A number to a text.


def _read_scores(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    return _read_texts(name, settings, labelled, label_sets.check_scores)


def _name_score(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    """The one output is called as the column is, or as declared."""
    if len(settings.data.labels) > 1:
        raise ConfigError(
            f"data.labels = {', '.join(settings.data.labels)}: a regression has one score; name one, or none"
        )
    return list(settings.data.labels) or [settings.data.label_column]


def _encode_scores(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    examples = _encode_texts(rows, tokenizer, settings, labels, False)
    return replace(examples, labels=label_sets.scores(rows, settings.data.label_column)) if labelled else examples


def _compare_scores(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    logits = model(batch).logits
    return regression.regression_statistics(logits[:, 0], batch.labels[:, 0], batch.indices, len(examples))


def _predict_scores(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> list[dict[str, Any]]:
    return [{"score": score} for score in model(batch).logits[:, 0].tolist()]


def _summarize_scores(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    return regression.regression_metrics(statistics)


TEXT_REGRESSION = Task(
    head="sequence-classification",
    metrics=("pearson", "spearman", "mse", "mae", "loss"),
    columns=Columns(label="score"),
    problem="regression",
    read=_read_scores,
    find_labels=_name_score,
    encode=_encode_scores,
    evaluate_batch=_compare_scores,
    compute_metrics=_summarize_scores,
    predict_batch=_predict_scores,
    augment=augment_texts,
)
