"""The relation of two entities that are marked in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples
from data import relation_extraction as relations
from data import text_classification as texts
from engine.config import ConfigError, GenerateSettings, RelationExtractionSettings, choose_from
from engine.metrics import relation_extraction as metrics
from engine.tasks.augmentation import augment_relations
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from engine.tasks.text_classification import predict_classes
from models import TaskModel


def _read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    is_split = settings.is_training_split(name, labelled)
    return relations.read_relations(
        name,
        text=settings.data.text_column,
        label=settings.data.label_column if labelled else "",
        group=settings.data.group_column if is_split else "",
        id_column=settings.data.id_column,
        format=settings.data.format,
    )


def _find_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    return texts.label_names(name, rows, settings.data.label_column, settings.data.labels)


def _check_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    usual = (
        settings.own.no_relation_label == RelationExtractionSettings.no_relation_label
    )  # the name is then no claim that the file has it
    if settings.own.no_relation_label and not usual and settings.own.no_relation_label not in labels:
        raise ConfigError(
            f"relation_extraction.no_relation_label = {settings.own.no_relation_label!r} is no label: {choose_from(settings.own.no_relation_label, labels)}"
        )
    texts.check_labels(name, rows, settings.data.label_column, labels)


def _encode(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    examples = relations.encode_relations(
        rows,
        tokenizer,
        text=settings.data.text_column,
        label=settings.data.label_column if labelled else "",
        labels=labels,
        max_length=settings.data.max_length,
    )
    examples.extra["negative"] = (
        [*labels].index(settings.own.no_relation_label) if settings.own.no_relation_label in labels else None
    )
    return examples


def _measure(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    out = model(batch)
    return metrics.relation_statistics(out.loss_sum, out.logits, batch.labels, examples.extra["negative"])


def _summarize(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    return metrics.relation_metrics(statistics)


def _predict(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> list[dict[str, Any]]:
    """The two entities and the likeliest relation of them, and the probability and the logit of each."""
    rows = []
    for i, row in zip(batch.indices, predict_classes(model, batch, examples, generate), strict=True):
        subject, obj = examples.extra["entities"][i]
        rows.append({"subject": subject, "relation": row.pop("label"), "object": obj, **row})
    return rows


RELATION_EXTRACTION = Task(
    head="relation-classification",
    metrics=("f1", "precision", "recall", "accuracy", "loss"),
    columns=Columns(text_pair=None, label="relation"),
    problem="single-label",
    stratify=True,
    section="relation_extraction",
    read=_read,
    find_labels=_find_labels,
    check_labels=_check_labels,
    encode=_encode,
    evaluate_batch=_measure,
    compute_metrics=_summarize,
    predict_batch=_predict,
    augment=augment_relations,
    format_table=metrics.relation_table,
)
