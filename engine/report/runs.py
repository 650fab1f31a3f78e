"""What a run folder keeps of a run, as plain values: the log, the recipe, and what the model card says of the data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from engine.config import ConfigError, EvalSettings, read_recipe, to_dict
from engine.model_card import CARD, changed_settings
from engine.report.summary_file import DATA, read_summary
from engine.run_folder import BEST, LAST
from engine.state import metric_direction
from engine.tasks import MULTI_TASK, find_task
from engine.tasks.multi_task import MEAN

LOG = "metrics.jsonl"
ESCAPED = re.compile(r"\\([\\`*<|\[\]_])")  # in a model card, a character that is no Markdown
FOLDERS = ("run.folder", "run.resume", "run.dry_run", "run.show_all")  # of no interest where runs are compared
SAME_RESULTS = ("run.", "log.", "checkpoint.", "distributed.")  # sections; runs that differ in these alone are repeats
SAME_DATA = ("run.task", "data.train", "data.validation", "data.validation_fraction", "data.fold")
Point = tuple[float, float]  # (step, value)


@dataclass(frozen=True)
class Run:
    """One run.

    training, evaluations, end: lines of metrics.jsonl (engine/log.py); end: {} where the run has not ended.
    settings, changed: all settings of its recipe, and as TOML those that differ from the defaults.
    watched, mode: the metric that chose the best weights, and whether "max" or "min" is better; "" where unknown.
    summary: what it said before its first step (summary_file.py). data: the lines of the model card about the data,
    of a run without a summary. details: metrics that a run of the task does not print.
    notes: what is missing or damaged.
    """

    name: str
    folder: Path
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    end: dict[str, Any]
    settings: Mapping[str, Any]
    changed: Sequence[str]
    watched: str
    mode: str
    data: Sequence[str]
    details: Sequence[str]
    summary: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation of the best weights; {} where there is none."""
        return next((row for row in reversed(self.evaluations) if row.get("best")), {})

    @property
    def seed(self) -> Any:
        """The seed; None where the recipe is missing."""
        return self.settings.get("run.seed")

    @property
    def last_step(self) -> int:
        """The step of the last line of the log."""
        return max((row["step"] for row in (*self.training, *self.evaluations, self.end) if row), default=0)

    def metric_names(self) -> list[str]:
        """Return the metrics of the evaluations, the watched one first."""
        names = dict.fromkeys(name for row in self.evaluations for name in row["evaluation"])
        return sorted(names, key=lambda name: name != self.watched)

    def test_metrics(self) -> dict[str, float]:
        """Return the metrics on data.test at the end of the run, without the ends of their intervals."""
        found = {key.removeprefix("test_"): value for key, value in self.end.items() if key.startswith("test_")}
        return {name: value for name, value in found.items() if not name.endswith(("_low", "_high"))}


def open_runs(names: Sequence[str]) -> list[Run]:
    """Read run folders; ConfigError for a folder without a readable metrics.jsonl."""
    folders = [Path(name) for name in names]
    parents = [
        folder.parent if folder.name in (BEST, LAST) and _has_log(folder.parent) else folder for folder in folders
    ]
    distinct = list(dict.fromkeys(parents))
    return [open_run(folder, short) for folder, short in zip(distinct, _short_names(distinct), strict=True)]


def _has_log(folder: Path) -> bool:
    return (folder / LOG).is_file()


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path; where two have the same, the parts between what all paths begin and end with.

    So runs/a/run and runs/b/run are a and b.
    """
    paths = [folder.resolve().parts for folder in folders]
    last = [parts[-1] if parts else "" for parts in paths]
    if len({*last}) == len(last):
        return last
    begin, end = _num_equal(paths), _num_equal([parts[::-1] for parts in paths])
    return ["/".join(parts[begin : len(parts) - end]) or str(Path(*parts)) for parts in paths]


def _num_equal(paths: Sequence[Sequence[str]]) -> int:
    """Return how many parts all paths begin with."""
    return next((i for i, parts in enumerate(zip(*paths, strict=False)) if len({*parts}) > 1), min(map(len, paths)))


def open_run(folder: Path, name: str) -> Run:
    """Read one run folder; ConfigError where there is no log in it."""
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r}: no such run folder")
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ConfigError(f"{str(folder)!r} is not a run folder: it has no {LOG}") from None
    except OSError as error:
        raise ConfigError(f"{folder / LOG} cannot be read: {error.strerror}") from None
    rows, damaged = _parse_lines(text.splitlines())
    notes = [f"{damaged:,} lines of {LOG} cannot be read and are left out"] if damaged else []
    if not rows:
        notes.append(f"{LOG} has no line yet")
    training = [row for row in rows if "lr" in row]
    evaluations = [row for row in rows if isinstance(row.get("evaluation"), dict)]
    end = rows[-1] if rows and "end" in rows[-1] else {}
    if rows and not end:
        notes.append("the run has not ended, or was stopped; the same command with --resume continues it")
    settings, changed = _read_settings(folder, notes)
    watched = _watched(settings, evaluations, end)
    summary = read_summary(folder)
    data = [] if DATA in summary else _data_lines(folder / BEST / CARD, notes)
    return Run(
        name, folder, training, evaluations, end, settings, changed, watched, _mode(settings, watched),
        data, _details(folder, settings, evaluations), summary, notes,
    )  # fmt: skip


def _parse_lines(lines: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the lines that are rows of a log, NaN for null in them, and the number of the others."""
    rows = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(_numbers(row))
    return rows, len(lines) - len(rows)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    filled = {key: math.nan if value is None else value for key, value in row.items()}
    return {key: _numbers(value) if isinstance(value, dict) else value for key, value in filled.items()}


def _read_settings(folder: Path, notes: list[str]) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Return the settings of the recipe and those that were changed; ({}, []) and a note where it cannot be read."""
    recipes = [folder / name / "recipe.toml" for name in (BEST, LAST)]
    path = next((path for path in recipes if path.is_file()), None)
    if path is None:
        notes.append("no recipe.toml yet: neither best/ nor last/ was saved")
        return {}, []
    try:
        recipe = read_recipe(str(path))
    except ConfigError as error:
        notes.append(f"the recipe cannot be read: {error}")
        return {}, []
    return to_dict(recipe), changed_settings(recipe)


def _watched(settings: Mapping[str, Any], evaluations: Sequence[dict[str, Any]], end: Mapping[str, Any]) -> str:
    """Return the watched metric: that of the end of the run, of the recipe and its task, or the first evaluated."""
    named = [key.removeprefix("best_") for key in end if key.startswith("best_") and key != "best_step"]
    named += [settings["eval.metric"]] if settings.get("eval.metric") else []
    with suppress(ConfigError):  # of a task of a plugin, or of several tasks
        named += [find_task(str(settings.get("run.task")))[1]]
    if any(MEAN in row["evaluation"] for row in evaluations):  # of several tasks
        named += [MEAN]
    named += [name for row in evaluations[:1] for name in row["evaluation"]]
    return str(named[0]) if named else ""


def _mode(settings: Mapping[str, Any], watched: str) -> str:
    """Return whether "max" or "min" of a metric is better; "" where nobody knows."""
    with suppress(ConfigError):
        return metric_direction(EvalSettings(mode=settings.get("eval.mode", "auto")), watched)
    return ""


def _details(folder: Path, settings: Mapping[str, Any], evaluations: Sequence[dict[str, Any]]) -> Sequence[str]:
    """Return the metrics that a run of the task does not print; () for a task that is not known here.

    Of several tasks they are all but the one that each task watches.
    """
    if settings.get("run.task") == MULTI_TASK:
        names = [name for row in evaluations[:1] for name in row["evaluation"]]
        parts = {path.name.removeprefix(f"{BEST}-"): path for path in folder.glob(f"{BEST}-*")}
        watched = {f"{name}/{_first_metric(path)}" for name, path in parts.items()}
        return [name for name in names if name not in watched]
    with suppress(ConfigError):
        return find_task(str(settings.get("run.task")))[0].details
    return ()


def _first_metric(folder: Path) -> str:
    """Return the metric that the recipe of a checkpoint watches; "" where that is not known."""
    with suppress(ConfigError):
        run = read_recipe(str(folder / "recipe.toml"))
        return find_task(run.run.task, run.eval.metric)[1]
    return ""


def _data_lines(card: Path, notes: list[str]) -> list[str]:
    """Return what the section "Data" of a model card says."""
    try:
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append(f"no {BEST}/{CARD}, which has the summary of the data; a run writes it at its end")
        return []
    inside = False
    found = []
    for line in lines:
        inside = line == "## Data" if line.startswith("## ") else inside
        if inside and line.lstrip().startswith("- "):
            found.append(ESCAPED.sub(r"\1", line))
    return found


# ---- numbers of runs


def curve(rows: Sequence[Mapping[str, Any]], key: str, inside: str = "") -> list[Point]:
    """Return (step, value) of a number in lines of the log; inside: the member of a line that has it."""
    found = []
    for row in rows:
        value = (row.get(inside) or {} if inside else row).get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((float(row["step"]), float(value)))
    return found


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return {setting: its value in each run} of those that differ between the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys if key not in FOLDERS}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


@dataclass(frozen=True)
class Paired:
    """How much better runs of one recipe are than those of another with the same seeds, in the watched metric."""

    title: str
    differences: dict[Any, float]  # {seed: difference}; above 0: better than the first recipe

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.differences.values())

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; NaN for one."""
        values = [*self.differences.values()]
        return stdev(values) if len(values) > 1 else math.nan


def pair_by_seed(runs: Sequence[Run], metric: str) -> list[Paired]:
    """Return the difference of each other recipe from the first run's, over the seeds that both were run with.

    Runs on other data, or of another task, are not compared. Settings of SAME_RESULTS make no recipe.
    """
    differing = differing_settings(runs)
    groups: dict[str, dict[Any, float]] = {"": {}}  # of the first recipe
    for i, run in enumerate(runs):
        changed = {key: own[i] for key, own in differing.items() if own[i] != own[0]}
        value = run.best.get("evaluation", {}).get(metric, math.nan)
        if not run.settings or math.isnan(value) or changed.keys() & {*SAME_DATA}:
            continue
        named = [f"{key} = {own!r}" for key, own in changed.items() if not key.startswith(SAME_RESULTS)]
        groups.setdefault(", ".join(named), {})[run.seed] = value
    first, sign = groups.pop(""), -1 if runs[0].mode == "min" else 1
    found = []
    for title, values in groups.items():
        common = {seed: sign * (value - first[seed]) for seed, value in values.items() if seed in first}
        found += [Paired(title, common)] if common else []
    return found
