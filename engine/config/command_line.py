"""Command lines: split arguments into {"section.key": text}, and describe settings for --help."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from typing import Any

from engine.config.schema import KINDS, ConfigError, all_settings, did_you_mean, get, toml_value

FLAG_VALUES = ("yes", "no", "auto", "true", "false")  # which may follow --resume, say
# {an option: the commands that have it}, to answer whoever gives it to another command
COMMAND_OPTIONS = {
    "output": "engine.evaluate, engine.predict, engine.export, engine.report and engine.new",
    "against": "engine.evaluate",
    **dict.fromkeys(("input", "embeddings", "window", "keep"), "engine.predict"),
    **dict.fromkeys(("vary", "change", "seeds", "folds", "sample", "trials", "sampler", "prune"), "engine.study"),
    **dict.fromkeys(("folder", "keep_weights"), "engine.study"),
    "workers": "engine.study and data.prepare",
    **dict.fromkeys(("out", "verify"), "data.prepare"),
    **dict.fromkeys(("to", "rows", "repo", "int8", "private"), "engine.export"),
    **dict.fromkeys(("no_predict", "max_examples"), "engine.report"),
    **dict.fromkeys(("loop", "force"), "engine.new"),
    "dry_run": "engine.train and engine.export",
}
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
    known = all_settings(tree)
    switches = {key for key, declared in known.items() if declared.type == "bool"}
    positional: list[str] = []
    values: dict[str, str] = {}
    explained: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        flag = flags.get("--" + key.replace("_", "-")) if argument.startswith("--") else None
        key = key.replace("-", "_")
        if flag:
            key = flag[0]
            if not equals:
                value = rest.pop(0) if rest and rest[0] in FLAG_VALUES else flag[1]
        elif not argument.startswith("-"):
            positional.append(argument)
            _check_positional(argument, known)
            continue
        elif not argument.startswith("--") or not key:
            raise ConfigError(
                f"unknown option {argument!r}; a setting is given as --section.key=value"
                f"{_suggest(argument.lstrip('-'), known, flags)}"
            )
        elif not equals and key in switches:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            if value == "=":
                raise ConfigError(
                    f"{argument} = {' '.join(rest[:1])}: leave out the spaces around =, as in "
                    f"{argument}={''.join(rest[:1]) or 'VALUE'}"
                )
        elif not equals and not explain(key):
            hint = _suggest(key, known, flags)
            is_section = any(other.startswith(f"{key}.") for other in known)  # some commands have --data, too
            is_option = key in known or is_section or key in COMMAND_OPTIONS or not hint
            raise ConfigError(
                f"{argument} needs a value: {argument}=VALUE{hint}" if is_option else f"unknown option {argument}{hint}"
            )
        values[key] = value
        if sentence := explain(key):
            explained.append(sentence)
    if explained:
        raise ConfigError("\n".join(explained))
    return positional, values


def _check_positional(argument: str, known: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that was to be an option: without hyphens, or with a dash of typesetting."""
    name = argument.lstrip("\u2010\u2011\u2012\u2013\u2014\u2212")
    key, _, value = name.partition("=")
    if name != argument:
        raise ConfigError(f"{argument!r} begins with a dash that is no hyphen: type --{name}")
    if key.replace("-", "_") in known:
        raise ConfigError(f"{argument!r} is a setting: give it as --{key}={value or 'VALUE'}")


def _suggest(name: str, known: Mapping[str, Any], flags: Mapping[str, tuple[str, str]]) -> str:
    """Return the end of an error message on an option: its meaning if it is a setting, else the nearest name."""
    key = name.partition("=")[0].replace("-", "_")
    if key in known:
        return f"; --help {key} says what it is"
    named = [f"--{other}={key}" for other, declared in known.items() if key in declared.metadata["choices"]]
    if key and len(named) == 1:  # --quiet, --cuda
        return f"; did you mean {named[0]!r}?"
    options = [option.replace("_", "-") for option in COMMAND_OPTIONS]
    candidates = [*flags, "--help", *(f"--{other}" for other in (*options, *known))]
    return did_you_mean(f"--{key}", candidates)


def explain_option(key: str) -> str:
    """Return a sentence on an option of another command; "" for a key that is none."""
    return f"--{key} is an option of {COMMAND_OPTIONS[key]}, not a setting" if key in COMMAND_OPTIONS else ""


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
