"""The same recipe under several settings and seeds: a grid of runs, or a random sample of it, and what came of them.

    python -m engine.study RECIPE --vary regularize.l2=0,1e-4,1e-2 --vary model.dropout.hidden=0,0.1,0.3 --seeds 3

Every run is one of `engine.train`, in a folder of its own below --folder. The same command goes on where it was
stopped: runs that have ended stay, a begun one goes on from its last checkpoint. At the end, and whenever it stops, it
writes table.md, table.csv and, with matplotlib installed, a plot: mean and spread over the seeds of each setting.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine import config, distributed
from engine.config import ConfigError, did_you_mean

USAGE = "python -m engine.study RECIPE --vary KEY=VALUE,VALUE,... [--vary ...] [--seeds N] [--section.key=value ...]"
OPTIONS = {
    "vary": "KEY=VALUE,VALUE,...: a setting and the values it takes; given several times, all combinations are run",
    "seeds": "how many seeds each combination is run with, from run.seed on (default 1)",
    "sample": "run only so many of the combinations, drawn at random from run.seed (default: all)",
    "parallel": "how many runs at a time; each has a GPU of its own, or a share of the CPU's threads (default 1)",
    "folder": "where the runs and their table go (default: studies/NAME of the recipe)",
    "keep_weights": "true: keep best/ and last/ of runs that have ended (default: only their metrics and recipe)",
}
GRID = "regularize.l2=0,1e-4"  # as an example in messages


@dataclass
class Study:
    """What is to be run: settings by combination, and how."""

    recipe: str
    common: dict[str, str]  # settings of all runs
    combinations: list[dict[str, str]]  # {key: value} of those that vary
    seeds: list[int]
    folder: Path
    parallel: int = 1
    keep_weights: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def runs(self) -> list[tuple[dict[str, str], int, Path]]:
        """(settings, seed, folder) of every run."""
        return [
            (values, seed, self.folder / (_name(values) or "as_it_is") / f"seed{seed}")
            for values in self.combinations
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    metric: str  # the one that was watched
    best: float
    best_step: int
    train_loss: float  # mean of the last tenth of what was logged, as the model was in training
    validation_loss: float  # of the last evaluation; NaN for a task without one

    @property
    def gap(self) -> float:
        """How much worse the loss is on what was not trained on: what a model that overfits shows."""
        return self.validation_loss - self.train_loss


def _name(values: dict[str, str]) -> str:
    """A folder's name for a combination: the last part of each key, and its value."""
    text = ",".join(f"{key}={value}" for key, value in values.items())
    return "".join(c if c.isalnum() or c in ".,=+-_" else "_" for c in text)


def parse(argv: Sequence[str]) -> Study:
    """The study of a command line, every combination of it checked; ConfigError, or SystemExit(0) after --help."""
    if "--help" in argv or "-h" in argv:
        lines = [USAGE, "", *(f"  --{name}\n        {doc}" for name, doc in OPTIONS.items())]
        print("\n".join([*lines, "", "Any setting of the recipe can be given too: python -m engine.train --help"]))
        raise SystemExit(0)
    varied, rest = _take_varied(list(argv))
    positional, given = config.split_arguments(rest)
    own = {name: given.pop(name) for name in OPTIONS if name in given}
    if len(positional) != 1:
        raise ConfigError(f"name one recipe: {USAGE}")
    recipe = positional[0]
    base = config.override(config.read_recipe(recipe), given)
    for key in ("run.folder", "run.seed", "run.resume", "run.dry_run"):
        if key in varied or (key != "run.seed" and key in given):
            raise ConfigError(f"{key} is the study's to set; --folder and --seeds are its options")
    numbers = {name: _whole(name, own.get(name, default)) for name, default in DEFAULTS.items()}
    keys = list(varied)
    combinations = [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*varied.values())]
    if numbers["sample"] and numbers["sample"] < len(combinations):
        rng = np.random.default_rng([base.run.seed, 0x57D1])
        chosen = sorted(rng.choice(len(combinations), numbers["sample"], replace=False).tolist())
        combinations = [combinations[i] for i in chosen]
    for values in combinations:  # before any of them is run
        config.check(config.override(base, values))
    seeds = [base.run.seed + i for i in range(numbers["seeds"])]
    folder = Path(own.get("folder", f"studies/{Path(recipe).stem}"))
    keep = own.get("keep_weights", "false").lower() == "true"
    given.pop("run.seed", None)
    return Study(recipe, given, combinations, seeds, folder, numbers["parallel"], keep)


DEFAULTS = {"seeds": "1", "sample": "0", "parallel": "1"}


def _whole(name: str, text: str) -> int:
    least = 0 if name == "sample" else 1
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--{name} = {text!r} should be a whole number from {least}")
    return int(text)


def _take_varied(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({key: its values}, the other arguments): --vary is the one option that may be given several times."""
    varied: dict[str, list[str]] = {}
    rest: list[str] = []
    while argv:
        argument = argv.pop(0)
        if argument != "--vary" and not argument.startswith("--vary="):
            rest.append(argument)
            continue
        text = argument.removeprefix("--vary=") if "=" in argument else argv.pop(0) if argv else ""
        key, _, values = text.partition("=")
        known = config.all_settings(config.Config())
        if key not in known:
            raise ConfigError(
                f"--vary {text!r}: unknown setting {key!r}{did_you_mean(key, known)}; as in --vary {GRID}"
            )
        if key in varied:
            raise ConfigError(f"--vary {key} is given twice: name all its values in one")
        varied[key] = [value.strip() for value in values.split(",")]
        if len(set(varied[key])) < len(varied[key]) or varied[key] == [""]:
            raise ConfigError(f"--vary {text!r} should name each value once, as in --vary {GRID}")
    return varied, rest


def outcome(folder: Path) -> Outcome | None:
    """What a run came to, from its metrics.jsonl; None for one that has not ended."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    if not rows or "end" not in rows[-1]:
        return None
    end = rows[-1]
    metric = next(name.removeprefix("best_") for name in end if name.startswith("best_") and name != "best_step")
    losses = [row["loss"] for row in rows if "lr" in row]
    evaluations = [row["evaluation"] for row in rows if "evaluation" in row]
    last = evaluations[-1].get("loss", math.nan) if evaluations else math.nan
    recent = losses[-max(1, len(losses) // 10) :]
    return Outcome(metric, end[f"best_{metric}"], int(end["best_step"]), fmean(recent) if recent else math.nan, last)


def run(study: Study, place: int, values: dict[str, str], seed: int, folder: Path) -> str:
    """One run to its end, unless it has ended before; "" or, in a sentence, what went wrong."""
    if study.stopping.is_set():
        return "not begun"
    if outcome(folder) is not None:
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = study.common | values | {"run.folder": str(folder), "run.seed": str(seed), "run.resume": "auto"}
    environment = dict(os.environ)
    if gpus := torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = str(place % gpus)
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // study.parallel))
    command = [sys.executable, "-m", "engine.train", study.recipe, *(f"--{k}={v}" for k, v in settings.items())]
    printed = folder.parent / f"{folder.name}.txt"
    code = launch(study, command, environment, printed)
    if outcome(folder) is None:
        if code > 128 or code < 0:
            study.stopping.set()
            return f"{folder}: stopped"
        text = printed.read_text(encoding="utf-8").strip()
        return f"{folder}: {text.splitlines()[-1] if text else f'ended with code {code}'}"
    if not study.keep_weights:
        _drop_weights(folder)
    return ""


def launch(study: Study, command: list[str], environment: dict[str, str], printed: Path) -> int:
    """Run a command to its end, what it prints in a file; its exit code."""
    with printed.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        study.children.append(child)
        return child.wait()


def _stop(study: Study) -> None:
    """No more runs are begun, and those under way leave a checkpoint; a terminal's Ctrl-C has told them already."""
    study.stopping.set()
    for child in study.children:
        if child.poll() is None:
            child.terminate()


def _drop_weights(folder: Path) -> None:
    """Keep the recipe beside the metrics; a grid of checkpoints would fill the disk."""
    recipe = folder / "best" / "recipe.toml"
    if recipe.is_file():
        shutil.copy(recipe, folder / "recipe.toml")
    for name in ("best", "last", "previous"):
        shutil.rmtree(folder / name, ignore_errors=True)


@dataclass(frozen=True)
class Line:
    """One combination: its settings, and mean and standard deviation over the seeds that have ended."""

    values: dict[str, str]
    runs: int
    metric: str
    means: dict[str, float]
    spreads: dict[str, float]


MEASURED = ("best", "train_loss", "validation_loss", "gap")


def summarize(study: Study) -> list[Line]:
    """A Line for every combination of which a run has ended."""
    lines = []
    for values in study.combinations:
        found = [outcome(folder) for chosen, _, folder in study.runs() if chosen == values]
        ended = [one for one in found if one is not None]
        if not ended:
            continue
        columns = {name: [getattr(one, name) for one in ended] for name in MEASURED}
        means = {name: fmean(column) for name, column in columns.items()}
        spreads = {name: stdev(column) if len(column) > 1 else math.nan for name, column in columns.items()}
        lines.append(Line(values, len(ended), ended[0].metric, means, spreads))
    return lines


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row a combination, mean and standard deviation over the seeds."""
    if not lines:
        return "no run has ended"
    keys = list(lines[0].values)
    header = [*keys, "runs", f"best {lines[0].metric}", "train loss", "validation loss", "gap"]
    rows = [header, ["---"] * len(header)]
    for line in lines:
        cells = [f"{line.means[n]:.4f}" + _spread(line.spreads[n]) for n in MEASURED]
        rows.append([*(line.values[key] for key in keys), str(line.runs), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.4f}"


def write(study: Study, lines: Sequence[Line]) -> list[Path]:
    """table.md, table.csv and, where matplotlib is there, plot.png in the folder of the study; the paths."""
    study.folder.mkdir(parents=True, exist_ok=True)
    paths = [study.folder / "table.md", study.folder / "table.csv"]
    paths[0].write_text(table(lines) + "\n", encoding="utf-8")
    with paths[1].open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        keys = list(lines[0].values) if lines else []
        writer.writerow([*keys, "metric", "runs", *(f"{n}_{what}" for n in MEASURED for what in ("mean", "sd"))])
        for line in lines:
            numbers = [x for n in MEASURED for x in (line.means[n], line.spreads[n])]
            writer.writerow([*(line.values[key] for key in keys), line.metric, line.runs, *numbers])
    if lines and importlib.util.find_spec("matplotlib") is not None:
        paths.append(study.folder / "plot.png")
        _plot(lines, paths[-1])
    return paths


def _plot(lines: Sequence[Line], path: Path) -> None:
    """Above the watched metric, below both losses, a mark a combination with its spread over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["\n".join(f"{k.rpartition('.')[2]}={v}" for k, v in line.values.items()) or "as it is" for line in lines]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(max(5, 1.1 * len(lines) + 2), 6.5), sharex=True)
    series: list[tuple[Any, str, str]] = [(above, "best", f"best {lines[0].metric}")]
    series += [(below, "train_loss", "training loss"), (below, "validation_loss", "validation loss")]
    for axes, key, label in series:
        spreads = [0.0 if math.isnan(line.spreads[key]) else line.spreads[key] for line in lines]
        axes.errorbar(range(len(lines)), [line.means[key] for line in lines], spreads, fmt="o", capsize=4, label=label)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    below.set_xticks(range(len(lines)), names, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    study = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    runs = study.runs()
    print(f"{len(runs)} runs: {len(study.combinations)} combinations x {len(study.seeds)} seeds, in {study.folder}")
    study.folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with (
        tqdm(total=len(runs), unit="run", disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(study.parallel) as pool,
    ):

        def one(place: int) -> str:
            problem = run(study, place, *runs[place])
            bar.update()
            return problem

        try:
            problems = [problem for problem in pool.map(one, range(len(runs))) if problem]
        except KeyboardInterrupt:
            _stop(study)
    lines = summarize(study)
    paths = write(study, lines)
    print(f"\n{table(lines)}\n\n{', '.join(map(str, paths))}")
    if study.stopping.is_set():
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + 2
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    distributed.run_command(main)
