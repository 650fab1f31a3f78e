"""How a file is read: the settings of [data] that all readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class FileOptions:
    """How a file is read. Readers pass it on unchanged, and read the fields of their format."""

    format: str = "auto"  # auto: by the end of the name
    id_column: str = "id"  # a file without this column has record numbers as ids
    encoding: str = ""  # Python's name of a text encoding; "": UTF-8
    delimiter: str = ""  # between the fields of csv and tsv; "": the format's own
    quotes: str = "auto"  # whether quotes enclose fields: yes, no, backslash (before inner ones); auto: in csv they do
    bad_rows: str = "raise"  # or skip
    accept_empty: bool = False  # leave rows without a text out instead of raising an error, as predictions do
    kept: tuple[str, ...] = ()  # columns that the rows have beside those that the task needs, where the file has them
    has_lists: bool = False  # whether a row may have a list in its first column; then a list of texts is not a column
    # {column: the setting that names it}, for messages
    settings: Mapping[str, str] = field(default_factory=dict)
    # Return the hint for a file that lacks a required column, from the columns that it has; "": a guess is made.
    hint: Callable[[Sequence[str]], str] | None = None

    def name_unused(self, keys: Iterable[str]) -> list[str]:
        """Return a note on the settings of other formats, which other files of the recipe may need; [] without any."""
        given = [f"data.{key}" for key in keys if getattr(self, key) != getattr(FileOptions(), key)]
        return [f"{' and '.join(given)}: no effect on a file of this format"] if given else []

    @property
    def kept_label(self) -> str:
        """The column of labels, if rows without labels are to have it too; else ""."""
        return next((column for column in self.kept if self.settings.get(column) == "data.label_column"), "")

    def also_reading(self, columns: Iterable[str]) -> FileOptions:
        """Return the options of a reader that reads these columns too, in a file that has them."""
        return replace(self, settings={**dict.fromkeys(columns, ""), **self.settings})
