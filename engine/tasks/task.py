"""What a task is: how its rows are read and encoded, which head learns it, how it is measured and predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data import Batch, Examples, Row, load_tokenizer
from data.augmentation import text as augment
from engine.config import AugmentSettings, GenerateSettings
from engine.tasks.augmentation import Encode, refuse_augmentation
from engine.tasks.settings import Columns, TaskSettings
from models import TaskModel


def no_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    """Of a task that has no classes."""
    return []


def any_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    """Of a task whose targets were checked when they were read."""


def sheet_of_texts(examples: Examples, path: Path) -> str:
    """The first rows beside what augmentation makes of them; "" where there is none."""
    return augment.sheet(examples)


def no_text(*_: Any) -> str:
    """Of a task that has nothing more to show."""
    return ""


@dataclass(frozen=True)
class Task:
    """One value a task; engine/tasks/__init__.py has the table. Rows that are bad raise one DataError with all of them.

    evaluate_batch: runs the model on a batch and returns a fp64 vector that adds over batches and ranks, zeros for an empty
    batch. predict: one output row for each example of a batch, in its order; the engine adds the ids.
    """

    head: str  # a key of models.HEADS
    metrics: tuple[str, ...]  # names; the first is watched unless eval.metric names another
    read: Callable[[str, TaskSettings, bool], list[Row]]  # (file, settings, with labels)
    encode: Callable[
        [list[Row], Any, TaskSettings, Sequence[str], bool], Examples
    ]  # (rows, processor, settings, labels, with)
    evaluate_batch: Callable[[TaskModel, Batch, Any, GenerateSettings], Tensor]
    compute_metrics: Callable[[Tensor, Sequence[str]], dict[str, float]]
    predict_batch: Callable[[TaskModel, Batch, Any, GenerateSettings], list[dict[str, Any]]]
    find_labels: Callable[[str, list[Row], TaskSettings], list[str]] = no_labels
    check_labels: Callable[[str, list[Row], TaskSettings, Sequence[str]], None] = any_labels
    columns: Columns = Columns()
    section: str = ""  # of the recipe, that this task alone (or its family) reads
    generates: bool = False  # does it write texts, and so read [generate]?
    problem: str | None = None  # of a classifier: single-label, multi-label, regression
    stratify: bool = False  # is each label held out in proportion?
    load_processor: Callable[[Path], Any] = load_tokenizer  # what a checkpoint folder prepares its inputs with
    augment: Callable[[Any, list[Row], Encode, AugmentSettings, int], Examples] = refuse_augmentation
    show_augmented: Callable[[Any, Path], str] = (
        sheet_of_texts  # augmented samples, for a dry run; pictures go to the path
    )
    show_generations: Callable[[TaskModel, Any, GenerateSettings, int], str] = (
        no_text  # (.., count): shown after an evaluation
    )
    format_table: Callable[[Tensor, Sequence[str]], str] = no_text  # what `engine.evaluate` prints beside the metrics

    def encoder(self, processor: Any, settings: TaskSettings, labels: Sequence[str]) -> Encode:
        """How labelled rows become examples."""
        return Encode(self.encode, processor, settings, tuple(labels), self.read)
