"""Command lines: split arguments into {"section.key": text}, and describe settings for --help."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from typing import Any

from engine.config.schema import KINDS, ConfigError, all_settings, did_you_mean, get, toml_value

HELP = ("--help", "-h", "-help")


def split_arguments(
    argv: list[str], tree: Any, flags: Mapping[str, tuple[str, str]], explain: Callable[[str], str]
) -> tuple[list[str], dict[str, str]]:
    """Split a command line into (positional arguments, {"section.key": text}).

    - `--key=value` and `--key value` give a setting; a hyphen in a key is an underscore.
    - A bare `--key` is true, for a setting whose type is bool.
    - `flags` are shorthands, {"--x": (key, text)}.
    - The last of several values counts, so that a script can put its own before "$@".
    - A value that begins with "--" needs the form with "=".

    explain(key): a sentence on a key that has another name here, or "". Raises one ConfigError with all such sentences,
    or one for a malformed argument. Other unknown keys are returned, since a command may have options of its own.
    """
    switches = {key for key, declared in all_settings(tree).items() if declared.type == "bool"}
    positional: list[str] = []
    values: dict[str, str] = {}
    explained: list[str] = []
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
        elif not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and not explain(key):
            raise ConfigError(f"{argument} needs a value: {argument}=VALUE{did_you_mean(argument, flags)}")
        values[key] = value
        if sentence := explain(key):
            explained.append(sentence)
    if explained:
        raise ConfigError("\n".join(explained))
    return positional, values


def describe_section(name: str, keys: Collection[str], values: Any, values_of: str, width: int) -> list[str]:
    """Return the settings of a section that are in `keys`, each with its type, default and meaning.

    values: the settings of the recipe named `values_of`, shown where they differ from the defaults.
    """
    defaults = type(values)()
    about = str(attrgetter(name)(defaults).__doc__).partition("\n")[0]
    lines = textwrap.wrap(f"[{name}]  {about}", width, break_on_hyphens=False)
    for key in keys:
        if key.rpartition(".")[0] == name:
            lines += describe_setting(key, values, values_of, width)
    return lines


def describe_setting(key: str, values: Any, values_of: str, width: int) -> list[str]:
    """Return lines with a setting, its type, default and meaning, and its value in the recipe `values_of`."""
    defaults = type(values)()
    declared = all_settings(defaults)[key]
    known, value = declared.metadata, get(values, key)
    kind = KINDS[str(declared.type)].name
    if known["choices"]:
        kind = "{" + ", ".join(choice or "''" for choice in known["choices"]) + "}"
    own = "" if value == declared.default else f"; {values_of} has {_format_value(value)}"
    star = "*" if known["machine"] else ""
    head = f"--{key}{star} {kind}  (default {_format_value(declared.default)}{own})"
    lines = textwrap.wrap(head, width, initial_indent="  ", subsequent_indent=" " * 10, break_on_hyphens=False)
    indent = " " * 6
    return lines + textwrap.wrap(
        known["doc"], width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _format_value(value: Any) -> str:
    return "none" if value is None else toml_value(value)
