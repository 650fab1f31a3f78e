"""Settings as a tree of frozen dataclasses: found by dotted key, read from text or TOML, checked, written back as TOML.

Nothing here knows which settings there are: engine/config/recipe.py declares them. A field of a section is a setting, made by
`setting()`, or a section itself.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import Field, field, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any

# The types a setting may have, as written in its declaration, and in words.
KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "int | str": "a whole number, or one of its words",
    "float": "a finite number",
    "float | None": "a finite number or none",
    "str": "text in valid Unicode",
    "tuple[str, ...]": "a list of texts",
}
RANGES = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 180]": lambda x: 0 <= x <= 180,
}


class ConfigError(ValueError):
    """A setting is wrong; the message names it, its value and what would work."""


def setting(
    default: Any, doc: str, choices: tuple[str, ...] = (), machine: bool = False, within: str = "", needed: str = ""
) -> Any:
    """A setting and all that is known of it.

    choices: the only values allowed. machine: it changes the speed of a run, not its mathematics. within: a key of
    RANGES. needed: it must not be empty, and this says what to put there.
    """
    known = {"doc": doc, "choices": choices, "machine": machine, "within": within, "needed": needed}
    return field(default=default, metadata=known)


def all_settings(tree: Any, prefix: str = "") -> dict[str, Field[Any]]:
    """Every "section.key" and its declaration, in order; a section's own settings stand before those it nests."""
    parts = fields(tree)
    found = {prefix + f.name: f for f in parts if not is_dataclass(f.default)}
    for f in parts:
        if is_dataclass(f.default):
            found |= all_settings(f.default, f"{prefix}{f.name}.")
    return found


def sections(tree: Any) -> list[str]:
    """The dotted names of the sections that hold settings."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in all_settings(tree)))


def get(tree: Any, key: str) -> Any:
    """The value of "section.key"."""
    return attrgetter(key)(tree)


def override(tree: Any, values: dict[str, Any], where: str = "") -> Any:
    """A copy with {"section.key": value} put in; text is read as the type of the setting. Raises all errors at once."""
    known, errors = all_settings(tree), []
    for key, value in values.items():
        try:
            if key not in known:
                raise ConfigError(_unknown(key, tree))
            tree = _put(tree, key.split("."), _convert(key, value, known[key]))
        except ConfigError as error:
            errors.append(where + str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return tree


def _put(tree: Any, names: list[str], value: Any) -> Any:
    first, rest = names[0], names[1:]
    return replace(tree, **{first: _put(getattr(tree, first), rest, value) if rest else value})


def out_of_range(tree: Any) -> list[str]:
    """A sentence for each setting that is not within its range, or empty although it is needed."""
    wrong = []
    for key, declared in all_settings(tree).items():
        value, known = get(tree, key), declared.metadata
        if known["within"] and not isinstance(value, str | None) and not RANGES[known["within"]](value):
            wrong.append(f"{key} = {value} must be {known['within']}")
        if known["needed"] and not value:
            wrong.append(f"{key} is empty: {known['needed']}")
    return wrong


def _convert(key: str, value: Any, declared: Field[Any]) -> Any:
    kind, choices = str(declared.type), declared.metadata["choices"]
    try:
        converted = _read(value, kind)
    except (ValueError, OverflowError):
        raise ConfigError(f"{key} = {value!r} should be {KINDS[kind]}") from None
    if choices and converted not in choices and not (kind == "int | str" and isinstance(converted, int)):
        raise ConfigError(f"{key} = {value!r}: {choose_from(converted, choices)}")
    return converted


def _read(value: Any, kind: str) -> Any:
    """`value`, a text or what TOML has, as the type that `kind` names; ValueError or OverflowError where it is none."""
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError: the resolved recipe could not be written
    match kind, value:
        case "str", str():
            return value
        case "bool", bool():
            return value
        case "bool", str() if value.lower() in ("true", "false"):
            return value.lower() == "true"
        case (
            "int" | "int | str" | "float" | "float | None",
            bool(),
        ):  # which is a number to Python, but was meant as none
            pass
        case "int" | "int | str", int() if abs(value) < 2**63:
            return value
        case "int | str", str() if not value.strip().lstrip("+-").isdigit():
            return value.strip()
        case "int" | "int | str", str() if abs(int(value)) < 2**63:
            return int(value)
        case "float | None", None:
            return None
        case "float | None", str() if value.strip().lower() in ("none", ""):
            return None
        case "float" | "float | None", int() | float() | str() if math.isfinite(float(value)):
            return float(value)
        case "tuple[str, ...]", str():
            return tuple(part.strip() for part in value.split(",") if part.strip())
        case "tuple[str, ...]", list() | tuple() if all(type(item) in (str, int) for item in value):
            return tuple(str(item).strip() for item in value)
    raise ValueError(f"{value!r} is no {kind}")


def choose_from(name: str, choices: Iterable[str]) -> str:
    """The choices, and the nearest of them, for the end of an error message."""
    listed = ", ".join(c or repr(c) for c in choices)
    return f"choose from {listed}{did_you_mean(name, choices)}"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The nearest candidate, for the end of an error message; nothing when none is near."""
    close = difflib.get_close_matches(name.lower(), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown(key: str, tree: Any) -> str:
    """What is wrong with a key that is no setting: a section, the wrong section, a typing error, or far off."""
    known = list(all_settings(tree))
    section, _, name = key.rpartition(".")
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key!r} is a section, not a setting; it has {', '.join(inside)}"
    if same_name := [k for k in known if k.rpartition(".")[2] == name]:
        nearest = difflib.get_close_matches(key, same_name, n=1, cutoff=0)[0]
        return f"unknown setting {key!r}; did you mean {nearest!r}?"
    if section in sections(tree):  # then by the names in it alone, as a section in common makes all keys alike
        names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
        return f"unknown setting {key!r}{did_you_mean(name, names) or '; ' + section + ' has ' + ', '.join(names)}"
    hint = did_you_mean(key, known) or f"; sections are {', '.join(sections(tree))}, and --help lists their settings"
    return f"unknown setting {key!r}{hint}"


def split_arguments(argv: list[str], tree: Any, flags: dict[str, tuple[str, str]]) -> tuple[list[str], dict[str, str]]:
    """(positional arguments, {"section.key": text}) of a command line; `flags` are shorthands, {"--x": (key, text)}.

    Takes `--key=value`, `--key value`, and a bare `--key` as true where the setting is true or false; a hyphen in a key
    is an underscore. The last one wins, so that a script can put its own before "$@". A value that begins with "--"
    needs the form with "=". Whether a key exists is override()'s to say: a command may have some of its own.
    """
    switches = {key for key, declared in all_settings(tree).items() if declared.type == "bool"}
    positional: list[str] = []
    values: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if argument in flags:
            key, value = flags[argument]
        elif not argument.startswith("-"):
            positional.append(argument)
            continue
        elif not argument.startswith("--") or not key:
            raise ConfigError(f"unknown option {argument!r}; a setting is given as --section.key=value")
        elif not equals and key in switches:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{argument} needs a value: {argument}=VALUE{did_you_mean(argument, flags)}")
            value = rest.pop(0)
        values[key] = value
    return positional, values


def help_lines(defaults: Any, values: Any, values_of: str) -> list[str]:
    """Every setting with its type, default and meaning, and what `values_of` (a name) has where that differs."""
    lines: list[str] = []
    before = ""
    for key, declared in all_settings(defaults).items():
        known, value = declared.metadata, get(values, key)
        section = key.rpartition(".")[0]
        if section != before:
            lines += ["", f"[{section}]"]
            before = section
        kind = "{" + ",".join(c or "''" for c in known["choices"]) + "}" if known["choices"] else str(declared.type)
        kind = f"int or {kind}" if declared.type == "int | str" else kind
        own = "" if value == declared.default else f"; {values_of} has {toml_value(value)}"
        lines.append(
            f"  --{key}{'*' if known['machine'] else ''} {kind}  (default {toml_value(declared.default)}{own})"
        )
        lines.append(f"        {known['doc']}")
    return lines


def to_toml(tree: Any) -> str:
    """Every setting with its value, section by section; reads back as the same values."""
    lines: list[str] = []
    before = ""
    for key in all_settings(tree):
        section, _, name = key.rpartition(".")
        if section != before:
            lines += ["", f"[{section}]"]
            before = section
        lines.append(f"{name} = {toml_value(get(tree, key))}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # TOML's strings are JSON's, but for one more character that must be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if value is None:  # TOML has no null; the text is read as one
        return '"none"'
    return str(value).lower() if isinstance(value, bool) else repr(value)
