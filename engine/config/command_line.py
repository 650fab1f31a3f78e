"""Command lines and --help: split arguments into {"section.key": text}, and list every setting with its meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from engine.config.schema import KINDS, ConfigError, all_settings, did_you_mean, get, toml_value

WIDTH = 110


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


def help_lines(defaults: Any, values: Any, values_of: str) -> list[str]:
    """Return every setting with its type, default and meaning, section by section.

    values: the settings of the recipe named `values_of`, shown where they differ from the defaults.
    """
    lines: list[str] = []
    before = ""
    for key, declared in all_settings(defaults).items():
        known, value = declared.metadata, get(values, key)
        section = key.rpartition(".")[0]
        if section != before:
            about = str(attrgetter(section)(defaults).__doc__).partition("\n")[0]
            lines += ["", f"[{section}]  {about}"]
            before = section
        kind = KINDS[str(declared.type)].name
        if known["choices"]:
            kind = "{" + ",".join(choice or "''" for choice in known["choices"]) + "}"
        own = "" if value == declared.default else f"; {values_of} has {_format_value(value)}"
        star = "*" if known["machine"] else ""
        lines.append(f"  --{key}{star} {kind}  (default {_format_value(declared.default)}{own})")
        indent = " " * 8
        lines += textwrap.wrap(
            known["doc"], WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return lines


def _format_value(value: Any) -> str:
    return "none" if value is None else toml_value(value)
