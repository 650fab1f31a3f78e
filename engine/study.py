"""Train a recipe under several settings and seeds, and compare: a grid of settings, or one change at a time.

    python -m engine.study RECIPE --vary regularize.l2=0,1e-4,1e-2 --vary model.dropout.hidden=0,0.1,0.3 --seeds 3
    python -m engine.study RECIPE --change "L2: regularize.l2=1e-2" \\
        --change "stop early: eval.patience=2 eval.metric=loss" --seeds 3

The first form runs all combinations, or a random sample of them. The second form runs the recipe unchanged, and with
each change alone. Each run is a process of `engine.train` with its own folder below --folder.

The same command continues a study that was stopped: finished runs are kept, and a run that was stopped continues from
its last checkpoint. At the end, and whenever it is stopped, a study writes

- table.md and table.csv: mean and spread over the seeds of each variant,
- plot.png, if matplotlib is installed.

With eval.train_subset_size in the recipe, the table also shows the gap between training and validation (overfitting).
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.random_streams import STUDY_SAMPLE
from data.workers import STOP_SIGNALS, stop_signals
from engine import cli, config, heartbeat, plugins
from engine.config import ConfigError
from engine.state import metric_direction
from engine.study_report import VariantResult, add_gains, format_table, read_run, summarize_run, write_report
from engine.multi_task import open_task

USAGE = (
    "python -m engine.study RECIPE [--vary KEY=VALUE,VALUE,... | --change 'NAME: KEY=VALUE KEY=VALUE ...']... "
    "[--seeds N] [--section.key=value ...]"
)
REPEATED = {
    "vary": "KEY=VALUE,VALUE,...: a setting and its values; if given several times, all combinations are run",
    "change": "'NAME: KEY=VALUE KEY=VALUE ...': settings that are changed together; the recipe is run unchanged, and "
    "with each change alone; may be given several times",
}
OPTIONS = {
    "seeds": "number of seeds for each variant: run.seed, run.seed + 1, ... (default 1)",
    "sample": "number of the combinations of --vary to run, chosen at random from run.seed (default: all)",
    "parallel": "number of runs at a time; each has a GPU, or a share of the CPU's threads (default 1)",
    "folder": "folder for the runs and their table (default: studies/NAME of the recipe)",
    "keep_weights": "true: keep best/ and last/ of finished runs (default: only their metrics and recipe)",
}
DEFAULTS = {"seeds": "1", "sample": "0", "parallel": "1"}
UNCHANGED = {"change": "as it is"}
GRID_EXAMPLE = "regularize.l2=0,1e-4"  # in messages
NOT_STARTED, WAS_STOPPED = "not started", ": stopped"
STOPPED = {128 + number for number in STOP_SIGNALS} | {-number for number in STOP_SIGNALS}  # exit codes of runs
CHANGE_EXAMPLE = "'stop early: eval.patience=2 eval.metric=loss'"


@dataclass(frozen=True)
class Variant:
    """A change of the recipe, and its row in the table."""

    labels: dict[str, str]  # {column: cell}
    settings: dict[str, str]
    folder_name: str


@dataclass
class Study:
    """The runs of a study, and the metric that compares them."""

    recipe: str
    common: dict[str, str]  # settings of all runs
    variants: list[Variant]
    seeds: list[int]
    folder: Path
    metric: str  # the metric that the recipe watches
    mode: str  # "max" or "min": which values of it are better
    parallel: int = 1
    keep_weights: bool = False
    signal: int = 0  # that stopped the study, or one of its runs
    stopping: threading.Event = field(default_factory=threading.Event)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def runs(self) -> list[tuple[Variant, int]]:
        """Return (variant, seed) of every run, seed by seed, so that a stopped study compares all variants."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def run_folder(self, variant: Variant, seed: int) -> Path:
        """Return the folder of a run."""
        return self.folder / variant.folder_name / f"seed{seed}"


def parse(argv: Sequence[str]) -> Study:
    """Return the study that a command line describes, with the settings of every variant checked.

    Raises ConfigError, or SystemExit(0) after printing --help.
    """
    if "--help" in argv or "-h" in argv:
        lines = [USAGE, "", *(f"  --{name}\n        {doc}" for name, doc in (REPEATED | OPTIONS).items())]
        print("\n".join([*lines, "", "Any setting of the recipe can be given too: python -m engine.train --help"]))
        raise SystemExit(0)
    repeated, rest = _take_repeated(list(argv))
    positional, given = config.split_arguments(rest)
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    if len(positional) != 1:
        raise ConfigError(f"name one recipe: {USAGE}")
    recipe = positional[0]
    base = config.override_recipe(config.read_recipe(recipe), given)
    plugins.load_plugins(base.run.plugins)
    numbers = {name: _read_integer(name, options.get(name, default)) for name, default in DEFAULTS.items()}
    if repeated["change"] and (repeated["vary"] or numbers["sample"]):
        raise ConfigError("--change runs each change alone, --vary (and --sample) a grid: give one of them")
    variants = _change_variants(repeated["change"]) if repeated["change"] else _grid_variants(repeated["vary"])
    if numbers["sample"] and numbers["sample"] < len(variants):
        rng = np.random.default_rng([base.run.seed, STUDY_SAMPLE])
        chosen = sorted(rng.choice(len(variants), numbers["sample"], replace=False).tolist())
        variants = [variants[i] for i in chosen]
    for key in ("run.folder", "run.seed", "run.resume", "run.dry_run"):
        if any(key in variant.settings for variant in variants) or (key != "run.seed" and key in given):
            raise ConfigError(f"{key} is set by the study itself; use its options --folder and --seeds")
    for variant in variants:  # before any of them is run
        changed = config.override(base, variant.settings)
        config.check(changed)
        if repeated["change"] and variant.settings and changed == base:
            raise ConfigError(
                f"--change {variant.labels['change']!r} changes no setting: the recipe has these values already"
            )
    seeds = [base.run.seed + i for i in range(numbers["seeds"])]
    folder = Path(options.get("folder", f"studies/{Path(recipe).stem}"))
    keep = options.get("keep_weights", "false").lower() == "true"
    given.pop("run.seed", None)
    _, metric = open_task(base)
    mode = metric_direction(base.eval, metric)
    return Study(recipe, given, variants, seeds, folder, metric, mode, numbers["parallel"], keep)


def _read_integer(name: str, text: str) -> int:
    smallest = 0 if name == "sample" else 1
    if not text.isdecimal() or int(text) < smallest:
        raise ConfigError(f"--{name} = {text!r} should be a whole number from {smallest}")
    return int(text)


def _take_repeated(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split off the options that may be given several times; return ({option: its values}, the other arguments)."""
    values: dict[str, list[str]] = {name: [] for name in REPEATED}
    rest: list[str] = []
    while argv:
        argument = argv.pop(0)
        option, equals, text = argument.partition("=")
        if option.removeprefix("--") not in REPEATED or not option.startswith("--"):
            rest.append(argument)
        elif not equals:
            values[option.removeprefix("--")].append(argv.pop(0) if argv else "")
        else:
            values[option.removeprefix("--")].append(text)
    return values, rest


def _grid_variants(texts: Iterable[str]) -> list[Variant]:
    """Return all combinations of the values of each "KEY=VALUE,VALUE,..."; without any, the recipe unchanged."""
    varied: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key in varied:
            raise ConfigError(f"--vary {key} is given twice: name all its values in one")
        varied[key] = [value.strip() for value in values.split(",")]
        if len(set(varied[key])) < len(varied[key]) or varied[key] == [""]:
            raise ConfigError(f"--vary {text!r} should name each value once, as in --vary {GRID_EXAMPLE}")
    variants = []
    for chosen in itertools.product(*varied.values()):
        settings = dict(zip(varied, chosen, strict=True))
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        variants.append(Variant(settings, settings, _as_folder_name(name or UNCHANGED["change"])))
    return variants


def _change_variants(texts: Iterable[str]) -> list[Variant]:
    """Return the recipe unchanged, and then each "NAME: KEY=VALUE KEY=VALUE ..." alone."""
    variants = [Variant(UNCHANGED, {}, _as_folder_name(UNCHANGED["change"]))]
    for text in texts:
        name, _, rest = map(str.strip, text.partition(":"))
        try:
            pairs = [word.partition("=") for word in shlex.split(rest)]
        except ValueError:  # an unclosed quotation mark
            pairs = []
        settings = {key: value for key, equals, value in pairs if equals}
        if not any(map(str.isalnum, name)) or not pairs or len(settings) < len(pairs):
            raise ConfigError(
                f"--change {text!r} should be a name and settings, each once, as in --change {CHANGE_EXAMPLE}"
            )
        variant = Variant({"change": name}, settings, _as_folder_name(name))
        if variant.folder_name in (other.folder_name for other in variants):
            raise ConfigError(f"--change {text!r}: another change has this name, or one with the same folder name")
        variants.append(variant)
    return variants


def _as_folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".,=+-_" else "_" for c in name)


def run_variant(study: Study, index: int, variant: Variant, seed: int) -> str:
    """Train one run to its end, unless it has ended before; return "", or a sentence that says what went wrong.

    index: the number of the run in the study, which chooses the GPU.
    """
    if study.stopping.is_set():
        return NOT_STARTED
    folder = study.run_folder(variant, seed)
    if read_run(folder) is not None:
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = study.common | variant.settings
    settings |= {"run.folder": str(folder), "run.seed": str(seed), "run.resume": "auto"}
    environment = os.environ | {heartbeat.PARENT: str(os.getpid())}
    if gpus := torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = str(index % gpus)
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // study.parallel))
    command = [sys.executable, "-m", "engine.train", study.recipe, *(f"--{k}={v}" for k, v in settings.items())]
    output = folder.parent / f"{folder.name}.txt"
    code = launch(study, command, environment, output)
    if read_run(folder) is None:
        if code in STOPPED:
            study.signal = study.signal or abs(code) % 128
            study.stopping.set()
            return f"{folder}{WAS_STOPPED}"
        return f"{folder}: {_explain_failure(code, output.read_text(encoding='utf-8', errors='replace'))}"
    if not study.keep_weights:
        _delete_weights(folder)
    return ""


def _explain_failure(code: int, text: str) -> str:
    """Return the error that a run printed last, or the last line of its traceback."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; the same command continues it"
    lines = text.strip().splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error")]
    shown = lines[errors[-1] :] if errors else lines[-1:]
    return "\n".join(shown) or f"ended with code {code}"


def launch(study: Study, command: list[str], environment: dict[str, str], output: Path) -> int:
    """Run a command to its end, with its output in a file; return its exit code."""
    with output.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        study.children.append(child)
        if study.stopping.is_set():  # since the last look, and the signal may have missed this run
            child.terminate()
        return child.wait()


@contextmanager
def _stopped_by_signals(study: Study) -> Iterator[None]:
    """Let a signal start no more runs and stop those in progress, which save a checkpoint; a second Ctrl-C kills them.

    A terminal sends its Ctrl-C to the runs too, which take the SIGTERM from here for the same request.
    """

    def stop(number: int, frame: object) -> None:
        again = study.signal and number == signal.SIGINT
        study.signal = study.signal or number
        study.stopping.set()
        for child in study.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    handlers = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _delete_weights(folder: Path) -> None:
    """Delete the checkpoints of a finished run to save disk space; keep its recipe beside its metrics."""
    recipe = _find_recipe(folder)
    if recipe is not None:
        shutil.copy(recipe, folder / "recipe.toml")
    for name in ("best", "last", "previous"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _find_recipe(folder: Path) -> Path | None:
    """Return the resolved recipe in a run's checkpoints; None if there is none."""
    paths = (folder / name / "recipe.toml" for name in ("best", "last"))
    return next((path for path in paths if path.is_file()), None)


def check_finished_runs(study: Study) -> None:
    """Raise ConfigError if a finished run had other settings: the variant kept its name but was changed."""
    recipe = config.read_recipe(study.recipe)
    for variant, seed in study.runs():
        folder = study.run_folder(variant, seed)
        copied = folder / "recipe.toml"  # by _delete_weights
        earlier = copied if copied.is_file() else _find_recipe(folder)
        if earlier is None or read_run(folder) is None:  # engine.train compares the settings of an unfinished run
            continue
        wanted = config.override(recipe, study.common | variant.settings | {"run.seed": str(seed)})
        if changed := config.differences(wanted, config.read_recipe(str(earlier))):
            raise ConfigError(
                f"{folder} was run with other settings ({', '.join(changed)}): choose another --folder, or delete it"
            )


def collect_results(study: Study) -> list[VariantResult]:
    """Return the result of every variant with a finished run."""
    results = []
    for variant in study.variants:
        logs = {seed: read_run(study.run_folder(variant, seed)) for seed in study.seeds}
        runs = {seed: summarize_run(log, study.metric, study.mode) for seed, log in logs.items() if log is not None}
        if runs:
            results.append(VariantResult(variant.labels, runs))
    if results and results[0].labels == UNCHANGED:
        add_gains(results, study.metric, study.mode)
    return results


def main(argv: Sequence[str]) -> int:
    """Run the study that a command line describes; return the exit code.

    0: all runs have ended; 1: some failed, each with a sentence; 128 + n: stopped by signal n. Errors of the user's
    are raised, for which cli.run_command has the code 2.
    """
    study = parse(argv)
    check_finished_runs(study)
    runs = study.runs()
    print(f"{len(runs)} runs: {len(study.variants)} variants x {len(study.seeds)} seeds, in {study.folder}", flush=True)
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--folder {str(study.folder)!r} cannot be written: {error.strerror}") from None
    with (
        _stopped_by_signals(study),
        tqdm(total=len(runs), unit="run", disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(study.parallel) as pool,
    ):

        def run_one(index: int) -> str:
            try:
                problem = run_variant(study, index, *runs[index])
            except OSError as error:
                problem = f"{study.run_folder(*runs[index])}: {error.strerror} ({error.filename})"
            bar.update()
            return problem

        problems = [problem for problem in pool.map(run_one, range(len(runs))) if problem]
    results = collect_results(study)
    try:
        paths = write_report(study.folder, results, study.metric)
    except OSError as error:
        raise ConfigError(f"--folder {str(study.folder)!r} cannot be written: {error.strerror}") from None
    print(f"\n{format_table(results)}\n\n{', '.join(map(str, paths))}", flush=True)
    for problem in problems:
        if not problem.endswith((NOT_STARTED, WAS_STOPPED)):
            print(problem, file=sys.stderr)
    if study.stopping.is_set():
        print("stopped; the same command continues the study", file=sys.stderr)
        return 128 + study.signal
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run_command(main)
