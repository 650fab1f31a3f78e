"""The table of tasks, and the rows of a run. Each task is one file, with a function for each slot of Task."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from data import Row, Rows, sample_rows, split_rows
from data.errors import MEMORY, BadRowsError, DataError
from data.folds import parse_fold, split_fold
from data.multi_task import join_labels
from data.prepared import VALIDATION, check_no_folder, is_prepared, read_rows_file
from engine.config import ConfigError, choose_from, shipped_recipes
from engine.config.hf_names import HF_TASKS
from engine.tasks.causal_lm import CAUSAL_LM
from engine.tasks.comparison import compare_splits
from engine.tasks.dialogue import DIALOGUE
from engine.tasks.image_classification import IMAGE_CLASSIFICATION
from engine.tasks.masked_lm import MASKED_LM
from engine.tasks.multi_label_classification import MULTI_LABEL_CLASSIFICATION
from engine.tasks.multi_label_image_classification import MULTI_LABEL_IMAGE_CLASSIFICATION
from engine.tasks.multi_task import MULTI_TASK, MultiTask, mark_rows
from engine.tasks.multiple_choice import MULTIPLE_CHOICE
from engine.tasks.prepared import open_prepared
from engine.tasks.question_answering import QUESTION_ANSWERING
from engine.tasks.relation_extraction import RELATION_EXTRACTION
from engine.tasks.sentence_embedding import SENTENCE_EMBEDDING
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.span_corruption import SPAN_CORRUPTION
from engine.tasks.summarization import SUMMARIZATION
from engine.tasks.task import Task, no_labels
from engine.tasks.text_classification import TEXT_CLASSIFICATION
from engine.tasks.text_regression import TEXT_REGRESSION
from engine.tasks.token_classification import TOKEN_CLASSIFICATION
from engine.tasks.translation import TRANSLATION

TASKS: dict[str, Task] = {
    "text-classification": TEXT_CLASSIFICATION,
    "multi-label-classification": MULTI_LABEL_CLASSIFICATION,
    "text-regression": TEXT_REGRESSION,
    "token-classification": TOKEN_CLASSIFICATION,
    "multiple-choice": MULTIPLE_CHOICE,
    "masked-lm": MASKED_LM,
    "span-corruption": SPAN_CORRUPTION,
    "sentence-embedding": SENTENCE_EMBEDDING,
    "causal-lm": CAUSAL_LM,
    "dialogue": DIALOGUE,
    "summarization": SUMMARIZATION,
    "translation": TRANSLATION,
    "question-answering": QUESTION_ANSWERING,
    "relation-extraction": RELATION_EXTRACTION,
    "image-classification": IMAGE_CLASSIFICATION,
    "multi-label-image-classification": MULTI_LABEL_IMAGE_CLASSIFICATION,
}

__all__ = [
    "MULTI_TASK",
    "TASKS",
    "Columns",
    "Task",
    "TaskSettings",
    "check_labels",
    "find_task",
    "name_choices",
    "read_file",
    "read_training_data",
]

T = TypeVar("T")
SKIP_HINT = '(data.bad_rows = "skip" leaves such rows out)'


def name_choices(name: str, tasks: Iterable[str] = (*TASKS, MULTI_TASK)) -> str:
    """Return the end of a message on an unknown task: the one that others call so, or all `tasks` and the nearest."""
    known = HF_TASKS.get(name.lower().replace("_", "-").replace(" ", "-"))
    return f"that is {known!r} here" if known else choose_from(name, tasks)


def find_task(name: str, metric: str = "") -> tuple[Task, str]:
    """Return the task and the metric to watch, by default the task's first; ConfigError for an unknown name."""
    if name == MULTI_TASK:
        raise ConfigError(f"run.task = {name!r} is trained by engine.train; here, use the recipe of one of its tasks")
    if name not in TASKS:
        raise ConfigError(f"run.task = {name!r}: {name_choices(name)}")
    task = TASKS[name]
    if metric and metric not in task.metrics:
        raise ConfigError(f"eval.metric = {metric!r} is not a metric of {name}: {choose_from(metric, task.metrics)}")
    return task, metric or task.metrics[0]


class TrainingData(NamedTuple):
    """The rows of a run, the names of their labels, and what is to be said about the files before training."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: list[str]
    notes: list[str]  # one line each


def read_training_data(task: Task, settings: TaskSettings, seed: int) -> TrainingData:
    """Return the rows for training, validation and test, and the labels, all read and checked.

    data.max_train_examples applies after the validation rows are held out, so that these do not depend on it.
    Raises one DataError with all errors of all files. Unknown labels are reported only if the files have no other
    error, since the training file defines the known labels.
    """
    data = settings.data
    if isinstance(task, MultiTask):
        return _read_tasks(task, settings, seed)
    if is_prepared(data.train):
        return _read_prepared(task, settings, seed)
    names = [name for name in (data.train, data.validation, data.test) if name]
    check_fetched(names)
    rows = _for_each(names, lambda name: read_file(task, name, settings, True))
    labels = task.find_labels(data.train, rows[data.train], settings)
    _for_each(names, lambda name: check_labels(task, name, rows[name], settings, labels))
    fold_notes: list[str] = []
    if data.validation:
        train_rows, validation_rows = list(rows[data.train]), list(rows[data.validation])
    elif fold := parse_fold(data.fold):
        to_share = _labels_to_share(task, rows[data.train], settings)
        train_rows, validation_rows, fold_notes = split_fold(rows[data.train], fold, seed, data.group_column, to_share)
    else:
        stratified_by = data.label_column if task.stratify else ""
        to_cover = task.split_labels(rows[data.train], settings)
        train_rows, validation_rows = split_rows(
            rows[data.train], data.validation_fraction, seed, data.group_column, stratified_by, to_cover
        )
    train_rows = sample_rows(train_rows, data.max_train_examples, seed)
    test_rows: list[Row] = rows.get(data.test, [])
    notes = [f"{name.removeprefix(MEMORY)}: {note}" for name in rows for note in rows[name].notes] + fold_notes
    if task.find_labels is no_labels:  # the summary compares classes
        kinds = [
            {kind for found in task.split_labels(part, settings) for kind in found}
            for part in (train_rows, validation_rows)
        ]
        notes += [f"warning: no validation example with {kind}" for kind in sorted(kinds[0] - kinds[1])]
    notes += compare_splits(task, settings, train_rows, validation_rows, test_rows)
    return TrainingData(train_rows, validation_rows, test_rows, labels, notes)


def _read_tasks(task: MultiTask, settings: TaskSettings, seed: int) -> TrainingData:
    """Return the rows of several tasks, each read as for a run of this task alone."""
    tasks = {part.name: part.task for part in task.parts}
    found = _for_each([*tasks], lambda name: read_training_data(tasks[name], settings.own[name], seed))
    notes = [
        f"{part.name}: of its recipe, {', '.join(part.ignored)} have no effect; those of this recipe are for all tasks"
        for part in task.parts
        if part.ignored
    ]
    notes += [f"{name}: {note}" for name, data in found.items() for note in data.notes]
    return TrainingData(
        mark_rows({name: data.train for name, data in found.items()}),
        mark_rows({name: data.validation for name, data in found.items()}),
        mark_rows({name: data.test for name, data in found.items()}),
        join_labels({name: data.labels for name, data in found.items()}),
        notes,
    )


def _labels_to_share(task: Task, rows: Rows, settings: TaskSettings) -> Sequence[Collection[str]]:
    """Return the labels of each row of which every fold should have its share; () for a task without any."""
    if task.stratify:
        return [(str(row.values.get(settings.data.label_column)),) for row in rows]
    return task.split_labels(rows, settings)


def _read_prepared(task: Task, settings: TaskSettings, seed: int) -> TrainingData:
    """Return the rows of a run on a prepared folder, whose training rows are in no memory."""
    data = settings.data
    if data.fold:
        raise ConfigError(
            f"data.fold = {data.fold!r}: data.train = {data.train!r} is a prepared folder, "
            "whose validation rows are fixed: name the file that it was made from"
        )
    name = next(name for name, known in TASKS.items() if known is task)
    train = open_prepared(task, name, settings, seed)
    labels = train.manifest.labels
    names = [name for name in (data.validation, data.test) if name]
    rows = _for_each(names, lambda name: read_file(task, name, settings, True))
    _for_each(names, lambda name: check_labels(task, name, rows[name], settings, labels))
    held_out = read_rows_file(train.folder / VALIDATION)
    notes = [f"{name}: {note}" for name, found in [(data.train, train), *rows.items()] for note in found.notes]
    validation: list[Row] = rows[data.validation] if data.validation else held_out
    return TrainingData(train, list(validation), rows.get(data.test, Rows()), labels, notes)


def read_file(task: Task, name: str, settings: TaskSettings, labelled: bool) -> Rows:
    """Return the rows of a file as the task reads them; DataError with all its errors, and the way to skip bad rows."""
    check_no_folder(name)
    try:
        rows = task.read(name, settings, labelled)
    except BadRowsError as error:
        raise DataError(f"{error}\n{SKIP_HINT}") from None
    return rows if isinstance(rows, Rows) else Rows(rows)  # a plugin's reader may return a list


def check_labels(task: Task, name: str, rows: Rows, settings: TaskSettings, labels: Sequence[str]) -> None:
    """Write the labels that the rows mean; DataError for unknown ones, and the way to leave their rows out."""
    try:
        task.check_labels(name, rows, settings, labels)
    except BadRowsError as error:
        raise DataError(f"{error}\n{SKIP_HINT}") from None


def check_fetched(names: Sequence[str]) -> None:
    """Raise DataError for the files and folders of shipped recipes that the user has to prepare first."""
    missing: dict[str, list[str]] = {}
    for name in names:
        folder, recipe = [*Path(name).parts, "", ""][:2]
        if folder == "datasets" and recipe in shipped_recipes() and not Path(name).exists():
            missing.setdefault(recipe, []).append(name)
    where = "" if importlib.util.find_spec("benchmarks") else ", in a checkout of the repository,"
    lines = []
    for recipe, files in missing.items():
        kind = "file" if Path(files[0]).suffix else "folder"
        absent, object_ = (f"no such {kind}", "it") if len(files) == 1 else (f"no such {kind}s", "them")
        lines.append(f"{', '.join(files)}: {absent}; `python -m benchmarks.prepare {recipe}`{where} writes {object_}")
    if lines:
        raise DataError("\n".join(lines))


def _for_each(names: Sequence[str], function: Callable[[str], T]) -> dict[str, T]:
    """Return {name: function(name)} for the distinct names; raise the DataErrors of all calls as one."""
    results, errors = {}, []
    for name in dict.fromkeys(names):
        try:
            results[name] = function(name)
        except DataError as error:
            errors += str(error).split("\n")
    if errors:
        hints = [SKIP_HINT] if SKIP_HINT in errors else []  # once, below the errors of all files
        raise DataError("\n".join([error for error in errors if error != SKIP_HINT] + hints))
    return results
