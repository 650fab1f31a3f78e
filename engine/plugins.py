"""Plugins: tables in the user's own Python files, added to the engine's tables for this process.

A plugin is a Python file (or an importable module) that defines one or more of these dictionaries:

    ARCHITECTURES  {model_type: models.architecture.Architecture}
    HEADS          {name: subclass of models.heads.Head}
    TASKS          {name: engine.tasks.Task}
    METRICS        {name: function(predictions, references) -> float}, of all examples (engine/own_metrics.py);
                   {task: {name: function(statistics, labels) -> float}}, from what the task's evaluate_batch sums
    LOSSES         {name: function(logits, batch) -> scalar}, the sum over the targets of a micro-batch
    OPTIMIZERS     {name: function(parameter groups, [optim]) -> torch.optim.Optimizer}
    SCHEDULES      {name: function(step, total steps, [optim]) -> factor of optim.lr after the warm-up}

A file without METRICS also adds each of its functions whose parameters are `predictions` and `references`.

The user names it with `--run.plugins my_parts.py`, or as `plugins` under [run] of a recipe. Loading a checkpoint never
imports a plugin by itself: its recipe has the names of its plugins and state.json their checksums, and the user names
them again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

import models
from engine.config import ConfigError, choose_from
from engine.errors import TrainingError
from engine.objective import LOSSES
from engine.optim import SCHEDULES
from engine.optimizers import OPTIMIZERS
from engine.own_metrics import PARAMETERS, OwnMetric, find_own_metrics, is_own_metric
from engine.tasks import TASKS, Task
from models.architecture import Architecture
from models.heads import Head

Metric = Callable[[Tensor, Sequence[str]], float]

# {name of a plugin's table: (the engine's table, what its values must be)}
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "ARCHITECTURES": (models.ARCHITECTURES, "an Architecture"),
    "HEADS": (models.HEADS, "a subclass of models.heads.Head"),
    "TASKS": (TASKS, "a Task"),
    "LOSSES": (LOSSES, "a function"),
    "OPTIMIZERS": (OPTIMIZERS, "a function"),
    "SCHEDULES": (SCHEDULES, "a function"),
}
METRICS = "METRICS"
MISTAKES = (NameError, TypeError, AttributeError, ImportError, LookupError)  # that other predictions would not mend
RESERVED = ("step", "best")  # what stands beside the metrics in metrics.jsonl and in the result of a run

_undo: list[tuple[dict[str, Any], str, Any]] = []  # (table, name, previous value or None), oldest first
_checksums: dict[str, str] = {}  # of the plugins that are loaded
_folders: list[str] = []  # that were added to sys.path


def load_plugins(plugins: Sequence[str]) -> None:
    """Add the tables of these plugins to the engine's, after removing those that an earlier call added.

    plugins: paths of Python files, or dotted names of importable modules. Raises ConfigError for a plugin that cannot
    be imported or defines no table, and for an entry of the wrong kind or under a used name.
    """
    _unload()
    try:
        for plugin in dict.fromkeys(plugins):
            sha256 = checksum(plugin)
            _add(plugin, _import(plugin))
            _checksums[plugin] = sha256
    except ConfigError:
        _unload()
        raise


def _unload() -> None:
    """Restore every table as it was before the first plugin."""
    while _undo:
        table, name, before = _undo.pop()
        if before is None:
            table.pop(name, None)
        else:
            table[name] = before
    while _folders:
        if (folder := _folders.pop()) in sys.path:
            sys.path.remove(folder)
    _checksums.clear()


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    _undo.append((table, name, table.get(name)))
    table[name] = value


def check_named(plugins: Sequence[str], trained_with: Sequence[str], folder: Path) -> None:
    """Raise ConfigError if the checkpoint in `folder` was trained with plugins and the user names none."""
    if trained_with and not plugins:
        raise ConfigError(
            f"{folder} was trained with parts of your own; loading a checkpoint imports nothing by itself: "
            f"name them with --run.plugins {','.join(trained_with)} (from Python: run__plugins={[*trained_with]})"
        )


def loaded_checksums() -> dict[str, str]:
    """Return {plugin: SHA-256 of its file} of the plugins that are loaded, as their files were then."""
    return dict(_checksums)


def changed_since(trained_with: Mapping[str, str]) -> list[str]:
    """Return a sentence for each difference between the loaded plugins and those a checkpoint was trained with.

    trained_with: {plugin: SHA-256}, from state.json. A file is known by its checksum: its path may be another one.
    """
    loaded, known = set(_checksums.values()), set(trained_with.values())
    changes = [f"the plugin {name} is not loaded as it was" for name, sha in trained_with.items() if sha not in loaded]
    return changes + [
        f"the plugin {name} is new or has changed" for name, sha in _checksums.items() if sha not in known
    ]


def checksum(plugin: str) -> str:
    """Return the SHA-256 of a plugin's file; ConfigError where there is none."""
    path = _file_of(plugin)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"run.plugins = {plugin!r} cannot be read: {error.strerror}") from None


def _is_path(plugin: str) -> bool:
    return plugin.endswith(".py") or "/" in plugin


def _file_of(plugin: str) -> Path:
    if _is_path(plugin):
        if not Path(plugin).is_file():
            raise ConfigError(f"run.plugins = {plugin!r}: no such file, seen from {Path.cwd()}")
        return Path(plugin)
    try:
        spec = importlib.util.find_spec(plugin)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"run.plugins = {plugin!r} is neither a file ending in .py nor a module that can be imported")
    return Path(spec.origin)


def _import(plugin: str) -> ModuleType:
    """Run the plugin's file; an error in it becomes a ConfigError with file, line and reason."""
    path = _file_of(plugin)
    try:
        if not _is_path(plugin):
            module = importlib.import_module(plugin)
            return importlib.reload(module) if plugin in sys.modules else module
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # at the end, so that modules beside the file hide none of the engine's
            _folders.append(folder)
        name = f"engine_plugin_{len(_checksums)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"run.plugins = {plugin!r} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickling look classes up there
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"run.plugins: {error.filename or path}:{error.lineno or 1}: {error.msg}") from None
    except Exception as error:  # the user's own code may raise any error
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        line = f":{lines[-1]}" if lines else ""
        raise ConfigError(f"run.plugins: {path}{line}: {type(error).__name__}: {error}") from error


def _add(plugin: str, module: ModuleType) -> None:
    """Add every table of the module; all entries are checked before the first is added."""
    tables = {name: getattr(module, name) for name in (*TABLES, METRICS) if hasattr(module, name)}
    found = {} if METRICS in tables else find_own_metrics(module)
    if not tables and not found:
        raise ConfigError(
            f"run.plugins: {plugin} defines none of {', '.join((*TABLES, METRICS))}, and no metric, a function of "
            f"{' and '.join(PARAMETERS)}: nothing to add"
        )
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"run.plugins: {plugin}: {name} should be a dictionary, not a {type(table).__name__}")
        if name != METRICS:
            _check_entries(plugin, name, table)
    metrics: dict[str, Any] = tables.pop(METRICS, {})
    own = found | {name: value for name, value in metrics.items() if callable(value)}
    metrics = {name: value for name, value in metrics.items() if name not in own}
    _check_metrics(plugin, metrics, TASKS | tables.get("TASKS", {}))
    _check_own_metrics(plugin, own, TASKS | tables.get("TASKS", {}))
    for name, table in tables.items():
        for key, value in table.items():
            _put(TABLES[name][0], key, value)
    for task, functions in metrics.items():
        _put(TASKS, task, with_metrics(TASKS[task], functions))
    added = {name: OwnMetric(name, function) for name, function in own.items()}
    for name, known in list(TASKS.items()) if added else ():
        if known.references is not None:
            _put(TASKS, name, _with_own_metrics(known, added))


def _check_entries(plugin: str, name: str, table: Mapping[str, Any]) -> None:
    ours, kind = TABLES[name]
    for key, value in table.items():
        if not isinstance(key, str) or not key:
            raise ConfigError(f"run.plugins: {plugin}: {name}[{key!r}]: a name is a text, not empty")
        if key in ours:
            raise ConfigError(f"run.plugins: {plugin}: {name}[{key!r}] exists already: choose another name")
        right = {
            "ARCHITECTURES": isinstance(value, Architecture),
            "HEADS": isinstance(value, type) and issubclass(value, Head),
            "TASKS": isinstance(value, Task),
        }.get(name, callable(value))
        if not right:
            raise ConfigError(f"run.plugins: {plugin}: {name}[{key!r}] should be {kind}, not {value!r}")


def _check_metrics(plugin: str, metrics: Mapping[str, Any], tasks: Mapping[str, Task]) -> None:
    for task, functions in metrics.items():
        if task not in tasks:
            raise ConfigError(f"run.plugins: {plugin}: METRICS[{task!r}] is not a task; {choose_from(task, tasks)}")
        if not isinstance(functions, dict) or not all(map(callable, functions.values())):
            raise ConfigError(
                f"run.plugins: {plugin}: METRICS[{task!r}] should be {{name: function(statistics, labels) -> float}}"
            )
        for name in functions:
            if name in (*tasks[task].metrics, *RESERVED):
                raise ConfigError(f"run.plugins: {plugin}: {task} has a metric {name!r} already: choose another name")


def _check_own_metrics(plugin: str, own: Mapping[str, Any], tasks: Mapping[str, Task]) -> None:
    for name, function in own.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"run.plugins: {plugin}: METRICS[{name!r}]: a name is a text, not empty")
        if not is_own_metric(function):
            raise ConfigError(
                f"run.plugins: {plugin}: METRICS[{name!r}] should be a function of {' and '.join(PARAMETERS)}, by "
                "these names"
            )
        for task, known in tasks.items():
            if name in (*known.metrics, *RESERVED):
                raise ConfigError(f"run.plugins: {plugin}: {task} has a metric {name!r} already: choose another name")


def _with_own_metrics(task: Task, own: Mapping[str, OwnMetric]) -> Task:
    return replace(task, metrics=(*task.metrics, *own), own_metrics={**task.own_metrics, **own})


def with_metrics(task: Task, functions: Mapping[str, Metric]) -> Task:
    """Return the task with further metrics, each computed from the statistics that its evaluate_batch sums."""

    def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
        added = {name: _to_number(name, function(statistics, labels)) for name, function in functions.items()}
        return task.compute_metrics(statistics, labels) | added

    return replace(task, metrics=(*task.metrics, *functions), compute_metrics=compute_metrics)


def try_own_metrics(task: Task, examples: Any, labels: Sequence[str]) -> None:
    """Compute each metric of the user's own of the references with themselves; TrainingError for a mistake in its code.

    So such a mistake ends a run before its first step. Other errors may come from these predictions alone.
    """
    if not task.own_metrics or task.references is None:
        return
    references = task.references(examples, labels)
    for metric in task.own_metrics.values():
        try:
            metric(list(references), list(references))
        except TrainingError as error:
            if error.__cause__ is None or isinstance(error.__cause__, MISTAKES):
                raise


def _to_number(metric: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise TrainingError(f"the metric {metric!r} should return a number, not {value!r:.80}") from None
