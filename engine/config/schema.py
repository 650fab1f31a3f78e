"""Settings as a tree of frozen dataclasses: declare, look up by dotted key, convert, check, and write as TOML.

This file does not know which settings exist: engine/config/sections.py declares them. A field of a section is a
setting, declared by `setting()`, or a section itself.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import numbers
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, field, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from data.notes import shorten_lines

Tree = TypeVar("Tree")


class Kind(NamedTuple):
    """A type of settings, and its names in --help and in messages."""

    name: str  # as --help shows it
    meaning: str  # in messages: "... should be {meaning}"


# {the type in the declaration of a setting: its kind}; no other types are allowed.
KINDS = {
    "bool": Kind("bool", "true or false"),
    "int": Kind("int", "a whole number"),
    "int | Literal['auto']": Kind("int or auto", "a whole number or auto"),
    "float": Kind("float", "a finite number"),
    "float | None": Kind("float or none", "a finite number or none"),
    "str": Kind("text", "text in valid Unicode"),
    "tuple[str, ...]": Kind("list", 'a list of texts, as a,b or \'["a, b", "c"]\''),
}
RANGES: dict[str, Callable[[float], bool]] = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 180]": lambda x: 0 <= x <= 180,
    "in [-10, 10]": lambda x: -10 <= x <= 10,
    "in [0, 1000]": lambda x: 0 <= x <= 1000,
    "in [0, 10000]": lambda x: 0 <= x <= 10_000,
}
SMALLEST, LARGEST = 1e-30, 1e12  # absolute values of a float other than 0; a product of three fits into 32 bits
MACHINE = True  # as `setting(..., machine=MACHINE)`
FEW_CHOICES = 8  # up to so many are listed before the nearest of them
MAX_CHARACTERS_SHOWN = 200  # characters of a wrong value in a message


class ConfigError(ValueError):
    """A setting is wrong; the message names the setting, its value and what would work.

    A line of more than LONGEST characters, which quotes a long value, is shown without its middle.
    """

    LONGEST = 2_000

    def __init__(self, message: str = ""):
        super().__init__(shorten_lines(message, self.LONGEST))


def setting(
    default: Any, doc: str, choices: tuple[str, ...] = (), *, machine: bool = False, within: str = "", needed: str = ""
) -> Any:
    """Declare a setting.

    doc: a phrase on what it is, with its unit and the meaning of 0 or of an empty value.
    choices: the only values allowed.
    machine: the setting changes the speed of a run, not its mathematics.
    within: a key of RANGES.
    needed: what to write if the setting is empty, which is then an error; "": it may be empty.
    """
    known = {"doc": doc, "choices": choices, "machine": machine, "within": within, "needed": needed}
    return field(default=default, metadata=known)


def all_settings(tree: Any, prefix: str = "") -> dict[str, Field[Any]]:
    """Return {"section.key": its declaration} in order; a section's own settings precede those of nested sections."""
    settings = {prefix + f.name: f for f in fields(tree) if not is_dataclass(f.default)}
    for f in fields(tree):
        if is_dataclass(f.default):
            settings |= all_settings(f.default, f"{prefix}{f.name}.")
    return settings


def sections(tree: Any) -> list[str]:
    """Return the dotted names of the sections that hold settings."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in all_settings(tree)))


def get(tree: Any, key: str) -> Any:
    """Return the value of "section.key"."""
    return attrgetter(key)(tree)


def override(
    tree: Tree, values: Mapping[str, Any], where: str = "", explain: Callable[[str], str] = lambda key: ""
) -> Tree:
    """Return a copy with the settings {"section.key": value} changed.

    Text is converted to the type of the setting, as on a command line every value is text. Numbers of Python and NumPy,
    paths, lists and tuples are accepted too.

    where: the start of every error message. explain(key): a sentence on a key that is no setting, or "", then the
    nearest name is suggested. Raises one ConfigError with a line for each wrong key or value.
    """
    known, errors = all_settings(tree), []
    for key, value in values.items():
        try:
            if key not in known:
                raise ConfigError((isinstance(key, str) and explain(key)) or _explain_unknown(key, tree))
            tree = _replace(tree, key.split("."), _convert(key, value, known[key]))
        except ConfigError as error:
            errors.append(where + str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return tree


def _replace(tree: Any, names: list[str], value: Any) -> Any:
    first, rest = names[0], names[1:]
    return replace(tree, **{first: _replace(getattr(tree, first), rest, value) if rest else value})


def out_of_range(tree: Any) -> list[str]:
    """Return a sentence for each setting outside its range, or empty although it is needed."""
    wrong = []
    for key, declared in all_settings(tree).items():
        value, known = get(tree, key), declared.metadata
        if known["within"] and not isinstance(value, str | None) and not RANGES[known["within"]](value):
            wrong.append(f"{key} = {value} must be {known['within']}")
        if known["needed"] and not value:
            wrong.append(f"{key} is empty: {known['needed']}")
    return wrong


def _convert(key: str, value: Any, declared: Field[Any]) -> Any:
    kind, choices = KINDS[str(declared.type)], declared.metadata["choices"]
    if key.endswith("_column") and type(value) is int:  # CoNLL's columns have numbers
        value = str(value)
    if key.endswith(("weights", "weight")) and isinstance(value, list | tuple):  # numbers; a label 1.5 may mean "1.50"
        value = [str(item) if isinstance(item, float) else item for item in value]
    try:
        converted = _convert_kind(_to_python(value), kind.name)
    except (ValueError, OverflowError):
        raise ConfigError(f"{key} = {shorten(value)} should be {kind.meaning}") from None
    if isinstance(converted, float) and converted and not SMALLEST <= abs(converted) <= LARGEST:
        raise ConfigError(
            f"{key} = {shorten(value)} should be 0, or of a size from {SMALLEST:g} to {LARGEST:g}: the run computes "
            "in 32 bits"
        )
    if choices and converted not in choices:
        raise ConfigError(f"{key} = {shorten(value)}: {choose_from(converted, choices)}")
    return converted


def _to_python(value: Any) -> Any:
    """Return a path as text and another library's number as Python's; likewise for the items of a list or tuple."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple):
        return [_to_python(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def shorten(value: Any) -> str:
    """Return a value as Python writes it, without the end of a long one."""
    text = repr(value)
    return text if len(text) <= MAX_CHARACTERS_SHOWN else f"{text[:MAX_CHARACTERS_SHOWN]}..."


def _convert_kind(value: Any, kind: str) -> Any:
    """Return `value`, text or a plain value, converted to the kind with this name.

    Raises ValueError or OverflowError for a value that is not of this kind. A bool does not count as a number.
    """
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError, a ValueError, for text that the resolved recipe could not contain
    match kind, value:
        case "text", str():
            return value
        case "bool", bool():
            return value
        case "bool", str() if value.lower() in ("true", "false"):
            return value.lower() == "true"
        case "int" | "int or auto" | "float" | "float or none", bool():
            pass
        case "int or auto", str() if value.strip().lower() == "auto":
            return "auto"
        case "int" | "int or auto", int() | str() if abs(int(value)) < 2**63:
            return int(value)
        case "float or none", None:
            return None
        case "float or none", str() if value.strip().lower() in ("none", ""):
            return None
        case "float" | "float or none", int() | float() | str() if math.isfinite(float(value)):
            return float(value)
        case "list", str():
            return _convert_kind(_split_list(value), "list")
        case "list", list() if all(type(item) in (str, int) for item in value):
            for item in value:
                str(item).encode()
            return tuple(str(item).strip() for item in value)
    raise ValueError(f"{value!r} is no {kind}")


def _split_list(text: str) -> list[Any]:
    """Return the items of a list on a command line: a list of TOML, or items between commas, quoted as in csv.

    Raises ValueError for brackets or quotes that are not closed.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        (items,) = tomllib.loads(f"list = {text}").values()
        return list(items)
    if '"' not in text:
        return [item for item in text.split(",") if item.strip()]
    try:
        return [
            item for line in csv.reader([text], strict=True, skipinitialspace=True) for item in line if item.strip()
        ]
    except csv.Error as error:
        raise ValueError(str(error)) from None


def choose_from(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error message: the choices, and the nearest of them."""
    names = list(choices)
    listed, hint = ", ".join(c or repr(c) for c in names), did_you_mean(name, names)
    if hint and len(names) > FEW_CHOICES:
        return f"{hint.removeprefix('; ')} The choices are {listed}"
    return f"choose from {listed}{hint}"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return the end of an error message: the candidate nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name.lower(), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _explain_unknown(key: Any, tree: Any) -> str:
    """Return a sentence on a key that is no setting: not text, a section, in another section, or misspelt."""
    if not isinstance(key, str):
        return f"{shorten(key)} is not a setting: a setting is named by a text, such as 'optim.lr'"
    known = list(all_settings(tree))
    section, _, name = key.rpartition(".")
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key!r} is a section, not a setting; it has {', '.join(inside)}"
    if same_name := [k for k in known if k.rpartition(".")[2] == name]:
        nearest = difflib.get_close_matches(key, same_name, n=1, cutoff=0)[0]
        return f"unknown setting {key!r}; did you mean {nearest!r}?"
    if section in sections(tree):  # only the names in it: a section in common makes all keys alike
        names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
        close = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {f'{section}.{close[0]}'!r}?" if close else f"{section} has {', '.join(names)}"
        return f"unknown setting {key!r}; {hint}"
    hint = did_you_mean(key, known) or f"; sections are {', '.join(sections(tree))}, and --help lists their settings"
    return f"unknown setting {key!r}{hint}"


def to_toml(tree: Any, default: Any = None) -> str:
    """Return every setting with its value, section by section; TOML that reads back as equal values.

    default: leave out the settings that are as in this tree, and write its value as a comment behind the others.
    """
    lines: list[str] = []
    before = ""
    for key in all_settings(tree):
        section, _, name = key.rpartition(".")
        value = get(tree, key)
        if default is not None and value == get(default, key):
            continue
        if section != before:
            lines += ["", f"[{section}]"]
            before = section
        comment = "" if default is None else f"  # default: {toml_value(get(default, key))}"
        lines.append(f"{name} = {toml_value(value)}{comment}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # a JSON string is a TOML string, except that TOML also escapes U+007F
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if value is None:  # TOML has no null; the text is read as one
        return '"none"'
    return str(value).lower() if isinstance(value, bool) else repr(value)
