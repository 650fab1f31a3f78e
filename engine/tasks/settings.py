"""The settings by which a task reads its data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from data.formats.options import FileOptions
from engine.config import ConfigError, DataSettings, GenerateSettings


@dataclass(frozen=True)
class Columns:
    """The default names of a task's columns; "" for a column that the task does not have."""

    text: str = "text"
    text_pair: str | None = ""  # None: the task reads no second text
    label: str = "label"
    group: str = ""

    def fill(self, settings: DataSettings) -> DataSettings:
        """Return the settings with a name for each column of the task; ConfigError where two names are the same."""
        names: dict[str, Any] = {
            f"{name}_column": getattr(settings, f"{name}_column") or getattr(self, name) or ""
            for name in ("text", "text_pair", "label")
        }
        used = [name for name in names.values() if name]
        if twice := [f"data.{key} = {name!r}" for key, name in names.items() if name and used.count(name) > 1]:
            raise ConfigError(f"{', '.join(twice)} must differ")
        is_context = bool(self.group) and self.group == self.text_pair  # which may have another name
        own_group = names["text_pair_column"] if is_context else self.group
        group = settings.group_column or ("" if settings.validation else own_group)
        return replace(settings, **names, group_column=group)


@dataclass(frozen=True)
class TaskSettings:
    """[data] with every column named, and the task's own section of the recipe."""

    data: DataSettings
    own: Any = None  # a class of engine/config/task_sections.py, that of Task.section; None: no section
    accept_empty: bool = False  # leave rows without a text out, as evaluation and prediction do
    generate: GenerateSettings = field(default_factory=GenerateSettings)  # of a task that writes texts
    bleu_tokenizer: str = "auto"  # eval.bleu_tokenizer
    kept: tuple[str, ...] = ()  # more columns that are read where a file has them

    @property
    def file_options(self) -> FileOptions:
        """How files are read, as [data] says."""
        data = self.data
        named = {
            f"data.{key}_column": getattr(data, f"{key}_column") for key in ("text", "text_pair", "label", "group")
        }
        return FileOptions(
            format=data.format,
            id_column=data.id_column,
            encoding=data.encoding,
            delimiter=data.delimiter,
            quotes=data.quotes,
            bad_rows=data.bad_rows,
            accept_empty=self.accept_empty,
            kept=self.kept,
            # A task's own group is another column of it, whose own setting is the one to name.
            settings={column: key for key, column in reversed(named.items()) if column},
        ).also_reading(self.kept)

    def is_training_split(self, name: str, labelled: bool) -> bool:
        """Return whether `name` is the file that is split into training and validation examples."""
        return labelled and name == self.data.train and not self.data.validation

    def group_column(self, name: str, labelled: bool) -> str:
        """Return the column of groups in the file `name`, or "" for a file that is not split by groups."""
        return self.data.group_column if self.is_training_split(name, labelled) else ""

    def label_column(self, labelled: bool) -> str:
        """Return the column of labels, or "" for rows that are read without labels."""
        return self.data.label_column if labelled else ""
