"""Several tasks on one model: the functions of each are called on its own rows, examples and labels.

The rows of all tasks are one list, in which a row says to which task it belongs. Labels are "name/label", metrics
"name/metric". Evaluation is that of each task alone, on the shared backbone and its own head (engine/evaluate.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from data import Examples, Row
from data.errors import DataError
from data.multi_task import MultiTaskExamples, join_examples, labels_of
from engine.config import AugmentSettings, Config, ConfigError
from engine.tasks.augmentation import RowEncoder, changed_settings
from engine.tasks.settings import TaskSettings
from engine.tasks.task import Task
from models import ModelError
from models.multi_task import NAME

MULTI_TASK = NAME  # the value of run.task, and the head
MEAN, LOSS = "mean", "loss"  # metrics of all tasks together


@dataclass(frozen=True)
class Part:
    """One of several tasks. name: that of its recipe. config: of a run of this task alone.

    ignored: the settings of its recipe that the run does not read.
    """

    name: str
    task: Task
    watched: str  # a metric of the task
    direction: str  # "max" or "min": which values of it are better
    weight: float
    config: Config
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MultiTask(Task):
    """A task of several parts; its slots are made by combine."""

    parts: tuple[Part, ...]


@contextmanager
def of_task(name: str) -> Iterator[None]:
    """Put the name of a task before an error of its settings that is raised in the block."""
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        error.args = (f"{name}: {error}",)
        raise


def combine(parts: Sequence[Part]) -> MultiTask:
    """Return the task of several tasks.

    Its first metric is the mean of the metrics that they watch; the mean of their losses where a lower one is better.
    """
    own = [f"{part.name}/{metric}" for part in parts for metric in part.task.metrics]
    together = (MEAN, LOSS) if all(part.direction == "max" for part in parts) else (LOSS,)
    return MultiTask(
        head=MULTI_TASK,
        metrics=(*together, *own),
        details=tuple(
            f"{part.name}/{metric}"
            for part in parts
            for metric in part.task.metrics
            if metric not in (part.watched, LOSS)
        ),
        parts=tuple(parts),
        noun=parts[0].task.noun,
        read=_refuse,
        load_processor=partial(_load_processors, parts),
        encode=partial(_encode, parts),
        augment=partial(_augment, parts),
        show_augmented=partial(_show_augmented, parts),
        evaluate_batch=_refuse,
        compute_metrics=_refuse,
        predict_batch=_refuse,
    )


def mark_rows(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return the rows of the tasks {name: rows} as one list of rows that know their task."""
    return [Row(row.id, row.line, {"task": name, "row": row}) for name, own in rows.items() for row in own]


def join_metrics(task: MultiTask, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of all tasks, from those of each, which is empty for a task without examples."""
    present = [part for part in task.parts if found[part.name]]
    together = {}
    if MEAN in task.metrics:
        together[MEAN] = math.fsum(found[part.name][part.watched] for part in present) / len(present)
    together[LOSS] = math.fsum(found[part.name].get(LOSS, math.nan) for part in present) / len(present)
    return together | {f"{part.name}/{key}": value for part in present for key, value in found[part.name].items()}


def _load_processors(parts: Sequence[Part], folder: Path) -> dict[str, Any]:
    return {part.name: part.task.load_processor(folder) for part in parts}


def _encoder(part: Part, processors: Mapping[str, Any], settings: TaskSettings, labels: Sequence[str]) -> RowEncoder:
    return part.task.encoder(processors[part.name], settings.own[part.name], labels_of(part.name, labels))


def _rows_of(part: Part, rows: Sequence[Row]) -> list[Row]:
    return [row.values["row"] for row in rows if row.values["task"] == part.name]


def _encode(
    parts: Sequence[Part],
    rows: list[Row],
    processors: Mapping[str, Any],
    settings: TaskSettings,
    labels: Sequence[str],
    labelled: bool,
) -> MultiTaskExamples:
    """Encode the rows of each task, one task after another."""
    encoders = {part.name: _encoder(part, processors, settings, labels) for part in parts}
    examples = {part.name: encoders[part.name](_rows_of(part, rows), labelled) for part in parts}
    return join_examples(examples, [part.weight for part in parts])


def _augment(
    parts: Sequence[Part], examples: Any, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int
) -> Examples:
    """Augment the examples of each task as its own recipe says; ConfigError for [augment] of the run."""
    for key in ("text", "image"):
        for name in changed_settings(getattr(settings, key)):
            raise ConfigError(
                f"augment.{key}.{name} has no effect on {MULTI_TASK}: the recipe of each task has its own [augment]"
            )
    augmented = {}
    for part in parts:
        own = _encoder(part, encode.processor, encode.settings, encode.labels)
        with of_task(part.name):
            augmented[part.name] = part.task.augment(
                examples.parts[part.name], _rows_of(part, rows), own, part.config.augment, seed
            )
    changed: MultiTaskExamples = replace(examples, parts=augmented)
    return changed


def _show_augmented(parts: Sequence[Part], examples: MultiTaskExamples, path: Path) -> str:
    """Return what each task shows of its augmented examples."""
    shown = {
        part.name: part.task.show_augmented(examples.parts[part.name], path.with_stem(f"{path.stem}-{part.name}"))
        for part in parts
    }
    return "\n\n".join(f"{name}: {text}" for name, text in shown.items() if text)


def _refuse(*_: Any) -> NoReturn:
    raise ConfigError(f"{MULTI_TASK}: rows are read, evaluated and predicted one task at a time")
