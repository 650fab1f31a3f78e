"""Text classification: one class for each text or pair of texts. Other tasks share functions of this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, Rows, TextExamples, read_rows
from data import text_classification as texts
from data.batch import IGNORE_INDEX
from data.errors import ErrorList
from data.labels import check_label_names, find_label_names, warn_of_labels
from engine.calibration import choose_class, read_calibration
from engine.calibration import probabilities as class_probabilities
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics import by_example, tables, unusable
from engine.metrics import text_classification as metrics
from engine.tasks.augmentation import RowEncoder, augment_columns
from engine.tasks.settings import TaskSettings
from engine.tasks.task import Task
from models import TaskModel

# (file, rows, label column, where errors are added): check the targets, and write them into the label column.
ReadTargets = Callable[[str, list[Row], str, ErrorList], None]


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows with a text or a pair of texts, and with labels a class."""
    return read_texts(name, settings, labelled, None)


def read_texts(
    name: str,
    settings: TaskSettings,
    labelled: bool,
    read_targets: ReadTargets | None,
    target_columns: Sequence[str] = (),
) -> Rows:
    """Read rows of texts. read_targets: reads targets that are not classes; None: they are classes.

    target_columns: the columns of the targets, if these are not in the label column.
    """
    data = settings.data
    columns = [column for column in (data.text_column, data.text_pair_column) if column]
    label = settings.label_column(labelled)
    more = [*(target_columns or [label]), settings.group_column(name, labelled)]
    errors, options = ErrorList(), settings.file_options
    if not labelled:  # columns of labels in a file that is predicted are known, too
        options = options.also_reading(data.labels)
    rows = read_rows(name, [*columns, *filter(None, more)], options, errors)
    texts.check_texts(name, rows, columns, label if read_targets is None else "", errors)
    if labelled and read_targets is not None:
        read_targets(name, rows, label, errors)
    return errors.settle(rows, options)


def find_labels(name: str, rows: Rows, settings: TaskSettings) -> list[str]:
    """Return data.labels, else the classes that occur, sorted, with notes on those that look wrong."""
    column, declared = settings.data.label_column, settings.data.labels
    if not declared:
        rows.notes += warn_of_labels(rows, column)
    return find_label_names(name, rows, column, declared)


def check_labels(name: str, rows: Rows, settings: TaskSettings, labels: Sequence[str]) -> None:
    """Write into each row the label that its class means; DataError for every unknown class."""
    check_label_names(name, rows, settings.data.label_column, labels, skips=settings.data.bad_rows == "skip")


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[None]:
    """Encode the texts, of at most data.max_length tokens or in windows, and with labels the number of each class."""
    return texts.encode_texts(
        rows,
        processor,
        text=settings.data.text_column,
        text_pair=settings.data.text_pair_column,
        label=settings.label_column(labelled),
        labels=labels,
        max_length=settings.data.max_length,
        long_texts=settings.data.long_texts,
        window_overlap=settings.data.window_overlap,
    )


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Augment the text or both texts by every change of [augment.text]; the label of a text stays right."""
    data = encode.settings.data
    columns = [column for column in (data.text_column, data.text_pair_column) if column]
    return augment_columns(examples, rows, encode, settings, seed, columns)


def evaluate_batch(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return [sum of losses, confusion matrix], (1 + C * C,), and for two classes the scores of all examples."""
    labels = batch.required_labels
    out = model(batch)
    predicted = choose_class(model, out.logits)
    return metrics.classification_statistics(out.loss_sum, out.logits, labels, batch.indices, len(examples), predicted)


def evaluate_examples(model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings) -> Tensor:
    """Return the class_rows of a batch."""
    logits = model(batch).logits
    return by_example.class_rows(logits, batch.required_labels, choose_class(model, logits))


def references(examples: Any, labels: Sequence[str]) -> list[str | None]:
    """Return the class of each example; None where it has none."""
    return [labels[k] if k != IGNORE_INDEX else None for k in examples.labels.tolist()]


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of classes."""
    return metrics.classification_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: Examples, generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the class of each example, with the probability and the logit of every class.

    It is the likeliest one, unless the model has a temperature or a threshold (engine/calibration.py).
    """
    logits = model(batch).logits.double().cpu()
    probabilities = class_probabilities(logits, "single-label", read_calibration(model).temperature)
    classes = choose_class(model, logits)
    chosen = [model.labels[k] for k in (probabilities.argmax(-1) if classes is None else classes).tolist()]
    by_label = values_by_label(model.labels, probabilities, logits)
    return [{"label": label, **values} for label, values in zip(chosen, by_label, strict=True)]


def values_by_label(labels: Sequence[str], probabilities: Tensor, logits: Tensor) -> list[dict[str, Any]]:
    """Return {"probabilities": {label: value}, "logits": {label: value}} for each example, from (B, C) tensors.

    A student model can learn from the logits (data/teacher.py).
    """
    return [
        {"probabilities": dict(zip(labels, p, strict=True)), "logits": dict(zip(labels, z, strict=True))}
        for p, z in zip(probabilities.tolist(), logits.tolist(), strict=True)
    ]


TEXT_CLASSIFICATION = Task(
    head="sequence-classification",
    caches=True,
    long_texts=("truncate", "head+tail", "windows"),
    metrics=(
        *("accuracy", "precision", "recall", "f1", "f1_present", "f1_micro", "f1_weighted", "mcc"),
        *(*metrics.POSITIVE_CLASS_METRICS, "loss"),
    ),
    details=("f1_present", "f1_micro", "precision_positive", "recall_positive"),
    problem="single-label",
    stratify=True,
    read=read,
    find_labels=find_labels,
    check_labels=check_labels,
    encode=encode,
    augment=augment,
    evaluate_batch=evaluate_batch,
    has_thresholds=True,
    evaluate_examples=evaluate_examples,
    collect=by_example.collect_classes,
    references=references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_classes,
    format_table=metrics.per_class_table,
    tables=tables.of_classes,
    predict_batch=predict_batch,
)
