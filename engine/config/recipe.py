"""The configuration of a run: a TOML recipe, then `--section.key=value`, checked as a whole.

Which settings there are is in engine/config/sections.py, how values are read and written in engine/config/schema.py.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import schema as settings
from engine.config.schema import (
    ConfigError,
    all_settings,
    did_you_mean,
    get,
    out_of_range,
    override,
    sections,
)
from engine.config.sections import (
    Config,
    RunSettings,
)

SCHEMA = 2  # of recipes; raised when an old one would be read wrongly
RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = "movie_reviews"
FLAGS = {"--resume": ("run.resume", "yes"), "--dry-run": ("run.dry_run", "true")}
HELP = ("--help", "-h")


def parse(argv: list[str], usage: str) -> Config:
    """[RECIPE] --section.key=value ... -> a checked Config. Raises ConfigError, or SystemExit(0) after --help."""
    if any(flag in argv for flag in HELP):
        others = [argument for argument in argv if argument not in HELP]
        print(help_text(usage, others[0] if others and not others[0].startswith("-") else DEFAULT_RECIPE))
        raise SystemExit(0)
    positional, overrides = split_arguments(argv)
    if len(positional) > 1:
        raise ConfigError(f"one recipe at a time, not {' and '.join(map(repr, positional))}")
    config = override(read_recipe(positional[0] if positional else DEFAULT_RECIPE), overrides)
    check(config)
    return config


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(positional arguments, {"section.key": text}) of a command line, as settings.split_arguments reads it."""
    return settings.split_arguments(argv, Config(), FLAGS)


def read_recipe(name: str) -> Config:
    """A TOML file, by path or by the name of one that is shipped in engine/recipes."""
    shipped = RECIPES / f"{name}.toml"
    path = shipped if shipped.is_file() else Path(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        names = shipped_recipes()
        hint = did_you_mean(path.stem, names)
        raise ConfigError(
            f"recipe {name!r} cannot be read ({error.strerror}): name a .toml file or one of {', '.join(names)}{hint}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    _check_schema(path, tree.pop("schema", None))
    return override(Config(), dict(_flat(tree, path)), where=f"recipe {path}: ")


def shipped_recipes() -> list[str]:
    """The names of the recipes in engine/recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def _check_schema(path: Path, schema: object) -> None:
    if schema is None:
        raise ConfigError(f"recipe {path}: no schema; put `schema = {SCHEMA}` in its first line")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise ConfigError(f"recipe {path}: schema = {schema!r}; it should be `schema = {SCHEMA}`")
    if schema > SCHEMA:
        raise ConfigError(
            f"recipe {path}: schema = {schema} is newer than this version, which reads {SCHEMA}: install a newer one"
        )


def _flat(tree: dict[str, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of every value in a TOML tree."""
    for name, value in tree.items():
        key = prefix + name
        if not isinstance(value, dict):
            yield key, value
        elif value:
            yield from _flat(value, path, f"{key}.")
        elif key not in sections(Config()):  # an empty section sets nothing, but its name may be a typing error
            raise ConfigError(
                f"recipe {path}: unknown section [{key}]{did_you_mean(key, sections(Config()))}; "
                f"sections are {', '.join(sections(Config()))}"
            )


def check(config: Config) -> None:
    """Ranges, and settings that contradict each other, all reported at once by name."""
    c, errors = config, out_of_range(config)

    def need(ok: bool, message: str) -> None:
        if not ok:
            errors.append(message)

    need(
        not c.model.sha256 or re.fullmatch("[0-9a-fA-F]{64}", c.model.sha256) is not None,
        f"model.sha256 = {c.model.sha256!r} is no checksum: 64 hexadecimal digits, as sha256sum prints them",
    )
    need(
        bool(c.data.validation) or 0 < c.data.validation_fraction < 1,
        f"data.validation_fraction = {c.data.validation_fraction} must lie between 0 and 1 (or give data.validation)",
    )
    need(
        not (c.data.group_column and c.data.validation),
        "data.group_column decides how validation data is held out, but data.validation is given: drop one of them",
    )
    need(len(set(c.data.labels)) == len(c.data.labels), f"data.labels = {list(c.data.labels)} names a label twice")
    need(len(c.data.labels) != 1, f"data.labels = {list(c.data.labels)} names one label only: give all, or none")
    need(
        not (c.train.micro_batch_size and c.train.micro_batch_tokens),
        "train.micro_batch_size and train.micro_batch_tokens both limit a micro-batch: give one of them",
    )
    need(
        c.train.max_steps > 0 or c.train.epochs > 0,
        f"train.epochs = {c.train.epochs} and train.max_steps = {c.train.max_steps}: one must be above 0",
    )
    for key in ("optim.warmup_steps", "optim.decay_steps", "model.dropout.switch_step"):
        value = get(c, key)
        need(value < 1 or value == int(value), f"{key} = {value} must be a share below 1 or a whole number of steps")
    need(
        not (c.model.init == "scratch" and c.model.head_init == "reset"),
        "model.init = scratch has a new head anyway: drop model.head_init = reset",
    )
    need(
        not (c.model.init == "scratch" and c.model.reinit_layers),
        "model.init = scratch starts every layer anew: drop model.reinit_layers",
    )
    need(
        not (c.generate.do_sample and c.generate.num_beams > 1),
        f"generate.do_sample with generate.num_beams = {c.generate.num_beams} is not supported: choose one of them",
    )
    need(
        not (c.model.lora.rank and c.model.freeze),
        "model.lora.rank trains the adapters and the head only, all else is frozen: drop model.freeze",
    )
    if errors:
        raise ConfigError("\n".join(errors))


def differences(ours: Config, theirs: Config) -> list[str]:
    """Settings of the recipe (not of the machine) in which two configurations differ, as "key: theirs -> ours"."""
    return [
        f"{key}: {get(theirs, key)!r} -> {get(ours, key)!r}"
        for key, declared in all_settings(ours).items()
        if not declared.metadata["machine"] and get(ours, key) != get(theirs, key)
    ]


def recipe_of(config: Config) -> Config:
    """A configuration as a recipe to run again: without --resume, --dry-run, or changes that were allowed once."""
    plain = RunSettings()
    run = replace(config.run, resume=plain.resume, allow_changes=plain.allow_changes, dry_run=plain.dry_run)
    return replace(config, run=run)


def to_toml(config: Config) -> str:
    """The resolved recipe, every setting with its value; reads back as the same Config."""
    return f"schema = {SCHEMA}\n{settings.to_toml(config)}"


def help_text(usage: str, recipe: str = "") -> str:
    """Every setting with its type, default and meaning, and what `recipe` has where it differs from the default."""
    defaults = Config()
    values = read_recipe(recipe) if recipe else defaults
    lines = [
        usage,
        "",
        f"Recipes shipped: {', '.join(shipped_recipes())} ({DEFAULT_RECIPE} unless one is named).",
        "Every setting of a recipe can be given as --section.key=value or --section.key value.",
        "Those marked * only change the speed of a run, and may differ when it is resumed.",
    ]
    return "\n".join(lines + settings.help_lines(defaults, values, recipe))
