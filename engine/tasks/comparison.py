"""Notes on rows that are in two splits, and on rows of one text or image with different labels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from data import Row
from data.audit import has_texts
from data.formats.lines import locate, suffix_of
from data.formats.memory import is_in_memory
from data.formats.parquet import is_table_folder
from data.formats.rows import READERS
from data.overlap import comparable, describe_contradictions, describe_overlap, hash_rows
from engine.tasks.settings import TaskSettings
from engine.tasks.task import Task


def compare_splits(
    task: Task, settings: TaskSettings, train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]
) -> list[str]:
    """Return notes on texts (or images) that are also in the training data, and on those with several labels.

    A task that writes texts may have several answers to a text.
    """
    if not has_texts(train, lambda row: task.texts(row, settings)):
        return []
    column = "" if task.generates else settings.data.label_column

    texts_of, problem = task.texts, task.problem

    def content_of(row: Row) -> tuple[Hashable, Hashable]:
        return tuple(map(comparable, texts_of(row, settings))), _label_of(row.values.get(column), problem)

    training = hash_rows(train, content_of)
    is_shown, targets = task.noun == "text", "scores" if problem == "regression" else "labels"
    notes = describe_contradictions(f"training {task.noun}", training, content_of, is_shown, targets)
    for name, rows in (("validation", validation), ("test", test)):
        split = hash_rows(rows, content_of)
        file = getattr(settings.data, name)
        if _is_same_file(file, settings.data.train):
            note = f"data.{name} = {file!r} is the training file: its metrics say nothing about new {task.noun}s"
            notes.append(f"warning: {note}")
            continue
        overlap = describe_overlap(f"{name} {task.noun}", split, training)
        notes += overlap if file else [note + _hint_at_groups(task, settings) for note in overlap]
        notes += describe_contradictions(f"{name} {task.noun}", split, content_of, is_shown, targets)
    return notes


def _hint_at_groups(task: Task, settings: TaskSettings) -> str:
    """Return the setting that keeps equal texts in one split, for a file with columns that is not split by groups."""
    data = settings.data
    is_table = is_in_memory(data.train) or is_table_folder(path := locate(data.train)) or suffix_of(path) in READERS
    if data.group_column or task.noun == "image" or not is_table:
        return ""
    return f'; data.group_column = "{data.text_column}" keeps equal ones in one split'


def _label_of(value: Any, problem: str | None) -> Hashable:
    if isinstance(value, list):
        value = [getattr(item, "text", item) for item in value]  # of answers
        value = sorted(value, key=str) if problem == "multi-label" else value
    return comparable(value)


def _is_same_file(name: str, other: str) -> bool:
    if not name or is_in_memory(name) or is_in_memory(other):
        return False
    one, two = Path(locate(name)), Path(locate(other))
    return one.exists() and two.exists() and one.samefile(two)
