"""The table of tasks, and the rows of a run. Each task is one file, with a function for each slot of Task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from data import Row, sample_rows, split_rows
from data.errors import DataError
from engine.config import ConfigError, choose_from, shipped_recipes
from engine.tasks.causal_lm import CAUSAL_LM
from engine.tasks.dialogue import DIALOGUE
from engine.tasks.image_classification import IMAGE_CLASSIFICATION
from engine.tasks.multi_label_classification import MULTI_LABEL_CLASSIFICATION
from engine.tasks.question_answering import QUESTION_ANSWERING
from engine.tasks.relation_extraction import RELATION_EXTRACTION
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.summarization import SUMMARIZATION
from engine.tasks.task import Task
from engine.tasks.text_classification import TEXT_CLASSIFICATION
from engine.tasks.text_regression import TEXT_REGRESSION
from engine.tasks.token_classification import TOKEN_CLASSIFICATION
from engine.tasks.translation import TRANSLATION

TASKS: dict[str, Task] = {
    "text-classification": TEXT_CLASSIFICATION,
    "multi-label-classification": MULTI_LABEL_CLASSIFICATION,
    "text-regression": TEXT_REGRESSION,
    "token-classification": TOKEN_CLASSIFICATION,
    "causal-lm": CAUSAL_LM,
    "dialogue": DIALOGUE,
    "summarization": SUMMARIZATION,
    "translation": TRANSLATION,
    "question-answering": QUESTION_ANSWERING,
    "relation-extraction": RELATION_EXTRACTION,
    "image-classification": IMAGE_CLASSIFICATION,
}

__all__ = ["TASKS", "Columns", "Task", "TaskSettings", "find_task", "read_training_data"]

T = TypeVar("T")


def find_task(name: str, metric: str = "") -> tuple[Task, str]:
    """Return the task and the metric to watch, by default the task's first; ConfigError for an unknown name."""
    if name not in TASKS:
        raise ConfigError(f"run.task = {name!r}: {choose_from(name, TASKS)}")
    task = TASKS[name]
    if metric and metric not in task.metrics:
        raise ConfigError(f"eval.metric = {metric!r} is not a metric of {name}: {choose_from(metric, task.metrics)}")
    return task, metric or task.metrics[0]


def read_training_data(
    task: Task, settings: TaskSettings, seed: int
) -> tuple[list[Row], list[Row], list[Row], list[str]]:
    """Return (training rows, validation rows, test rows, label names), all read and checked.

    data.max_train_examples applies after the validation rows are held out, so that these do not depend on it.
    Raises one DataError with all errors of all files. Unknown labels are reported only if the files have no other
    error, since the training file defines the known labels.
    """
    data = settings.data
    names = [name for name in (data.train, data.validation, data.test) if name]
    _for_each(names, _check_prepared)
    rows = _for_each(names, lambda name: task.read(name, settings, True))
    labels = task.find_labels(data.train, rows[data.train], settings)
    _for_each(names, lambda name: task.check_labels(name, rows[name], settings, labels))
    if data.validation:
        train_rows, validation_rows = rows[data.train], rows[data.validation]
    else:
        stratified_by = data.label_column if task.stratify else ""
        train_rows, validation_rows = split_rows(
            rows[data.train], data.validation_fraction, seed, data.group_column, stratified_by
        )
    train_rows = sample_rows(train_rows, data.max_train_examples, seed)
    return train_rows, validation_rows, rows.get(data.test, []), labels


def _check_prepared(name: str) -> None:
    """Raise DataError for a file of a shipped recipe that the user has to prepare first."""
    path = Path(name)
    folder, recipe = [*path.parts, "", ""][:2]
    if folder == "datasets" and recipe in shipped_recipes() and not path.exists():
        raise DataError(f"{name}: no such file; `python -m benchmarks.prepare {recipe}` writes it")


def _for_each(names: Sequence[str], function: Callable[[str], T]) -> dict[str, T]:
    """Return {name: function(name)} for the distinct names; raise the DataErrors of all calls as one."""
    results, errors = {}, []
    for name in dict.fromkeys(names):
        try:
            results[name] = function(name)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return results
