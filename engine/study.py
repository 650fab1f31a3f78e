"""Train a recipe under several settings, seeds and folds, and compare.

    python -m engine.study RECIPE --vary regularize.l2=0,1e-4,1e-2 --vary model.dropout.hidden=0,0.1,0.3 --seeds 3
    python -m engine.study RECIPE --change "L2: regularize.l2=1e-2" \\
        --change "stop early: eval.patience=2 eval.metric=loss" --seeds 3
    python -m engine.study RECIPE --folds 5
    python -m engine.study RECIPE --vary "optim.lr=1e-5..1e-4 log" --vary train.epochs=2..5 --trials 20 --sampler tpe

The first form runs all combinations, or a random sample of them. The second form runs the recipe unchanged, and with
each change alone. The third is cross-validation: each row of data.train is held out once. The last form searches in
ranges, at random or with Optuna. Each run is a process of `engine.train` with its own folder below --folder.

The same command continues a study that was stopped: finished runs are kept, and a run that was stopped continues from
its last checkpoint. At the end, and whenever it is stopped, a study writes

- table.md and table.csv: mean and spread over the runs of each variant; runs.json: each run with its curves,
- out_of_fold-seedN.jsonl of each variant: the predictions of all rows of data.train by the models of their folds,
- plot.png and curves.png, if matplotlib is installed.

With eval.train_subset_size in the recipe, the table also shows the gap between training and validation (overfitting).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any

from tqdm import tqdm

from data.notes import count_of
from engine import cli, study_runs
from engine.config import ConfigError
from engine.screen import terminal_width, wrap
from engine.study_options import parse
from engine.study_report import (
    RunRecord,
    VariantResult,
    add_gains,
    best_value,
    format_for_terminal,
    read_curves,
    read_run,
    summarize_run,
    write_report,
)
from engine.study_runs import NOT_STARTED, PRUNED, WAS_STOPPED, Run, Study, train_run
from engine.study_search import TpeSearch
from engine.study_variants import UNCHANGED, Variant

ALIKE = 3  # runs that fail with one sentence on the recipe or the data, before another has ended: so would the others


def run_all(study: Study) -> None:
    """Train the runs of the known variants, `workers` at a time; the problems are in study.problems.

    Where the first ALIKE runs fail alike, the others are not started.
    """
    runs, ended = study.runs(), list[str]()  # the problems of the runs that have ended, "" for none
    with (
        tqdm(total=len(runs), unit="run", disable=not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(study.workers) as pool,
    ):

        def run_one(run: Run) -> None:
            fail_alike = len(ended) >= ALIKE and len({*ended}) == 1 and ended[0].startswith("error: ")
            problem = NOT_STARTED if fail_alike else _try_run(study, run)
            if not fail_alike:
                ended.append(problem.removeprefix(f"{study.run_folder(run)}: "))
            _note(study, run, problem)
            bar.update()

        list(pool.map(run_one, runs))


def _try_run(study: Study, run: Run, should_prune: Callable[[dict[str, Any]], bool] | None = None) -> str:
    try:
        return train_run(study, run, should_prune)
    except OSError as error:
        return f"{study.run_folder(run)}: {error.strerror} ({error.filename})"


def _note(study: Study, run: Run, problem: str) -> None:
    if problem:
        study.problems[run.variant.folder_name, run.name] = problem


def run_search(study: Study, search: TpeSearch) -> None:
    """Train the trials that Optuna suggests, `workers` at a time."""
    with tqdm(total=study.trials, unit="trial", disable=not sys.stderr.isatty()) as bar:

        def run_trials(_: int) -> None:
            while not study.stopping.is_set() and (begun := search.next_trial()):
                _run_trial(study, search, *begun)
                bar.update()

        with ThreadPoolExecutor(study.workers) as pool:
            list(pool.map(run_trials, range(study.workers)))


def _run_trial(study: Study, search: TpeSearch, number: int, variant: Variant) -> None:
    """Train the runs of one trial. If one fails, the trial has no result, and the next study begins it again."""
    runs, values = study.runs_of(variant), list[float]()
    is_pruned = study.prunes and search.was_to_prune(number)

    def should_prune(evaluation: dict[str, Any]) -> bool:
        value = evaluation["evaluation"].get(study.metric)
        return value is not None and search.report(number, value, evaluation["step"])

    watches_steps = study.prunes and len(runs) == 1
    for run in () if is_pruned else runs:
        problem = _try_run(study, run, should_prune if watches_steps else None)
        if problem:
            _note(study, run, problem)
            return
        rows = read_run(study.run_folder(run))
        if rows is None:
            is_pruned = True
            break
        values.append(best_value(rows, study.metric))
        if study.prunes and len(runs) > 1 and search.report(number, fmean(values), len(values)) and run != runs[-1]:
            is_pruned = True
            break
    search.end(number, fmean(values) if values else math.nan, is_pruned)


def collect_results(study: Study) -> list[VariantResult]:
    """Return the result of every variant with a finished run; of a search, of every trial that was not pruned."""
    results = []
    for variant in study.variants:
        logs = {run.name: read_run(study.run_folder(run)) for run in study.runs_of(variant)}
        runs = {name: summarize_run(log, study.metric, study.mode) for name, log in logs.items() if log is not None}
        if runs:
            results.append(VariantResult(variant.labels, runs))
    if results and results[0].labels == UNCHANGED:
        add_gains(results, study.metric, study.mode)
    return results


def collect_records(study: Study) -> list[RunRecord]:
    """Return a record of every run that has begun, with its curves."""
    records = []
    for variant in study.variants:
        title = VariantResult(variant.labels, {}).title()
        for run in study.runs_of(variant):
            folder = study.run_folder(run)
            problem = study.problems.get((variant.folder_name, run.name), "")
            log, (evaluations, losses) = read_run(folder), read_curves(folder)
            has_failed = bool(problem) and not problem.endswith((NOT_STARTED, WAS_STOPPED))
            state = "pruned" if (folder / PRUNED).is_file() else "failed" if has_failed else "unfinished"
            state = "finished" if log is not None else state
            best = summarize_run(log, study.metric, study.mode) if log is not None else None
            if folder.exists() or has_failed:
                settings = study.settings(run)
                records.append(
                    RunRecord(title, run.name, state, str(folder), settings, problem, best, evaluations, losses)
                )
    return records


def report(study: Study) -> None:
    """Write and print the table of a study, its plots, and what its folds have predicted."""
    results, records = collect_results(study), collect_records(study)
    try:
        paths = [*write_report(study.folder, results, records), *study_runs.join_folds(study)]
        if results and importlib.util.find_spec("matplotlib") is not None:
            from engine.study_plots import plot, plot_curves

            plot(results, study.metric, study.folder / "plot.png")
            paths.append(study.folder / "plot.png")
            if curves := [record for record in records if record.evaluations]:
                plot_curves(curves, study.metric, study.folder / "curves.png")
                paths.append(study.folder / "curves.png")
    except OSError as error:
        raise ConfigError(f"--folder {str(study.folder)!r} cannot be written: {error.strerror}") from None
    width = terminal_width()
    print(f"\n{format_for_terminal(results, study.metric, width)}\n", flush=True)
    if study.trials:
        print(f"{describe_best(study)}\n")
    pruned = [record for record in records if record.state == "pruned"]
    for record in pruned:
        last: dict[str, Any] = record.evaluations[-1] if record.evaluations else {"step": 0, "evaluation": {}}
        value = last["evaluation"].get(study.metric, math.nan)
        print(f"pruned after step {last['step']}, {study.metric} {value:.4f}: {record.title} ({record.folder})")
    written = ", ".join(str(path.relative_to(study.folder)) for path in paths)
    print(wrap(f"{study.folder}: {written}", width), flush=True)
    for problem in study.problems.values():
        if not problem.endswith((NOT_STARTED, WAS_STOPPED)):
            print(problem, file=sys.stderr)
    left = [*study.problems.values()].count(NOT_STARTED)
    if left and not study.stopping.is_set():
        print(f"{left} other runs were not started, since the first {ALIKE} failed alike", file=sys.stderr)


def describe_best(study: Study) -> str:
    """Return a line with the best trial by the mean of its runs, and its settings for a command line."""
    means = {}
    for variant in study.variants:
        logs = [read_run(study.run_folder(run)) for run in study.runs_of(variant)]
        values = [best_value(log, study.metric) for log in logs if log is not None]
        if len(values) == len(logs) and not math.isnan(fmean(values)):
            means[variant.folder_name] = fmean(values), variant
    if not means:
        return "no trial has ended"
    mean, variant = (max if study.mode == "max" else min)(means.values(), key=lambda found: found[0])
    settings = " ".join(f"--{key}={value}" for key, value in variant.settings.items())
    return f"best: {variant.folder_name}, {study.metric} {mean:.4f}: {settings}"


def main(argv: Sequence[str]) -> int:
    """Run the study that a command line describes; return the exit code.

    0: all runs have ended; 1: some failed, each with a sentence; 128 + n: stopped by signal n. Errors of the user's
    are raised, for which cli.run_command has the code 2.
    """
    study, space = parse(argv)
    study_runs.check_finished_runs(study)
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        seed = study.seeds[0]
        search = None if space is None else TpeSearch(study.folder, space, seed, study.trials, study.mode)
    except OSError as error:
        raise ConfigError(f"--folder {str(study.folder)!r} cannot be written: {error.strerror}") from None
    count, what = (study.trials, "trial") if search else (len(study.variants), "variant")
    folds = f" x {study.folds} folds" if study.folds else ""
    factors = f"{count_of(count, what)} x {count_of(len(study.seeds), 'seed')}{folds}"
    runs = count * len(study.seeds) * max(study.folds, 1)
    print(f"{count_of(runs, 'run')}: {factors}, in {study.folder}", flush=True)
    print("".join(f"  {note}\n" for note in study.notes), end="", flush=True)
    with study_runs.stopped_by_signals(study):
        if search is None:
            run_all(study)
        else:
            run_search(study, search)
            study.variants = [variant for _, variant, _ in search.settings_of_all()]
    report(study)
    if study.stopping.is_set():
        print("stopped; the same command continues the study", file=sys.stderr)
        return 128 + study.signal
    return 1 if study.problems else 0


if __name__ == "__main__":
    cli.run_command(main)
