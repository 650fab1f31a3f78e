"""The same recipe under several settings and seeds, and what came of them: a grid of settings, or one change at a time.

    python -m engine.study RECIPE --vary regularize.l2=0,1e-4,1e-2 --vary model.dropout.hidden=0,0.1,0.3 --seeds 3
    python -m engine.study RECIPE --change "L2: regularize.l2=1e-2" \\
        --change "stop early: eval.patience=2 eval.metric=loss" --seeds 3

The first runs all combinations, or a random sample of them; the second the recipe as it is and with each change alone.
Every run is one of `engine.train`, in a folder of its own below --folder. The same command goes on where it was
stopped: runs that have ended stay, a begun one goes on from its last checkpoint. At the end, and whenever it stops, it
writes table.md, table.csv and, with matplotlib installed, a plot: mean and spread over the seeds of each setting. With
eval.train_subset_size in the recipe they show how much better a model is on what it was trained on: that it overfits.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import cli, config
from engine.config import ConfigError, did_you_mean
from engine.state import mode_of
from engine.study_report import Line, add_gains, measure, read_run, table, write
from engine.tasks import find_task

USAGE = (
    "python -m engine.study RECIPE [--vary KEY=VALUE,VALUE,... | --change 'NAME: KEY=VALUE KEY=VALUE ...']... "
    "[--seeds N] [--section.key=value ...]"
)
REPEATED = {
    "vary": "KEY=VALUE,VALUE,...: a setting and the values it takes; given several times, all combinations are run",
    "change": "'NAME: KEY=VALUE KEY=VALUE ...': settings that are changed together; given several times, the recipe is "
    "run as it is and with each change alone",
}
OPTIONS = {
    "seeds": "how many seeds each of them is run with, from run.seed on (default 1)",
    "sample": "run only so many of the combinations of --vary, drawn at random from run.seed (default: all)",
    "parallel": "how many runs at a time; each has a GPU of its own, or a share of the CPU's threads (default 1)",
    "folder": "where the runs and their table go (default: studies/NAME of the recipe)",
    "keep_weights": "true: keep best/ and last/ of runs that have ended (default: only their metrics and recipe)",
}
DEFAULTS = {"seeds": "1", "sample": "0", "parallel": "1"}
AS_IT_IS = {"change": "as it is"}
GRID = "regularize.l2=0,1e-4"  # as examples in messages
CHANGE = "'stop early: eval.patience=2 eval.metric=loss'"


@dataclass(frozen=True)
class Variant:
    """What is changed of the recipe, and what the table says of it."""

    labels: dict[str, str]  # {column: cell}
    settings: dict[str, str]
    folder: str  # its name


@dataclass
class Study:
    """What is to be run, how, and by which metric the runs are compared."""

    recipe: str
    common: dict[str, str]  # settings of all runs
    variants: list[Variant]
    seeds: list[int]
    folder: Path
    metric: str  # the one that the recipe watches, better when `mode`
    mode: str
    parallel: int = 1
    keep_weights: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def runs(self) -> list[tuple[Variant, int]]:
        """(variant, seed) of every run; all variants come before the next seed, so that a part of them compares."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def place(self, variant: Variant, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / variant.folder / f"seed{seed}"


def parse(argv: Sequence[str]) -> Study:
    """The study of a command line, every variant of it checked; ConfigError, or SystemExit(0) after --help."""
    if "--help" in argv or "-h" in argv:
        lines = [USAGE, "", *(f"  --{name}\n        {doc}" for name, doc in (REPEATED | OPTIONS).items())]
        print("\n".join([*lines, "", "Any setting of the recipe can be given too: python -m engine.train --help"]))
        raise SystemExit(0)
    repeated, rest = _take_repeated(list(argv))
    positional, given = config.split_arguments(rest)
    own = {name: given.pop(name) for name in OPTIONS if name in given}
    if len(positional) != 1:
        raise ConfigError(f"name one recipe: {USAGE}")
    recipe = positional[0]
    base = config.override(config.read_recipe(recipe), given)
    numbers = {name: _whole(name, own.get(name, default)) for name, default in DEFAULTS.items()}
    if repeated["change"] and (repeated["vary"] or numbers["sample"]):
        raise ConfigError("--change runs each change alone, --vary (and --sample) a grid: give one of them")
    variants = _changes(repeated["change"]) if repeated["change"] else _grid(repeated["vary"])
    if numbers["sample"] and numbers["sample"] < len(variants):
        rng = np.random.default_rng([base.run.seed, 0x57D1])
        chosen = sorted(rng.choice(len(variants), numbers["sample"], replace=False).tolist())
        variants = [variants[i] for i in chosen]
    for key in ("run.folder", "run.seed", "run.resume", "run.dry_run"):
        if any(key in one.settings for one in variants) or (key != "run.seed" and key in given):
            raise ConfigError(f"{key} is the study's to set; --folder and --seeds are its options")
    for one in variants:  # before any of them is run
        changed = config.override(base, one.settings)
        config.check(changed)
        if repeated["change"] and one.settings and changed == base:
            raise ConfigError(f"--change {one.labels['change']!r} changes nothing: the recipe has this already")
    seeds = [base.run.seed + i for i in range(numbers["seeds"])]
    folder = Path(own.get("folder", f"studies/{Path(recipe).stem}"))
    keep = own.get("keep_weights", "false").lower() == "true"
    given.pop("run.seed", None)
    _, metric = find_task(base.run.task, base.eval.metric)
    mode = mode_of(base.eval, metric)
    return Study(recipe, given, variants, seeds, folder, metric, mode, numbers["parallel"], keep)


def _whole(name: str, text: str) -> int:
    least = 0 if name == "sample" else 1
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--{name} = {text!r} should be a whole number from {least}")
    return int(text)


def _take_repeated(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({option: what it was given, each time}, the other arguments) of the options that may be given several times."""
    taken: dict[str, list[str]] = {name: [] for name in REPEATED}
    rest: list[str] = []
    while argv:
        argument = argv.pop(0)
        option, equals, text = argument.partition("=")
        if option.removeprefix("--") not in REPEATED or not option.startswith("--"):
            rest.append(argument)
        else:
            taken[option.removeprefix("--")].append(text if equals else argv.pop(0) if argv else "")
    return taken, rest


def _grid(texts: Iterable[str]) -> list[Variant]:
    """All combinations of the values of each "KEY=VALUE,VALUE,..."; for none, the recipe as it is."""
    varied: dict[str, list[str]] = {}
    for text in texts:
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
    combinations = [dict(zip(varied, chosen, strict=True)) for chosen in itertools.product(*varied.values())]
    names = [",".join(f"{key}={value}" for key, value in one.items()) for one in combinations]
    return [Variant(one, one, _as_folder(name or "as it is")) for one, name in zip(combinations, names, strict=True)]


def _changes(texts: Iterable[str]) -> list[Variant]:
    """The recipe as it is, and then each "NAME: KEY=VALUE KEY=VALUE ..." alone."""
    variants = [Variant(AS_IT_IS, {}, _as_folder("as it is"))]
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition(":"))
        try:
            pairs = [word.partition("=") for word in shlex.split(rest)]
        except ValueError:  # a quotation mark without the other one
            pairs = []
        settings = {key: value for key, equals, value in pairs if equals}
        if not any(map(str.isalnum, name)) or not pairs or len(settings) < len(pairs):
            raise ConfigError(f"--change {text!r} should be a name and settings, each once, as in --change {CHANGE}")
        one = Variant({"change": name}, settings, _as_folder(name))
        if one.folder in (other.folder for other in variants):
            raise ConfigError(f"--change {text!r}: another change has this name, or one too like it for a folder")
        variants.append(one)
    return variants


def _as_folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".,=+-_" else "_" for c in name)


def run(study: Study, slot: int, variant: Variant, seed: int) -> str:
    """One run to its end, unless it has ended before; "" or, in a sentence, what went wrong."""
    if study.stopping.is_set():
        return "not begun"
    folder = study.place(variant, seed)
    if read_run(folder) is not None:
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = study.common | variant.settings
    settings |= {"run.folder": str(folder), "run.seed": str(seed), "run.resume": "auto"}
    environment = dict(os.environ)
    if gpus := torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // study.parallel))
    command = [sys.executable, "-m", "engine.train", study.recipe, *(f"--{k}={v}" for k, v in settings.items())]
    printed = folder.parent / f"{folder.name}.txt"
    code = launch(study, command, environment, printed)
    if read_run(folder) is None:
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
    if (recipe := _recipe_in(folder)) is not None:
        shutil.copy(recipe, folder / "recipe.toml")
    for name in ("best", "last", "previous"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _recipe_in(folder: Path) -> Path | None:
    """The resolved recipe of a run that has ended, where it is found."""
    places = (folder / name / "recipe.toml" for name in ("best", "last"))
    return next((path for path in places if path.is_file()), None)


def check_earlier(study: Study) -> None:
    """ConfigError where a run that has ended is of other settings: a name stayed, and what it stands for did not."""
    recipe = config.read_recipe(study.recipe)
    for variant, seed in study.runs():
        folder = study.place(variant, seed)
        kept = folder / "recipe.toml"
        earlier = kept if kept.is_file() else _recipe_in(folder)
        if earlier is None or read_run(folder) is None:  # a begun one is engine.train's to compare
            continue
        ours = config.override(recipe, study.common | variant.settings | {"run.seed": str(seed)})
        if changed := config.differences(ours, config.read_recipe(str(earlier))):
            raise ConfigError(
                f"{folder} was run with other settings ({', '.join(changed)}): choose another --folder, or delete it"
            )


def summarize(study: Study) -> list[Line]:
    """A Line for every variant of which a run has ended."""
    lines = []
    for variant in study.variants:
        found = {seed: read_run(study.place(variant, seed)) for seed in study.seeds}
        runs = {seed: measure(rows, study.metric, study.mode) for seed, rows in found.items() if rows is not None}
        if runs:
            lines.append(Line(variant.labels, runs))
    if lines and lines[0].labels == AS_IT_IS:
        add_gains(lines, study.metric, study.mode)
    return lines


def main(argv: Sequence[str]) -> int:
    study = parse(argv)
    check_earlier(study)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    runs = study.runs()
    print(f"{len(runs)} runs: {len(study.variants)} variants x {len(study.seeds)} seeds, in {study.folder}")
    study.folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with (
        tqdm(total=len(runs), unit="run", disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(study.parallel) as pool,
    ):

        def one(slot: int) -> str:
            problem = run(study, slot, *runs[slot])
            bar.update()
            return problem

        try:
            problems = [problem for problem in pool.map(one, range(len(runs))) if problem]
        except KeyboardInterrupt:
            _stop(study)
    lines = summarize(study)
    paths = write(study.folder, lines, study.metric)
    print(f"\n{table(lines)}\n\n{', '.join(map(str, paths))}")
    if study.stopping.is_set():
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + 2
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run_command(main)
