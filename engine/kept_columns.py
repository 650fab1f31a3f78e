"""Columns of the input that predictions carry: `engine.predict --keep text,label`.

They are the member "input" of a prediction, {"id": ..., "input": {"text": ..., "label": ...}, "label": ...}, so that
the right label and the predicted one can have the same name. In a table they are columns such as `input.label`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from data import Row
from data.formats.columns import name_all
from data.formats.rows import KEPT
from engine.config import ConfigError, did_you_mean

MEMBER = "input"
INTERNAL = "<"  # what the name of a column begins with that no file has
PLAIN = (str, int, float, bool)


def parse_names(text: str | None, vectors: Path | None = None) -> tuple[str, ...]:
    """Return the columns of --keep, each once; () where it is not given.

    vectors: the output, where its format has vectors and ids only. Raises ConfigError.
    """
    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise ConfigError(f"--keep = {text!r:.80} should be columns with commas between them, as in --keep text,label")
    if vectors is not None:
        raise ConfigError(f"--keep: {vectors.suffix} files of vectors have no more columns; name a .jsonl or .csv")
    return names


def keep(prediction: dict[str, Any], values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a prediction with the columns `names` of its row after its id; null for those that are not in `values`."""
    if not names:
        return prediction
    return {"id": prediction["id"], MEMBER: {name: as_plain(_value_of(values, name)) for name in names}} | prediction


def _value_of(values: Mapping[str, Any], name: str) -> Any:
    """Return a column as the file has it, also where its reader has changed it: a text is split, a reply taken off."""
    own: Mapping[str, Any] = values.get(KEPT, {})
    return own.get(name, values.get(name))


def as_plain(value: Any) -> Any:
    """Return a value of a row as JSON can have it, dates and paths as text; TypeError for the content of an image."""
    if value is None or isinstance(value, PLAIN):
        return value
    if is_dataclass(value) and not isinstance(value, type):  # an entity
        value = asdict(value)
    elif hasattr(value, "_asdict"):  # an answer
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, bytes | bytearray) or hasattr(value, "__array_interface__"):
        raise TypeError("the content of an image")
    return str(value)


def find_columns(file: str, rows: Sequence[Row], names: Sequence[str]) -> dict[str, None]:
    """Return the columns that rows have, in their order; ConfigError where one of `names` has no text or numbers."""
    for row in rows if names else ():
        for name in names:
            try:
                as_plain(_value_of(row.values, name))
            except TypeError:
                raise ConfigError(f"--keep: the column {name!r} of {file} has images: name columns of text") from None
    columns = {column: None for row in rows for column in row.values} if names else {}
    return {column: None for column in columns if not column.startswith(INTERNAL)}


def check_kept(file: str, names: Sequence[str], columns: Collection[str]) -> None:
    """Raise ConfigError for a column that no row of a file has. columns: those that some row has."""
    for missing in (name for name in names if name not in columns):
        guess = did_you_mean(missing, columns)
        raise ConfigError(f"--keep: {file} has no column {missing!r}{guess}; its columns are {name_all([*columns])}")
