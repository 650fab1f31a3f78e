"""The settings that a task reads its data by, from keywords."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from engine.config import Config, DataSettings, override
from engine.tasks import TASKS
from engine.tasks.settings import TaskSettings

DATA = {field.name for field in fields(DataSettings)}


def task_settings(task: str, **settings: Any) -> TaskSettings:
    """Return [data] of a task with its columns filled in, and its own section.

    Each keyword is a setting by its last name: one of [data], or else one of the task's section.
    """
    section = TASKS[task].section
    named = {f"data.{key}" if key in DATA else f"{section}.{key}": value for key, value in settings.items()}
    return settings_of(override(Config(), named), task)


def settings_of(config: Config, task: str = "") -> TaskSettings:
    """Return what the task of a configuration, or `task`, reads its data by."""
    chosen = TASKS[task or config.run.task]
    own = getattr(config, chosen.section) if chosen.section else None
    more = {"generate": config.generate, "bleu_tokenizer": config.eval.bleu_tokenizer}
    return TaskSettings(chosen.columns.fill(config.data), own, **more)
