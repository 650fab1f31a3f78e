"""Relation extraction: the relation between two entities that are marked in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, Rows, TextExamples
from data.augmentation import text as text_augmentation
from data.label_spelling import label_name
from data.labels import check_label_names, find_label_names, warn_of_labels
from data.relation_extraction import ROLES, Entity, RelationRecord, encode_relations, read_relations
from engine.config import AugmentSettings, ConfigError, GenerateSettings, RelationExtractionSettings, choose_from
from engine.metrics import by_example, tables, unusable
from engine.metrics import relation_extraction as metrics
from engine.tasks import text_classification
from engine.tasks.augmentation import CHANGES_IN_PLACE, RowEncoder, augment_rows, check_text_changes, text_changes
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel

# Names that data sets give to the absence of a relation, beside spellings of no_relation.
NO_RELATION = ("other", "na", "n/a", "none", "null", "negative", "unrelated", "无", "无关系")


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows with a text, its two entities, and with labels their relation."""
    rows = read_relations(
        name,
        text=settings.data.text_column,
        label=settings.label_column(labelled),
        group=settings.group_column(name, labelled),
        options=settings.file_options,
    )
    if labelled and name == settings.data.train:
        rows.notes += _find_no_relation(rows, settings)
    return rows


def _find_no_relation(rows: Rows, settings: TaskSettings) -> list[str]:
    """Return a note if the default of no_relation_label is no label, and another label seems to mean that."""
    default = RelationExtractionSettings.no_relation_label
    names = {label_name(row.values[settings.data.label_column]) for row in rows}
    if settings.own.no_relation_label != default or default in names:
        return []
    return [
        f"no label is {default!r}, so F1 counts {name!r} as a relation; "
        f"relation_extraction.no_relation_label = {name!r} leaves it out"
        for name in sorted(names)
        if name.casefold() in NO_RELATION
    ]


def find_labels(name: str, rows: Rows, settings: TaskSettings) -> list[str]:
    """Return data.labels, else the relations that occur, sorted, with notes on those that look wrong."""
    column, declared, no_relation = settings.data.label_column, settings.data.labels, settings.own.no_relation_label
    if not declared:
        rows.notes += warn_of_labels(rows, column, no_relation)
    return find_label_names(name, rows, column, declared)


def check_labels(name: str, rows: Rows, settings: TaskSettings, labels: Sequence[str]) -> None:
    """Write into each row the label that its relation means; DataError for every unknown one.

    ConfigError if no_relation_label is set and is not a label; with its default value, the data need not have one.
    """
    no_relation = settings.own.no_relation_label
    is_default = no_relation == RelationExtractionSettings.no_relation_label
    if no_relation and not is_default and no_relation not in labels:
        raise ConfigError(
            f"relation_extraction.no_relation_label = {no_relation!r} is not a label: "
            f"{choose_from(no_relation, labels)}"
        )
    check_label_names(name, rows, settings.data.label_column, labels, skips=settings.data.bad_rows == "skip")


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[RelationRecord]:
    """Encode the texts with markers around their entities, and with labels the number of each relation."""
    no_relation = settings.own.no_relation_label
    return encode_relations(
        rows,
        processor,
        text=settings.data.text_column,
        label=settings.label_column(labelled),
        labels=labels,
        no_relation=list(labels).index(no_relation) if no_relation in labels else None,
        max_length=settings.data.max_length,
    )


def texts(row: Row, settings: TaskSettings) -> list[str]:
    """Return the text of a row and its two entities."""
    text: str = row.values[settings.data.text_column]
    return [text, *(row.values[role].text_in(text) for role in ROLES)]


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Change words outside the two entities, in place."""
    if not check_text_changes(settings, CHANGES_IN_PLACE, "the entities are spans of the text"):
        return examples
    column, changes = encode.settings.data.text_column, text_changes(settings.text, encode, rows)

    def change(row: Row, rng: np.random.Generator) -> Row:
        entities: list[Entity] = [row.values[role] for role in ROLES]
        spans = [(entity.start, entity.end) for entity in entities]
        text, new_spans = text_augmentation.change_around(row, rng, changes, column, spans)
        shifted = [replace(entity, start=a, end=b) for entity, (a, b) in zip(entities, new_spans, strict=True)]
        return row.updated({column: text, **dict(zip(ROLES, shifted, strict=True))})

    return augment_rows(examples, rows, encode, changes, seed, change)


def evaluate_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[RelationRecord], generate: GenerateSettings
) -> Tensor:
    """Return [hits, predicted, actual relations, sum of losses, confusion matrix], (3 + 1 + C * C,)."""
    labels = batch.required_labels
    out = model(batch)
    return metrics.relation_statistics(out.loss_sum, out.logits, labels, examples.record.no_relation)


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[RelationRecord], generate: GenerateSettings
) -> Tensor:
    """Return the relation_rows of a batch."""
    return by_example.relation_rows(model(batch).logits, batch.required_labels, examples.record.no_relation)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics over all relations except the label for no relation."""
    return metrics.relation_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[RelationRecord], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the two entities, their likeliest relation, and the probability and the logit of every relation."""
    rows = []
    predicted = text_classification.predict_batch(model, batch, examples, generate)
    for i, row in zip(batch.indices, predicted, strict=True):
        subject, obj = examples.record.entities[i]
        rows.append({"subject": subject, "relation": row.pop("label"), "object": obj, **row})
    return rows


RELATION_EXTRACTION = Task(
    head="relation-classification",
    predicts="relation",
    metrics=("f1", "precision", "recall", "accuracy", "loss"),
    columns=Columns(text_pair=None, label="relation"),
    section="relation_extraction",
    problem="single-label",
    stratify=True,
    read=read,
    find_labels=find_labels,
    check_labels=check_labels,
    encode=encode,
    texts=texts,
    augment=augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    collect=by_example.collect_relations,
    references=text_classification.references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_relations,
    format_table=metrics.relation_table,
    tables=tables.of_relations,
    predict_batch=predict_batch,
)
