"""Training from a prepared folder (data/prepared.py) in the place of a file: the settings have to be the same."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from data.formats.lines import locate
from data.prepared import PreparedRows, read_manifest
from engine.config import ConfigError
from engine.tasks.settings import TaskSettings
from engine.tasks.task import Task

# Settings of [data] that do not change the training examples.
NOT_READ = ("train", "test", "teacher_file", "cache", "num_workers")
OF_SPLIT = ("validation_fraction", "group_column")  # read where rows are held out
OF_EVALUATION = ("question_answering.no_answer_threshold",)
NOTE = "the texts of the splits are not compared with one another, as those of a file are"


def describe_settings(settings: TaskSettings, task: Task) -> dict[str, Any]:
    """Return {"section.key": value} of the settings that training examples depend on, with values of JSON."""
    data = {key: value for key, value in asdict(settings.data).items() if key not in NOT_READ}
    if data["validation"]:
        data = {key: value for key, value in data.items() if key not in OF_SPLIT} | {"validation": "(a file)"}
    own = {} if settings.own is None else asdict(settings.own)
    named = {f"data.{key}": value for key, value in data.items()} | {f"{task.section}.{k}": v for k, v in own.items()}
    read = {key: value for key, value in named.items() if key not in OF_EVALUATION}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in read.items()}


def find_difference(given: dict[str, Any], known: dict[str, Any], folder: Path) -> str:
    """Return the sentence on the first setting that is not the one a folder was prepared with; "" where all are."""
    different = [key for key in {**known, **given} if given.get(key) != known.get(key)]
    if not different:
        return ""
    key = different[0]
    if key == "data.validation":
        was, now = ("a file of its own", "held out") if known[key] else ("held out", "a file of its own")
        return (
            f"{folder} was prepared with validation rows that are {was}, and now they are {now}: set data.validation "
            "as then, or prepare another folder"
        )
    more = f" (and {', '.join(different[1:])} differ{'s' if len(different) == 2 else ''} too)" if different[1:] else ""
    return (
        f"{key} = {given.get(key)!r}, but {folder} was prepared with {known.get(key)!r}{more}: give the same, or "
        "prepare another folder"
    )


def open_prepared(task: Task, name: str, settings: TaskSettings, seed: int) -> PreparedRows:
    """Return the training rows of the folder data.train, none of which is in memory.

    name: of the task. Raises ConfigError for settings that the folder was not prepared with, and DataError for a shard
    that is missing or damaged.
    """
    folder = locate(settings.data.train)
    known = read_manifest(folder)
    if name != known.task:
        raise ConfigError(f"run.task = {name!r}, but {folder} was prepared with {known.task!r}")
    if difference := find_difference(describe_settings(settings, task), known.settings, folder):
        raise ConfigError(difference)
    if seed != known.seed and (not settings.data.validation or settings.data.max_train_examples):
        raise ConfigError(
            f"run.seed = {seed}, but {folder} was prepared with {known.seed}, which chose the rows that are held out: "
            "give the same, or prepare another folder"
        )
    rows = PreparedRows(folder, known)
    rows.notes.append(NOTE)
    if known.code != checksum_of_code():
        rows.notes.append("it was prepared by another version of this program")
    return rows


@cache
def checksum_of_code() -> str:
    """Return the checksum of all code that reads and encodes rows."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for package in (sys.modules["data"], sys.modules["engine.tasks"]):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
