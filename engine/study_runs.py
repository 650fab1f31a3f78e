"""The runs of a study: each is a process of engine.train with a folder, and a GPU or a share of the CPU, of its own."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.workers import STOP_SIGNALS, stop_signals
from data.writing import to_json, write_text
from engine import config, heartbeat
from engine.config import ConfigError
from engine.config.schema import toml_value
from engine.study_link import Link
from engine.study_report import read_run
from engine.study_variants import Variant

NOT_STARTED, WAS_STOPPED = "not started", ": stopped"
STOPPED = {128 + number for number in STOP_SIGNALS} | {-number for number in STOP_SIGNALS}  # exit codes of runs
HELD_OUT = "held_out.jsonl"  # in a run's folder: predictions of the rows of its fold
PRUNED = "pruned.json"  # in a run's folder: the evaluation after which it was pruned


class Run(NamedTuple):
    """One run of a study. fold: from 1; 0: the study has none."""

    variant: Variant
    seed: int
    fold: int = 0

    @property
    def name(self) -> str:
        """The name of the run beside those of the same variant."""
        return f"seed{self.seed}-fold{self.fold}" if self.fold else f"seed{self.seed}"


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
    folds: int = 0
    workers: int = 1
    keep_weights: bool = False
    trials: int = 0
    prunes: bool = False
    plugins: tuple[str, ...] = ()
    uses_gpus: bool = True
    notes: list[str] = field(default_factory=list)  # to be printed first
    problems: dict[tuple[str, str], str] = field(default_factory=dict)  # {(variant, run): what went wrong}
    signal: int = 0  # that stopped the study, or one of its runs
    stopping: threading.Event = field(default_factory=threading.Event)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    slots: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)  # the workers that are free

    def __post_init__(self) -> None:
        for slot in range(self.workers):
            self.slots.put(slot)

    def runs_of(self, variant: Variant) -> list[Run]:
        """Return the runs of a variant."""
        folds = range(1, self.folds + 1) if self.folds else (0,)
        return [Run(variant, seed, fold) for seed in self.seeds for fold in folds]

    def runs(self) -> list[Run]:
        """Return every run, those of the first seed and fold first, so that a stopped study compares all variants."""
        by_variant = [self.runs_of(variant) for variant in self.variants]
        return [run for runs in zip(*by_variant, strict=True) for run in runs]

    def run_folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folder / run.variant.folder_name / run.name

    def settings(self, run: Run) -> dict[str, str]:
        """Return the settings of a run that differ from the recipe's."""
        settings = self.common | run.variant.settings | {"run.seed": str(run.seed)}
        return settings | ({"data.fold": f"{run.fold}/{self.folds}"} if run.fold else {})


def train_run(study: Study, run: Run, should_prune: Callable[[dict[str, Any]], bool] | None = None) -> str:
    """Train one run to its end, unless it has ended before; return "", or a sentence that says what went wrong.

    should_prune(evaluation): whether to stop the run after it. A run that was stopped so has a file PRUNED.
    """
    if study.stopping.is_set():
        return NOT_STARTED
    folder = study.run_folder(run)
    if read_run(folder) is None and not (folder / PRUNED).is_file():
        slot = study.slots.get()
        try:
            problem = _train(study, run, slot, should_prune)
        finally:
            study.slots.put(slot)
        if problem:
            return problem
    problem = _predict_fold(study, run) if run.fold and not (folder / PRUNED).is_file() else ""
    if not study.keep_weights and not problem:
        _delete_weights(folder)
    return problem


def _train(study: Study, run: Run, slot: int, should_prune: Callable[[dict[str, Any]], bool] | None) -> str:
    folder = study.run_folder(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = study.settings(run) | {"run.folder": str(folder), "run.resume": "auto"}
    command = [sys.executable, "-m", "engine.train", study.recipe, *(f"--{k}={v}" for k, v in settings.items())]
    output = folder.parent / f"{folder.name}.txt"
    last: dict[str, Any] = {}

    def decide(evaluation: dict[str, Any]) -> bool:
        last.update(evaluation)
        return should_prune is not None and should_prune(evaluation)

    link = Link(decide) if should_prune is not None else None
    code = launch(study, command, environment_of(study, slot), output, link)
    if read_run(folder) is not None:
        return ""
    if link is not None and link.has_pruned and code in STOPPED and not study.stopping.is_set():
        write_text(folder / PRUNED, [to_json(last), "\n"])
        return ""
    if code in STOPPED:
        study.signal = study.signal or abs(code) % 128
        study.stopping.set()
        return f"{folder}{WAS_STOPPED}"
    return f"{folder}: {explain_failure(code, output.read_text(encoding='utf-8', errors='replace'))}"


def _predict_fold(study: Study, run: Run) -> str:
    """Predict the rows of the run's fold, unless that was done; return "" or a sentence that says what went wrong."""
    folder = study.run_folder(run)
    if (folder / HELD_OUT).is_file() or not (folder / "best").is_dir():
        return ""
    command = [sys.executable, "-m", "engine.held_out", str(folder), f"--output={folder / HELD_OUT}"]
    command += [f"--run.plugins={toml_value(study.plugins)}"] if study.plugins else []
    output = folder.parent / f"{folder.name}-held-out.txt"
    slot = study.slots.get()
    try:
        code = launch(study, command, environment_of(study, slot), output)
    finally:
        study.slots.put(slot)
    if code in STOPPED:
        study.signal = study.signal or abs(code) % 128
        study.stopping.set()
        return f"{folder}{WAS_STOPPED}"
    text = output.read_text(encoding="utf-8", errors="replace")
    return f"{folder}: its fold was not predicted: {explain_failure(code, text)}" if code else ""


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def environment_of(study: Study, slot: int) -> dict[str, str]:
    """Return the environment of a run of worker `slot`: with one GPU of those there are, else a share of the CPU."""
    environment = dict(os.environ) | {heartbeat.PARENT: str(os.getpid())}
    gpus = visible_gpus() if study.uses_gpus else []
    if gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share, given = max(1, cores // study.workers), os.environ.get("OMP_NUM_THREADS", "")
    return environment | {"OMP_NUM_THREADS": str(min(share, int(given)) if given.isdecimal() else share)}


def explain_failure(code: int, text: str) -> str:
    """Return the error that a run printed last, or the last line of its traceback."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; the same command continues it"
    lines = text.strip().splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error")]
    shown = lines[errors[-1] :] if errors else lines[-1:]
    return "\n".join(shown) or f"ended with code {code}"


def launch(
    study: Study, command: list[str], environment: dict[str, str], output: Path, link: Link | None = None
) -> int:
    """Run a command to its end, with its output in a file; return its exit code."""
    environment = environment | (link.environment if link else {})
    with output.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=link.descriptors if link else (),
        )
        if link is not None:
            link.serve()
        study.children.append(child)
        if study.stopping.is_set():  # since the last look, and the signal may have missed this run
            child.terminate()
        return child.wait()


@contextmanager
def stopped_by_signals(study: Study) -> Iterator[None]:
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
    """Delete the checkpoints of a run that has ended to save disk space; keep its recipe beside its metrics."""
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
    """Raise ConfigError if a run that has ended had other settings: the variant kept its name but was changed."""
    recipe = config.read_recipe(study.recipe)
    for run in study.runs():
        folder = study.run_folder(run)
        copied = folder / "recipe.toml"  # by _delete_weights
        earlier = copied if copied.is_file() else _find_recipe(folder)
        has_ended = read_run(folder) is not None or (folder / PRUNED).is_file()
        if earlier is None or not has_ended:  # engine.train compares the settings of an unfinished run
            continue
        wanted = config.override(recipe, study.settings(run))
        if changed := config.differences(wanted, config.read_recipe(str(earlier))):
            raise ConfigError(
                f"{folder} was run with other settings ({', '.join(changed)}): choose another --folder, or delete it"
            )


def join_folds(study: Study) -> list[Path]:
    """Write the predictions of all folds of a variant and a seed to one file, in the order of data.train.

    Return the files; where a fold is missing, there is none.
    """
    written = []
    for variant in study.variants if study.folds else ():
        for seed in study.seeds:
            files = [study.run_folder(Run(variant, seed, fold)) / HELD_OUT for fold in range(1, study.folds + 1)]
            with suppress(FileNotFoundError):
                texts = [file.read_text(encoding="utf-8").split("\n") for file in files]
                lines = [json.loads(line) for of_file in texts for line in of_file if line]
                lines.sort(key=lambda line: line["row"])
                path = study.folder / variant.folder_name / f"out_of_fold-seed{seed}.jsonl"
                rows = ({key: value for key, value in line.items() if key != "row"} for line in lines)
                write_text(path, (to_json(row, ensure_ascii=False) + "\n" for row in rows))
                written.append(path)
    return written
