"""Read recipes (TOML files) and command lines into one Config, and check the settings against each other.

The settings are declared in engine/config/sections.py; engine/config/schema.py converts and writes their values.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.folds import parse_fold
from data.formats.lines import read_whole
from data.prepared import read_source_name
from engine.config import command_line, schema
from engine.config.data_settings import DataSettings
from engine.config.hf_names import HF_NAMES
from engine.config.renamed import RENAMED, renamed_lines, with_report_to
from engine.config.schema import ConfigError, all_settings, did_you_mean, get, out_of_range, sections, shorten
from engine.config.sections import Config, RunSettings

SCHEMA = 2  # of recipes; raised when an older recipe would be read wrongly
RECIPES = Path(__file__).parent.parent / "recipes"
DEFAULT_RECIPE = "movie_reviews"
FLAGS = {
    "--resume": ("run.resume", "yes"),
    "--dry-run": ("run.dry_run", "true"),
    "--show-all": ("run.show_all", "true"),
}
KEPT_FOLDERS = (["best"], ["best", "last"], ["best", "last", "previous"])  # what checkpoint.keep may name, sorted
# {a file about the rows of data.train: what an empty value means}
FILES_OF_TRAIN = {
    "data.validation": "to hold out rows of data.train",
    "data.test": "to measure on none",
    "data.teacher_file": "for none",
    "augment.text.back_translation_file": "for none",
}


def parse(argv: list[str], usage: str) -> Config:
    """Read `[RECIPE] --section.key=value ...` into a checked Config; ConfigError where that is not possible."""
    positional, overrides = split_arguments(argv)
    if len(positional) > 1:
        raise ConfigError(f"one recipe at a time, not {' and '.join(map(repr, positional))}: {usage}")
    config = override_recipe(read_recipe(positional[0] if positional else DEFAULT_RECIPE), overrides)
    check(config)
    return config


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into (positional arguments, {"section.key": text}); see command_line.split_arguments."""
    return command_line.split_arguments(argv, Config(), FLAGS, lambda key: _other_name(key, "--"))


def override(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """Return the config with the settings {"section.key": value} changed; a value may also be given as text.

    where: the start of every error message. Raises one ConfigError with a line for each wrong key or value.
    """
    return schema.override(config, values, where, lambda key: _other_name(key) or command_line.explain_option(key))


def override_recipe(recipe: Config, values: Mapping[str, Any]) -> Config:
    """Return a recipe with the settings that a user has given, as `override` does.

    Raises ConfigError where another data.train or model.name would be used with what belongs to the recipe's own: with
    its validation and test files, files about its rows by id, and the checksum of its checkpoint.
    """
    config, errors = override(recipe, values), []
    theirs = recipe.data.train
    is_other_file = theirs not in ("", config.data.train) and read_source_name(config.data.train) != theirs
    for key, instead in FILES_OF_TRAIN.items():
        own = get(recipe, key)
        if is_other_file and own and key not in values:
            errors.append(
                f"data.train = {config.data.train!r} is not the recipe's, but {key} = {own!r} is, which belongs to the "
                f'recipe\'s {theirs!r}: give --{key} FILE, or --{key} "" {instead}'
            )
    is_other_model = recipe.model.name not in ("", config.model.name)
    if is_other_model and config.model.revision and "model.revision" not in values:
        errors.append(
            f"model.revision of the recipe is one of {recipe.model.name!r}, not of model.name = {config.model.name!r}: "
            'give its own --model.revision, or --model.revision "" for the branch main'
        )
    pinned = config.model.sha256 and "model.sha256" not in values and config.model.init == "pretrained"
    if pinned and is_other_model:
        errors.append(
            f"model.sha256 of the recipe is the checksum of {recipe.model.name!r}, not of model.name = "
            f'{config.model.name!r}: give its own --model.sha256, or --model.sha256 "" to check none'
        )
    if errors:
        raise ConfigError("\n".join(errors))
    return config


def _other_name(key: str, dashes: str = "") -> str:
    """Return a sentence with the present name of a setting of schema 1 or of Hugging Face; "" for any other key.

    dashes: the prefix of the names of settings; "--" on a command line.
    """
    key = key.replace("-", "_")
    known = all_settings(Config())
    if key in known or key in sections(Config()):
        return ""
    if key in RENAMED:
        return f"{dashes}{key} is now {dashes}{RENAMED[key]}"
    name = key.rpartition(".")[2]
    ours, note = HF_NAMES.get(name, ("", ""))
    if name in HF_NAMES and not ours.endswith(f".{name}"):  # schema.override answers a name that both have
        answer = f"here {dashes}{ours}." if ours else "not a setting here."
        return f"{dashes}{key} (Hugging Face's name) is {answer}{' ' + note if note else ''}"
    if not any(k.endswith(f".{name}") for k in known):
        for old, new in RENAMED.items():
            if old.endswith(f".{name}"):
                return f"unknown setting {key!r}; did you mean {new!r}?"
    return ""


def read_recipe(name: str) -> Config:
    """Read a TOML file, given by its path or by the name of a recipe in engine/recipes. Raises ConfigError."""
    shipped, path = RECIPES / f"{name}.toml", Path(name)
    try:
        path = shipped if shipped.is_file() else path
        tree = tomllib.loads(read_whole(path).decode("utf-8-sig"))  # a pipe too, as of <(...)
    except OSError as error:
        raise ConfigError(f"recipe {name!r} {_explain_unreadable(name, error)}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, nested too deeply, or a NUL in the name
        is_data = path.suffix not in ("", ".toml")
        hint = (
            f". A recipe is a TOML file; python -m engine.new TASK --data {path} writes one for data" if is_data else ""
        )
        raise ConfigError(f"recipe {path}: {error}{hint}") from None
    declared = tree.pop("schema", None)
    values = dict(_flatten(tree))
    _check_schema(path, declared, values)
    values = with_report_to(values)
    empty = [key for key, value in values.items() if value == {}]
    for key in empty:  # an empty section has no settings, but its name may be misspelt
        if key not in sections(Config()):
            names = sections(Config())
            raise ConfigError(
                f"recipe {path}: unknown section [{key}]{did_you_mean(key, names)}; sections are {', '.join(names)}"
            )
        del values[key]
    return override(Config(), values, where=f"recipe {path}: ")


def _explain_unreadable(name: str, error: OSError) -> str:
    """Return why a recipe cannot be read, and what would work."""
    path, names = Path(name), shipped_recipes()
    if name and os.path.isdir(path):  # False for a name that is too long
        found = [folder for part in ("", "best", "last") if (folder := path / part / "recipe.toml").is_file()]
        if found:
            return f"is a run folder: its recipe is {found[0]}; --resume, with the recipe of the run, continues it"
        return "is a folder: name a .toml file in it"
    tasks = {recipe: read_recipe(recipe).run.task for recipe in names}
    if name in tasks.values():
        return f"is a task: its recipes are {', '.join(recipe for recipe in names if tasks[recipe] == name)}"
    has_folder = path.suffix == ".toml" and os.path.isdir(path.parent)
    beside = [str(other) for other in path.parent.glob("*.toml")] if has_folder else []
    why = f"cannot be read ({error.strerror})"
    if hint := did_you_mean(name, [*beside, *names]) or did_you_mean(path.stem, names):
        return f"{why}{hint} --help recipes lists those that are shipped"
    return f"{why}: name a .toml file or one of {', '.join(names)}"


def shipped_recipes() -> list[str]:
    """Return the names of the recipes in engine/recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def _check_schema(path: Path, declared: object, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a recipe of another schema; for one of schema 1, with the new name of each setting."""
    if declared is None:
        raise ConfigError(f"recipe {path}: no schema; put `schema = {SCHEMA}` in its first line")
    if isinstance(declared, bool) or not isinstance(declared, int) or declared < 1:
        raise ConfigError(f"recipe {path}: schema = {declared!r}; it should be `schema = {SCHEMA}`")
    if declared > SCHEMA:
        raise ConfigError(
            f"recipe {path}: schema = {declared} is newer than this version, which reads {SCHEMA}: install a newer one"
        )
    if declared < SCHEMA:
        lines = renamed_lines(values)
        if not lines:
            raise ConfigError(
                f"recipe {path}: schema = 1 is old, but its settings have kept their names: write `schema = {SCHEMA}`"
            )
        raise ConfigError(
            "\n  ".join([f"recipe {path}: schema = 1 is old: write `schema = {SCHEMA}` and these names:", *lines])
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) for every value in a TOML tree, and ("section", {}) for an empty section."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check(config: Config) -> None:
    """Raise one ConfigError for all settings that are out of range or contradict each other."""
    c, errors = config, out_of_range(config)
    if c.run.task == "multi-task":  # the recipe of each task names its data
        errors = [error for error in errors if not error.startswith("data.train is empty")]

    def need(ok: bool, message: str) -> None:
        if not ok:
            errors.append(message)

    need(
        c.run.dry_run or not c.run.show_all,
        "run.show_all has no effect without a dry run: give --dry-run --show-all",
    )
    need(
        not c.model.sha256 or re.fullmatch("[0-9a-fA-F]{64}", c.model.sha256) is not None,
        f"model.sha256 = {shorten(c.model.sha256)} is not a checksum: 64 hexadecimal digits, as sha256sum prints them",
    )
    need(
        bool(c.data.validation) or 0 < c.data.validation_fraction < 1,
        f"data.validation_fraction = {c.data.validation_fraction} must lie between 0 and 1 (or give data.validation)",
    )
    need(
        not (c.data.group_column and c.data.validation),
        "data.group_column decides how validation data is held out, but data.validation is given: remove one of them",
    )
    errors += _fold_faults(c.data)
    need(
        len(set(c.data.labels)) == len(c.data.labels),
        f"data.labels = {shorten(list(c.data.labels))} names a label twice",
    )
    need(
        len(c.data.labels) != 1, f"data.labels = {shorten(list(c.data.labels))} names only one label: give all, or none"
    )
    need(
        not (c.train.micro_batch_size and c.train.micro_batch_tokens),
        f"train.micro_batch_size = {c.train.micro_batch_size} and train.micro_batch_tokens = "
        f"{c.train.micro_batch_tokens} both limit a micro-batch: give one of them",
    )
    need(
        c.train.max_steps > 0 or c.train.epochs > 0,
        f"train.epochs = {c.train.epochs} and train.max_steps = {c.train.max_steps}: one must be above 0",
    )
    keep = c.checkpoint.keep
    need(
        sorted(keep) in KEPT_FOLDERS,
        f"checkpoint.keep = {shorten(list(keep))}: choose best; last, best; or last, previous, best",
    )
    need(
        "last" in keep or not c.checkpoint.every_steps,
        f"checkpoint.every_steps = {c.checkpoint.every_steps} has no effect without last in checkpoint.keep",
    )
    for key in ("optim.warmup_steps", "optim.decay_steps", "model.dropout.switch_step"):
        value = get(c, key)
        need(value < 1 or value == int(value), f"{key} = {value} must be a share below 1 or a whole number of steps")
    need(
        not (c.model.init == "scratch" and c.model.head_init == "reset"),
        "model.init = scratch has a new head anyway: remove model.head_init = reset",
    )
    need(
        not (c.model.init == "scratch" and c.model.reinit_layers),
        "model.init = scratch gives every layer random weights: remove model.reinit_layers",
    )
    need(
        not (c.generate.do_sample and c.generate.num_beams > 1),
        f"generate.do_sample with generate.num_beams = {c.generate.num_beams} is not supported: choose one of them",
    )
    need(
        not (c.model.lora.rank and c.model.freeze),
        "model.lora.rank freezes all but the adapters and the head: remove model.freeze",
    )
    errors += _lora_faults(c)
    errors += _negatives_faults(c)
    if errors:
        raise ConfigError("\n".join(errors))


def _fold_faults(data: DataSettings) -> list[str]:
    """Return what is wrong with data.fold, in a sentence each."""
    faults = []
    if data.fold and parse_fold(data.fold) is None:
        faults.append(f"data.fold = {shorten(data.fold)} should be K/N, the K-th of N folds, such as 1/5")
    if data.fold and data.validation:
        faults.append(
            f"data.fold = {shorten(data.fold)} holds out a part of data.train, but data.validation is given: leave out "
            'one of them (--data.validation "")'
        )
    return faults


def _lora_faults(c: Config) -> list[str]:
    """Return what is wrong with model.lora, in a sentence each."""
    lora, faults = c.model.lora, []
    for key, neutral in (("model.lora.dora", False), ("model.lora.frozen_weights", "fp32")):
        if not lora.rank and get(c, key) != neutral:
            faults.append(f"{key} has no effect without LoRA: set model.lora.rank, such as 8")
    if lora.frozen_weights != "fp32" and c.distributed.strategy != "ddp":
        faults.append(
            f"model.lora.frozen_weights = {lora.frozen_weights!r} works with distributed.strategy = 'ddp', which keeps "
            "the whole model on each device"
        )
    return faults


def _negatives_faults(c: Config) -> list[str]:
    """Return a sentence where no anchor of a step of sentence embedding has another text than its positive."""
    is_alone = c.train.global_batch_size == 1 and not c.sentence_embedding.negative_columns
    if c.run.task != "sentence-embedding" or not is_alone:
        return []
    return [
        "train.global_batch_size = 1 leaves each anchor without other texts to tell its positive from, and nothing is "
        "learned: take more, such as 64, or name sentence_embedding.negative_columns"
    ]


def differences(config: Config, earlier: Config) -> list[str]:
    """Return "key: earlier value -> value" for each setting that differs, except machine settings."""
    return [
        f"{key}: {get(earlier, key)!r} -> {get(config, key)!r}"
        for key, declared in all_settings(config).items()
        if not declared.metadata["machine"] and get(config, key) != get(earlier, key)
    ]


def to_recipe(config: Config) -> Config:
    """Return the config as a recipe to run again: without --resume, --dry-run, --show-all and run.allow_changes."""
    default = RunSettings()
    usual = {name: getattr(default, name) for name in ("resume", "allow_changes", "dry_run", "show_all")}
    return replace(config, run=replace(config.run, **usual))


def to_dict(config: Config) -> dict[str, Any]:
    """Return {"section.key": value} of every setting."""
    return {key: get(config, key) for key in all_settings(config)}


def to_toml(config: Config) -> str:
    """Return the resolved recipe, every setting with its value; read_recipe reads it back as an equal Config."""
    return f"schema = {SCHEMA}\n{schema.to_toml(config)}"


def to_short_toml(config: Config) -> str:
    """Return the recipe with what differs from the defaults alone; read_recipe reads it back as an equal Config."""
    return f"schema = {SCHEMA}\n{schema.to_toml(config, Config())}"
