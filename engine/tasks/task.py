"""Task: the functions and names that define a task, from reading rows to writing predictions.

To write a task of your own, change some slots of one that exists. This file, named by `--run.plugins my_tasks.py`, adds
a task that reads star ratings and watches, with `--eval.mode max`, the class that is recalled worst:

    from dataclasses import replace

    from engine.metrics.text_classification import confusion_matrix
    from engine.tasks import TASKS as ENGINE_TASKS
    from engine.tasks import Columns

    base = ENGINE_TASKS["text-classification"]

    def compute_metrics(statistics, labels):
        confusion = confusion_matrix(statistics)  # rows: true classes, columns: predicted ones
        recall = confusion.diagonal() / confusion.sum(1).clamp_min(1)
        return base.compute_metrics(statistics, labels) | {"worst_recall": recall.min().item()}

    stars = replace(
        base,
        columns=Columns(text="review", label="stars"),
        metrics=("worst_recall", *base.metrics),
        compute_metrics=compute_metrics,
    )
    TASKS = {"stars": stars}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data import Batch, Examples, Row, Rows, load_tokenizer
from data.augmentation import text as text_augmentation
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics.by_example import add_rows
from engine.metrics.tables import no_tables
from engine.own_metrics import OwnMetric
from engine.step_loss import StepLoss
from engine.tasks.augmentation import RowEncoder, refuse_augmentation
from engine.tasks.settings import Columns, TaskSettings
from models import TaskModel


def no_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    """Return no labels, for a task without classes."""
    return []


def no_split_labels(rows: list[Row], settings: TaskSettings) -> list[Collection[str]]:
    """Return [], for a task whose held-out split is random, or stratified by the label column."""
    return []


def accept_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    """Accept all labels, for a task whose `read` checks the targets."""


def column_texts(row: Row, settings: TaskSettings) -> list[str]:
    """Return the texts in the columns of a row that the task reads; words with spaces between."""
    data, values = settings.data, row.values
    first = values[data.text_column]
    texts = [" ".join(first) if isinstance(first, list) else first]
    return [*texts, values[data.text_pair_column]] if data.text_pair_column else texts


def show_augmented_texts(examples: Examples, path: Path) -> str:
    """Return the first rows beside their augmented versions; "" where nothing is augmented."""
    return text_augmentation.show_augmented(examples)


def no_step_loss(settings: TaskSettings) -> StepLoss | None:
    """Return None, for a task whose examples are learned from independently of each other."""
    return None


def all_usable(examples: Examples, labels: Sequence[str]) -> dict[str, str]:
    """Return no metrics, for a task whose metrics can compare models on any data."""
    return {}


def no_text(*_: Any) -> str:
    """Return "", for a slot that has nothing to print."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, as in TASKS of engine/tasks/__init__.py. Its functions, in the order in which a run calls them:

    read(name, settings, labelled) -> rows              read and check one file; one DataError for all its bad rows
    find_labels(name, rows, settings) -> names          find the classes, in data.labels or the training rows
    check_labels(name, rows, settings, labels)          write the labels that rows mean; DataError for unknown ones
    split_labels(rows, settings) -> labels of each row  those of which the held-out split needs an example
    load_processor(folder) -> processor                 load the tokenizer or image preprocessing of a checkpoint
    encode(rows, processor, settings, labels, labelled) -> examples    encode rows, in their order
    texts(row, settings) -> texts                       the texts of a row that the model reads; checksums of images
    augment(examples, rows, encode, augment, seed) -> examples         wrap the training examples as [augment] says
    show_augmented(examples, path) -> text              show augmented examples in a dry run; a picture goes to `path`
    step_loss(settings) -> losses of outputs            the loss of all examples of a step together, if they depend on
                                                        each other (engine/step_loss.py); None: the head's
    evaluate_batch(model, batch, examples, generate) -> statistics     evaluate one labelled batch
    evaluate_examples(model, batch, examples, generate) -> rows        the same, a row of numbers for each example
    collect(rows, labels) -> statistics                 turn the rows of any examples into statistics
    references(examples, labels) -> values              what a metric of one's own compares predictions with
    compute_metrics(statistics, labels) -> {name: value}               compute the metrics from summed statistics
    format_table(statistics, labels) -> text            format what engine.evaluate prints after the metrics
    tables(statistics, labels) -> {name: value}         what engine.evaluate --output has beside the metrics
    unusable_metrics(examples, labels) -> {metric: why}  the metrics that cannot compare models on these examples
    predict_batch(model, batch, examples, generate) -> dicts           predict one batch: a dict for each example
    show_generations(model, examples, generate, count) -> text         generate the texts that an evaluation prints

    Statistics are an fp64 vector that adds over batches and ranks; an empty batch gives zeros of the same shape. The
    dicts of predict_batch are in the order of the batch; engine.predict adds the ids.

    A task without evaluate_examples has no confidence intervals, one without references no metric of the user's own
    on predictions. engine/metrics/by_example.py has rows for classes, sets of labels, numbers, tokens and answers.
    """

    head: str  # a key of models.HEADS
    metrics: tuple[str, ...]  # names; the first is watched unless eval.metric names another
    details: tuple[str, ...] = ()  # those of the metrics that a run does not show unless it watches them
    columns: Columns = field(default_factory=Columns)
    section: str = ""  # the recipe's section that only this task, or a few, read
    problem: str | None = None  # of a classifier: single-label, multi-label or regression
    stratify: bool = False  # whether the held-out split keeps the proportions of the values of the label column
    generates: bool = False  # whether it writes texts, and so reads [generate]
    noun: str = "text"  # what the task reads, in notes
    long_texts: tuple[str, ...] = ("truncate",)  # the values of data.long_texts that it can read
    caches: bool = False  # whether data.cache can keep its examples
    predicts: str = "label"  # the key of a prediction that is null for a row that cannot be predicted
    has_thresholds: bool = False  # whether it predicts by the thresholds of config.json (engine/calibration.py)
    own_metrics: Mapping[str, OwnMetric] = field(default_factory=dict)  # of plugins, on predictions and references

    read: Callable[[str, TaskSettings, bool], list[Row]]
    find_labels: Callable[[str, Rows, TaskSettings], list[str]] = no_labels
    check_labels: Callable[[str, Rows, TaskSettings, Sequence[str]], None] = accept_labels
    split_labels: Callable[[list[Row], TaskSettings], Sequence[Collection[str]]] = no_split_labels
    load_processor: Callable[[Path], Any] = load_tokenizer
    encode: Callable[[list[Row], Any, TaskSettings, Sequence[str], bool], Examples]
    texts: Callable[[Row, TaskSettings], Sequence[str]] = column_texts
    augment: Callable[[Any, list[Row], RowEncoder, AugmentSettings, int], Examples] = refuse_augmentation
    show_augmented: Callable[[Any, Path], str] = show_augmented_texts
    step_loss: Callable[[TaskSettings], StepLoss | None] = no_step_loss
    evaluate_batch: Callable[[TaskModel, Batch, Any, GenerateSettings], Tensor]
    evaluate_examples: Callable[[TaskModel, Batch, Any, GenerateSettings], Tensor] | None = None
    collect: Callable[[Tensor, Sequence[str]], Tensor] = add_rows
    references: Callable[[Any, Sequence[str]], list[Any]] | None = None
    compute_metrics: Callable[[Tensor, Sequence[str]], dict[str, float]]
    format_table: Callable[[Tensor, Sequence[str]], str] = no_text
    tables: Callable[[Tensor, Sequence[str]], dict[str, Any]] = no_tables
    unusable_metrics: Callable[[Any, Sequence[str]], dict[str, str]] = all_usable
    predict_batch: Callable[[TaskModel, Batch, Any, GenerateSettings], list[dict[str, Any]]]
    show_generations: Callable[[TaskModel, Any, GenerateSettings, int], str] = no_text

    def encoder(self, processor: Any, settings: TaskSettings, labels: Sequence[str]) -> RowEncoder:
        """Return the function that encodes rows; `augment` uses it too."""
        return RowEncoder(self.encode, self.read, processor, settings, tuple(labels), self.texts)
