"""The class names that Hugging Face's datasets library stores with a table, in which classes are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.notes import list_some

SHOWN = 5  # names in a note
ITEM = "[]"  # a part of a path: each item of a list


@dataclass(frozen=True)
class LabelNames:
    """The places in rows that have numbers of classes: {("labels", "[]"): the names in their order}."""

    names: dict[tuple[str, ...], list[str]]

    def replace_numbers(self, values: dict[str, Any]) -> str:
        """Put the names in the place of the numbers; return the reason where a number has no name, else ""."""
        for path, names in self.names.items():
            try:
                if path[0] in values:
                    values[path[0]] = _replace(values[path[0]], path[1:], names)
            except LookupError as error:
                return f"{'.'.join(path)!r} has {error.args[0]!r}, and the file names the classes 0 to {len(names) - 1}"
        return ""

    def describe(self, columns: Sequence[str]) -> list[str]:
        """Return a note for each of `columns` that has numbers of classes."""
        heads = {column.partition(".")[0] for column in columns}
        notes = []
        for path, names in self.names.items():
            if path[0] in heads:
                shown = list_some([f"{i} = {name!r}" for i, name in enumerate(names)], SHOWN)
                notes.append(f"the numbers in {path[0]!r} are read as the names that the file has for them: {shown}")
        return notes


def read_label_names(features: dict[str, Any]) -> LabelNames:
    """Return the names of classes in a description of columns, as in dataset_info.json."""
    found: dict[tuple[str, ...], list[str]] = {}
    for column, feature in features.items():
        _collect(feature, (column,), found)
    return LabelNames(found)


def _collect(feature: Any, path: tuple[str, ...], found: dict[tuple[str, ...], list[str]]) -> None:
    if isinstance(feature, list) and len(feature) == 1:
        return _collect(feature[0], (*path, ITEM), found)
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        names = feature.get("names")
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            found[path] = names
    elif kind in ("Sequence", "List", "LargeList"):
        inner = feature.get("feature")
        if kind == "Sequence" and isinstance(inner, dict) and not isinstance(inner.get("_type"), str):
            for key, value in inner.items():  # a sequence of objects is stored as an object of lists
                _collect(value, (*path, key, ITEM), found)
        else:
            _collect(inner, (*path, ITEM), found)
    elif not isinstance(kind, str):
        for key, value in feature.items():
            _collect(value, (*path, key), found)
    return None


def _replace(value: Any, path: tuple[str, ...], names: list[str]) -> Any:
    """Return the value with the numbers at `path` replaced; LookupError for a number that has no name."""
    if value is None:
        return None
    if path and path[0] == ITEM:
        return [_replace(item, path[1:], names) for item in value]
    if path:
        return value | {path[0]: _replace(value.get(path[0]), path[1:], names)}
    if value == -1:  # the library's mark of an unlabelled row
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise LookupError(value)
    return names[value]
