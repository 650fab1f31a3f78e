"""The table of the tasks, and how one is found and its files are read: one line a task, one file for those alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data import Row, sample_rows, split_rows
from data.errors import DataError
from engine.config import ConfigError, DataSettings, choose_from
from engine.tasks import causal_lm as language
from engine.tasks import image_classification as images
from engine.tasks import question_answering as answering
from engine.tasks import relation_extraction as relations
from engine.tasks import seq2seq
from engine.tasks import text_classification as classification
from engine.tasks import token_classification as tagging
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task

TASKS: dict[str, Task] = {
    "text-classification": classification.TEXT_CLASSIFICATION,
    "multi-label-classification": classification.MULTI_LABEL_CLASSIFICATION,
    "text-regression": classification.TEXT_REGRESSION,
    "token-classification": tagging.TOKEN_CLASSIFICATION,
    "causal-lm": language.CAUSAL_LM,
    "dialogue": language.DIALOGUE,
    "summarization": seq2seq.SUMMARIZATION,
    "translation": seq2seq.TRANSLATION,
    "question-answering": answering.QUESTION_ANSWERING,
    "relation-extraction": relations.RELATION_EXTRACTION,
    "image-classification": images.IMAGE_CLASSIFICATION,
}

__all__ = ["TASKS", "Columns", "Task", "TaskSettings", "find_task", "read_training_data"]


def find_task(name: str, metric: str = "") -> tuple[Task, str]:
    """The task and the metric to watch; ConfigError where a name is unknown."""
    if name not in TASKS:
        raise ConfigError(f"run.task = {name!r}: {choose_from(name, TASKS)}")
    task = TASKS[name]
    if metric and metric not in task.metrics:
        raise ConfigError(f"eval.metric = {metric!r} is no metric of {name}: {choose_from(metric, task.metrics)}")
    return task, metric or task.metrics[0]


def read_training_data(
    task: Task, settings: TaskSettings, seed: int
) -> tuple[list[Row], list[Row], list[Row], list[str]]:
    """(training rows, validation rows, test rows, label names), all read and checked before anything is trained.

    data.max_train_examples is of what is left to train on once the validation rows are held out, which are the same at any limit.
    Raises DataError with all that is wrong in all files; which labels are unknown can only be said of files without
    another error, since the training file says which are known.
    """
    names = [name for name in (settings.data.train, settings.data.validation, settings.data.test) if name]
    rows = _for_each(names, lambda name: task.read(name, settings, True))
    labels = task.find_labels(settings.data.train, rows[settings.data.train], settings)
    _for_each(names, lambda name: task.check_labels(name, rows[name], settings, labels))
    test_rows = rows.get(settings.data.test, [])
    if settings.data.validation:
        train_rows, held_out = rows[settings.data.train], rows[settings.data.validation]
    else:
        fraction, label = settings.data.validation_fraction, settings.data.label_column if task.stratify else ""
        train_rows, held_out = split_rows(rows[settings.data.train], fraction, seed, settings.data.group_column, label)
    return sample_rows(train_rows, settings.data.max_train_examples, seed), held_out, test_rows, labels


def _for_each(names: Sequence[str], function: Callable[[str], Any]) -> dict[str, Any]:
    """{name: function(name)}, each once and in their order; the DataErrors of all of them are raised as one."""
    results, errors = {}, []
    for name in dict.fromkeys(names):
        try:
            results[name] = function(name)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return results
