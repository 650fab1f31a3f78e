"""Multi-label classification: any number of labels for each text or pair of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, Rows, TextExamples, read_rows
from data import multi_label_classification as label_sets
from data.errors import DataError, ErrorList
from engine.calibration import choose_labels, read_calibration
from engine.calibration import probabilities as probabilities_of
from engine.config import GenerateSettings
from engine.metrics import by_example, tables, unusable
from engine.metrics import multi_label_classification as metrics
from engine.tasks import text_classification
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from engine.tasks.text_classification import ReadTargets
from models import TaskModel


def read(name: str, settings: TaskSettings, labelled: bool) -> Rows:
    """Read rows with a text or a pair of texts, and with labels a set of labels.

    The labels are in one column, or, where the file lacks it, in a column of 0 and 1 for each name in data.labels.
    """
    return read_sets_or_columns(
        name, settings, labelled, partial(text_classification.read_texts, name, settings, labelled)
    )


def read_sets_or_columns(
    name: str, settings: TaskSettings, labelled: bool, read: Callable[[ReadTargets, Sequence[str]], Rows]
) -> Rows:
    """Return the rows that read(function that reads the targets, their columns) returns; [] is the label column.

    Where the file lacks that column, they are the names in data.labels, if it has these.
    """
    separator = settings.data.label_separator
    try:
        return read(partial(label_sets.read_label_sets, separator=separator), [])
    except DataError as error:
        if not labelled or not (columns := _label_columns(name, settings)):
            raise
        if columns != list(settings.data.labels):
            listed = json.dumps(",".join(columns), ensure_ascii=False)
            raise DataError(f"{error}\n(data.labels = {listed} reads a column of 0 and 1 for each label)") from None
    columns = list(settings.data.labels)
    return read(partial(label_sets.read_label_columns, columns), columns)


def _label_columns(name: str, settings: TaskSettings) -> list[str]:
    """Return the columns of 0 and 1 that the file has in the place of the label column; [] where there are no two."""
    data = settings.data
    try:
        rows = read_rows(name, [], settings.file_options, ErrorList())
    except DataError:  # no file of rows
        return []
    if not rows or data.label_column in rows[0].values:
        return []
    if rows[0].values.keys() >= set(data.labels) and data.labels:
        return list(data.labels)
    others = {data.text_column, data.text_pair_column, data.id_column, data.group_column}
    found = label_sets.find_flag_columns(rows[0], others)
    return found if len(found) > 1 else []


def find_labels(name: str, rows: Rows, settings: TaskSettings) -> list[str]:
    """Return data.labels, else all labels that occur, sorted."""
    data = settings.data
    return label_sets.find_label_set_names(name, rows, data.label_column, data.labels, data.label_separator)


def check_labels(name: str, rows: Rows, settings: TaskSettings, labels: Sequence[str]) -> None:
    """Write into each row the labels that its names mean; DataError for every unknown name."""
    label_sets.check_label_set_names(name, rows, settings.data.label_column, labels)


def split_labels(rows: list[Row], settings: TaskSettings) -> list[Collection[str]]:
    """Return the labels of each row."""
    return [row.values[settings.data.label_column] for row in rows]


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[None]:
    """Encode the texts, and with labels a row of 0 and 1 for each."""
    examples = text_classification.encode(rows, processor, settings, labels, False)
    if not labelled:
        return examples
    return replace(examples, labels=label_sets.multi_hot(rows, settings.data.label_column, labels))


def evaluate_batch(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return [sum of losses, examples, all labels right, counts and scores of labels], (3 + 3 * C + 2 * C * N,)."""
    labels = batch.required_labels
    out = model(batch)
    predicted = choose_labels(model, out.logits)
    return metrics.multi_label_statistics(out.loss_sum, out.logits, labels, batch.indices, len(examples), predicted)


def evaluate_examples(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return the label_set_rows of a batch."""
    logits = model(batch).logits
    return by_example.label_set_rows(logits, batch.required_labels, choose_labels(model, logits))


def references(examples: Any, labels: Sequence[str]) -> list[list[str]]:
    """Return the labels of each example."""
    return [[labels[k] for k, value in enumerate(row) if value > 0.5] for row in examples.labels.tolist()]


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of sets of labels."""
    return metrics.multi_label_metrics(statistics, len(labels))


def predict_batch(
    model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the labels with a probability above one half, the likeliest first, and the values of every label.

    A model may have other thresholds, and a temperature (engine/calibration.py).
    """
    logits = model(batch).logits
    p = probabilities_of(logits, "multi-label", read_calibration(model).temperature)
    chosen = choose_labels(model, logits).tolist()
    by_label = text_classification.values_by_label(model.labels, p, logits.double())
    rows = []
    for is_chosen, values in zip(chosen, by_label, strict=True):
        probabilities = values["probabilities"]
        names = [name for name, above in zip(model.labels, is_chosen, strict=True) if above]
        names.sort(key=lambda name: -probabilities[name])
        rows.append({"labels": names, **values})
    return rows


MULTI_LABEL_CLASSIFICATION = Task(
    head="sequence-classification",
    caches=True,
    long_texts=("truncate", "head+tail", "windows"),
    predicts="labels",
    metrics=(
        *("f1_micro", "precision_micro", "recall_micro", "f1", "precision", "recall"),
        *("f1_present", "roc_auc", "roc_auc_micro", "average_precision", "average_precision_micro"),
        *("subset_accuracy", "loss"),
    ),
    details=("f1_present", "roc_auc_micro", "average_precision_micro"),
    columns=Columns(label="labels"),
    problem="multi-label",
    read=read,
    find_labels=find_labels,
    check_labels=check_labels,
    split_labels=split_labels,
    encode=encode,
    augment=text_classification.augment,
    evaluate_batch=evaluate_batch,
    has_thresholds=True,
    evaluate_examples=evaluate_examples,
    collect=by_example.collect_label_sets,
    references=references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_label_sets,
    format_table=metrics.per_label_table,
    tables=tables.of_label_sets,
    predict_batch=predict_batch,
)
