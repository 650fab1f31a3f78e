"""The settings that a task reads its data by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.config import ConfigError, DataSettings


@dataclass(frozen=True)
class Columns:
    """The names of the columns where the recipe leaves them open; "": there is none."""

    text: str = "text"
    text_pair: str | None = ""  # None: the task reads no second text
    label: str = "label"
    group: str = ""

    def fill(self, settings: DataSettings) -> DataSettings:
        """Return the settings with a name for each column that the task has; ConfigError where two are the same."""
        names: dict[str, Any] = {
            f"{name}_column": getattr(settings, f"{name}_column") or getattr(self, name) or ""
            for name in ("text", "text_pair", "label")
        }
        used = [name for name in names.values() if name]
        if twice := [f"data.{key} = {name!r}" for key, name in names.items() if name and used.count(name) > 1]:
            raise ConfigError(f"{', '.join(twice)} must differ")
        group = settings.group_column or ("" if settings.validation else self.group)
        return replace(settings, **names, group_column=group)


@dataclass(frozen=True)
class TaskSettings:
    """[data] with every column named, and the section of the task itself."""

    data: DataSettings
    own: Any = None  # one of the task's section in engine/config/sections.py; None: it has no section

    def is_training_split(self, name: str, labelled: bool) -> bool:
        """Return whether `name` is the one file that is split into training and validation examples."""
        return labelled and name == self.data.train and not self.data.validation
