"""Settings: one dataclass per concern, filled from a TOML recipe and then from `--section.key=value`.

A setting is documented where it is declared; `--help`, the error messages and the resolved recipe in the run folder all
come from there. A setting that changes the mathematics of a run is the recipe's; one marked MACHINE only changes its
speed, and may differ when a run is resumed.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import typing
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

SCHEMA = 1  # of recipes; raised when an old one would be read wrongly
RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "movie_reviews"
MACHINE = True


class ConfigError(ValueError):
    """A setting is wrong; the message names it, its value and what would work."""


def setting(default: Any, doc: str, choices: tuple[str, ...] = (), machine: bool = False) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices, "machine": machine})


@dataclass(frozen=True)
class Run:
    task: str = setting("text-classification", "a row of engine/tasks.py")
    folder: str = setting("runs/run", "checkpoints, logs and results go here", machine=MACHINE)
    seed: int = setting(0, "of everything random: new weights, order, dropout, the held-out split")
    device: str = setting("auto", "auto takes a GPU when there is one", ("auto", "cpu", "cuda"), MACHINE)
    resume: str = setting(
        "no",
        "no: the folder must be new; yes (--resume): go on from its last checkpoint; auto: go on if there is one",
        ("no", "yes", "auto"),
        MACHINE,
    )
    allow_changes: bool = setting(False, "resume although recipe or data differ from the checkpoint's", machine=MACHINE)
    dry_run: bool = setting(False, "(--dry-run) show what would be trained on what, then exit", machine=MACHINE)


@dataclass(frozen=True)
class Model:
    name: str = setting("", "a local folder, package:NAME/FOLDER, or a hub name")
    sha256: str = setting("", "expected checksum of its model.safetensors; empty: not checked")
    init: str = setting("pretrained", "scratch: the same shape with random weights", ("pretrained", "scratch"))
    head_init: str = setting(
        "auto", "auto: the checkpoint's head where it has one; reset: a new one", ("auto", "reset")
    )
    pooling: str = setting("", "how a text becomes one vector; empty: as the checkpoint says", ("", "cls", "mean"))
    dropout: float | None = setting(None, "one rate for every dropout site; none: the checkpoint's rates")


@dataclass(frozen=True)
class Data:
    train: str = setting("", "file to learn from (.jsonl, .csv, .tsv), or package:NAME/FILE")
    validation: str = setting("", "file that decides early stopping and best; empty: held out from data.train")
    test: str = setting("", "file evaluated once at the end, with the best weights; empty: none")
    validation_fraction: float = setting(0.1, "share of data.train held out when there is no data.validation")
    group: str = setting("", "column whose equal values stay on one side of the held-out split; empty: none")
    id: str = setting("id", "column with the ids; without it, ids are row numbers")
    text: str = setting("text", "column with the text")
    text_pair: str = setting("", "column with a second text; empty: none")
    label: str = setting("label", "column with the label")
    labels: tuple[str, ...] = setting((), "the label names in order, comma-separated; empty: those found, sorted")
    max_length: int = setting(128, "longer texts are cut to this many tokens")
    workers: int = setting(0, "processes that prepare batches; 0: in memory, in this one", machine=MACHINE)


@dataclass(frozen=True)
class Train:
    batch_size: int = setting(32, "examples of one optimizer step, over all ranks and micro-batches")
    micro_batch_size: int = setting(0, "at most so many examples at a time on one rank; 0: no limit", machine=MACHINE)
    micro_batch_tokens: int = setting(0, "at most so many tokens at a time on one rank; 0: no limit", machine=MACHINE)
    epochs: float = setting(3.0, "passes over the training data, when train.max_steps is 0")
    max_steps: int = setting(0, "optimizer steps; 0: as train.epochs says")
    precision: str = setting("fp32", "of the matrix products (weights stay fp32)", ("fp32", "bf16", "fp16"))
    clip_norm: float = setting(1.0, "largest gradient norm; 0: no clipping")
    nan_policy: str = setting("raise", "on a NaN or infinite gradient: stop, or leave the step out", ("raise", "skip"))
    max_skipped: int = setting(10, "steps in a row that may be left out before the run stops")


@dataclass(frozen=True)
class Optim:
    lr: float = setting(5e-5, "peak learning rate of AdamW")
    schedule: str = setting("linear", "after the warm-up", ("constant", "linear", "cosine", "wsd"))
    warmup: float = setting(0.1, "rise from 0 to optim.lr: a share of all steps below 1, else a number of steps")
    decay: float = setting(0.2, "wsd only: the last share (below 1) or number of steps, falling linearly")
    min_lr: float = setting(0.0, "where the schedule ends, as a fraction of optim.lr")
    beta1: float = setting(0.9, "AdamW's decay of the first moment")
    beta2: float = setting(0.999, "AdamW's decay of the second moment")
    eps: float = setting(1e-8, "AdamW's epsilon")


@dataclass(frozen=True)
class Regularize:
    weight_decay: float = setting(0.01, "decoupled, as in AdamW; never on biases and norms")
    l1: float = setting(0.0, "adds l1 * sum |w| to the loss of a step, on the weights that decay")
    l2: float = setting(0.0, "adds l2 / 2 * sum w^2 to the loss of a step, on the weights that decay")
    label_smoothing: float = setting(0.0, "share of the target spread over all classes")


@dataclass(frozen=True)
class Eval:
    every: int = setting(0, "steps between evaluations; 0: once an epoch")
    batch_tokens: int = setting(4096, "tokens of one evaluation batch on one rank", machine=MACHINE)
    metric: str = setting("", "the metric to watch; empty: the task's main one")
    mode: str = setting("auto", "auto: a loss is better lower, all others higher", ("auto", "max", "min"))
    patience: int = setting(0, "evaluations without a new best before stopping; 0: never stop early")
    min_delta: float = setting(0.0, "a new best must be better by more than this")


@dataclass(frozen=True)
class Log:
    every: int = setting(10, "steps between lines in metrics.jsonl", machine=MACHINE)
    tensorboard: bool = setting(False, "also write TensorBoard files (extra: tensorboard)", machine=MACHINE)


@dataclass(frozen=True)
class Config:
    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optim: Optim = Optim()
    regularize: Regularize = Regularize()
    eval: Eval = Eval()
    log: Log = Log()


FLAGS = {"--resume": ("run.resume", "yes"), "--dry-run": ("run.dry_run", "true")}


def parse(argv: list[str], usage: str) -> Config:
    """[RECIPE] --section.key=value ... -> a checked Config. Raises ConfigError, or SystemExit(0) after --help."""
    if "--help" in argv or "-h" in argv:
        print(help_text(usage))
        raise SystemExit(0)
    positional, overrides = split_arguments(argv)
    if len(positional) > 1:
        raise ConfigError(f"one recipe at a time, not {' and '.join(map(repr, positional))}")
    config = override(read_recipe(positional[0] if positional else DEFAULT_RECIPE), overrides)
    check(config)
    return config


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(positional arguments, {"section.key": text}); takes `--key=value`, `--key value`, and a bare `--key` as true."""
    positional, overrides, i = [], {}, 0
    while i < len(argv):
        argument = argv[i]
        i += 1
        if not argument.startswith("--"):
            positional.append(argument)
            continue
        if argument in FLAGS:
            key, value = FLAGS[argument]
        elif "=" in argument:
            key, _, value = argument[2:].partition("=")
        elif i < len(argv) and not argv[i].startswith("--"):
            key, value, i = argument[2:], argv[i], i + 1
        else:
            key, value = argument[2:], "true"
        overrides[key] = value
    return positional, overrides


def read_recipe(name: str) -> Config:
    """A TOML file, by path or by the name of one that is shipped in engine/recipes."""
    shipped = RECIPES / f"{name}.toml"
    path = shipped if shipped.is_file() else Path(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ConfigError(f"recipe {name!r}: no such file; shipped ones are {names}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    schema = tree.pop("schema", None)
    if schema != SCHEMA:
        raise ConfigError(f"recipe {path}: schema = {schema!r}; this version reads `schema = {SCHEMA}`")
    values: dict[str, Any] = {}
    for section, content in tree.items():
        if not isinstance(content, dict):
            raise ConfigError(f"recipe {path}: {section!r} stands outside of a section; sections are {_sections()}")
        values |= {f"{section}.{key}": value for key, value in content.items()}
    return override(Config(), values, where=f"recipe {path}: ")


def override(config: Config, values: dict[str, Any], where: str = "") -> Config:
    """A copy with {"section.key": value} put in; text is read as the type of the setting."""
    known = all_settings()
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}unknown setting {key!r}{did_you_mean(key, list(known))}")
        section, name = key.split(".")
        part = replace(getattr(config, section), **{name: _convert(where + key, value, known[key])})
        config = replace(config, **{section: part})
    return config


def all_settings() -> dict[str, Field[Any]]:
    """Every "section.key" and its declaration, in order."""
    return {f"{s.name}.{f.name}": f for s in fields(Config) for f in fields(typing.get_type_hints(Config)[s.name])}


def did_you_mean(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not close:  # the key alone, in whatever section it belongs
        close = [c for c in candidates if c.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all of them"


def _convert(key: str, value: Any, declared: Field[Any]) -> Any:
    kind = str(declared.type)
    if isinstance(value, str) and not kind.startswith("str"):
        value = _from_text(key, value, kind)
    if kind.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind.startswith("tuple") and isinstance(value, list):
        value = tuple(str(item) for item in value)
    good = {"int": int, "bool": bool, "str": str, "float": float, "float | None": float | None}.get(kind, tuple)
    if not isinstance(value, good) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{key} = {value!r} should be {_kind_in_words(kind)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r} should be a finite number")
    choices = declared.metadata["choices"]
    if choices and value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{key} = {value!r}: choose from {', '.join(c or repr(c) for c in choices)}{hint}")
    return value


def _from_text(key: str, text: str, kind: str) -> Any:
    try:
        if kind == "int":
            return int(text.replace("_", ""))
        if kind.startswith("float"):
            return None if kind.endswith("None") and text.lower() in ("none", "") else float(text)
    except ValueError:
        raise ConfigError(f"{key} = {text!r} should be {_kind_in_words(kind)}") from None
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _kind_in_words(kind: str) -> str:
    names = {"int": "a whole number", "bool": "true or false", "str": "text", "float": "a number"}
    return names.get(kind, "a number or none" if kind.startswith("float") else "a list of texts")


def check(config: Config) -> None:
    """Ranges, and settings that contradict each other, all reported at once by name."""
    c, errors = config, []

    def need(ok: bool, message: str) -> None:
        if not ok:
            errors.append(message)

    need(bool(c.model.name), "model.name is empty: name a local folder, package:NAME/FOLDER or a hub name")
    need(bool(c.data.train), "data.train is empty: name a .jsonl, .csv or .tsv file")
    for key in (
        "train.batch_size",
        "data.max_length",
        "log.every",
        "eval.batch_tokens",
        "train.max_skipped",
        "optim.eps",
    ):
        need(get(c, key) > 0, f"{key} = {get(c, key)} must be above 0")
    for key in (
        *("run.seed", "data.workers", "train.micro_batch_size", "train.micro_batch_tokens", "train.max_steps"),
        *("train.clip_norm", "optim.lr", "optim.warmup", "optim.decay", "regularize.weight_decay"),
        *("regularize.l1", "regularize.l2", "eval.every", "eval.patience", "eval.min_delta"),
    ):
        need(get(c, key) >= 0, f"{key} = {get(c, key)} must be 0 or above")
    for key in ("optim.beta1", "optim.beta2", "regularize.label_smoothing", "model.dropout"):
        need(get(c, key) is None or 0 <= get(c, key) < 1, f"{key} = {get(c, key)} must be at least 0 and below 1")
    need(0 <= c.optim.min_lr <= 1, f"optim.min_lr = {c.optim.min_lr} is a fraction of optim.lr: 0 to 1")
    need(
        bool(c.data.validation) or 0 < c.data.validation_fraction < 1,
        f"data.validation_fraction = {c.data.validation_fraction} must lie between 0 and 1 (or give data.validation)",
    )
    need(
        not (c.train.micro_batch_size and c.train.micro_batch_tokens),
        "train.micro_batch_size and train.micro_batch_tokens both limit a micro-batch: give one of them",
    )
    need(
        c.train.max_steps > 0 or c.train.epochs > 0,
        f"train.epochs = {c.train.epochs} and train.max_steps = {c.train.max_steps}: one must be above 0",
    )
    need(
        not (c.data.group and c.data.validation),
        "data.group decides how validation data is held out, but data.validation is given: drop one of them",
    )
    need(len(set(c.data.labels)) == len(c.data.labels), f"data.labels = {list(c.data.labels)} names a label twice")
    need(
        not (c.model.init == "scratch" and c.model.head_init == "reset"),
        "model.init = scratch has a new head anyway: drop model.head_init = reset",
    )
    if errors:
        raise ConfigError("\n".join(errors))


def get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def differences(ours: Config, theirs: Config) -> list[str]:
    """Settings of the recipe (not of the machine) in which two configurations differ, as "key: theirs -> ours"."""
    return [
        f"{key}: {get(theirs, key)!r} -> {get(ours, key)!r}"
        for key, declared in all_settings().items()
        if not declared.metadata["machine"] and get(ours, key) != get(theirs, key)
    ]


def to_toml(config: Config) -> str:
    """The resolved recipe, every setting with its value; reads back as the same Config."""
    lines = [f"schema = {SCHEMA}"]
    for section in fields(config):
        part = getattr(config, section.name)
        lines += ["", f"[{section.name}]"]
        for declared in fields(part):
            value = getattr(part, declared.name)
            lines.append(f"{'# ' if value is None else ''}{declared.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _sections() -> str:
    return ", ".join(f.name for f in fields(Config))


def help_text(usage: str) -> str:
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    lines = [
        usage,
        "",
        f"Recipes shipped: {names} (default {DEFAULT_RECIPE}). Every setting of a recipe can be given as",
    ]
    lines += ["--section.key=value or --section.key value:", ""]
    section = ""
    for key, declared in all_settings().items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(f"[{section}]")
        choices = declared.metadata["choices"]
        kind = "{" + ",".join(c or "''" for c in choices) + "}" if choices else str(declared.type)
        default = _toml_value(declared.default)
        lines.append(f"  --{key} {kind}  (default {default})")
        lines.append(f"        {declared.metadata['doc']}")
    return "\n".join(lines)
