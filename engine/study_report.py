"""The results of a study, from the metrics.jsonl of its runs: tables of means and spreads, and all runs as JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from data.notes import display_width
from data.writing import replace_file, to_json, write_text
from engine.log import read_rows
from engine.screen import wrap

EVALUATIONS = {
    "best": "At the best evaluation, by the run's own metric",
    "last": "At the last evaluation",
}
NOTE = (
    "Mean ± standard deviation over the runs. A gap is how much better the model is on training examples than on "
    "validation. A gain is how much better a change is on validation than the unchanged recipe with the same seed."
)
FEW_RUNS = 20  # of a variant, of which the table has each value
LONG_CELL = 9  # characters of a number that the table shortens


@dataclass(frozen=True)
class VariantResult:
    """A variant of the recipe, and the numbers of each of its finished runs."""

    labels: dict[str, str]  # {column: cell}
    runs: dict[str, dict[str, float]]  # {name of the run, its seed and fold: its summarize_run}

    def title(self) -> str:
        """Return the name of a change, or `key=value` of each varied setting, without its section."""
        labels = (
            x if key == "change" else f"{key.rpartition('.')[2]}={_shorten_number(x)}" for key, x in self.labels.items()
        )
        return ", ".join(labels) or "as it is"

    def mean(self, name: str) -> float:
        """Return the mean over the runs; NaN if a run has no such number."""
        return fmean(self._values(name))

    def spread(self, name: str) -> float:
        """Return the standard deviation over the runs; NaN for a single run."""
        values = self._values(name)  # numpy.std, since statistics.stdev fails on a NaN
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def _values(self, name: str) -> list[float]:
        return [run.get(name, math.nan) for run in self.runs.values()]


@dataclass(frozen=True)
class RunRecord:
    """A run of a study, for runs.json and the plot of the curves."""

    title: str  # of its variant
    name: str  # its seed and fold
    state: str  # finished, pruned, failed or unfinished
    folder: str
    settings: dict[str, str]
    problem: str = ""
    best: dict[str, float] | None = None  # summarize_run of a finished run
    evaluations: tuple[dict[str, Any], ...] = ()  # rows of metrics.jsonl
    losses: tuple[tuple[int, float], ...] = ()  # (step, training loss)


def read_curves(folder: Path) -> tuple[tuple[dict[str, Any], ...], tuple[tuple[int, float], ...]]:
    """Return (the evaluations of a run, its (step, training loss)) so far; nothing of a run without a log."""
    rows = []
    with suppress(OSError, ValueError):
        rows = read_rows(folder / "metrics.jsonl")
    losses = tuple((row["step"], row["loss"]) for row in rows if "lr" in row)
    return tuple(row for row in rows if "evaluation" in row), losses


def read_run(folder: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a run's metrics.jsonl; None for a run that has not ended."""
    try:
        rows = read_rows(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return None
    return rows if rows and "end" in rows[-1] else None


def best_value(rows: Sequence[dict[str, Any]], metric: str) -> float:
    """Return the metric at the best evaluation of a finished run; NaN where there is none."""
    best = [row for row in rows if "evaluation" in row and row["step"] == int(rows[-1]["best_step"])]
    return float(best[-1]["evaluation"].get(metric, math.nan)) if best else math.nan


def summarize_run(rows: Sequence[dict[str, Any]], metric: str, mode: str) -> dict[str, float]:
    """Return {name: number} of a finished run, from its metrics.jsonl; NaN where the task has no such metric.

    metric, mode: those of the study, equal for all runs; a run may watch another metric to stop early.

    - With eval.train_subset_size: `metric` and the loss on training and validation examples, at the best and at the
      last evaluation. A gap is how much better the model is on training examples, in the direction of the metric. A
      large gap shows overfitting.
    - Without it, the training loss is the mean of the last tenth of the logged losses, with dropout and augmentation.
    """
    evaluations = {row["step"]: row for row in rows if "evaluation" in row}
    best = evaluations.get(int(rows[-1]["best_step"]), {"evaluation": {}})
    last = evaluations[max(evaluations)] if evaluations else best
    if "training" not in last:
        return _without_training_subset(rows, metric, best, last)
    summary = {}
    for name, row in (("best", best), ("last", last)):
        summary[f"{name} step"] = row.get("step", math.nan)
        for measured, better in ({metric: mode} | {"loss": "min"}).items():
            train, validation = (row.get(split, {}).get(measured, math.nan) for split in ("training", "evaluation"))
            summary[f"{name} train {measured}"] = train
            summary[f"{name} validation {measured}"] = validation
            summary[f"{name} {measured} gap"] = train - validation if better == "max" else validation - train
    return summary


def _without_training_subset(
    rows: Sequence[dict[str, Any]], metric: str, best: dict[str, Any], last: dict[str, Any]
) -> dict[str, float]:
    losses = [row["loss"] for row in rows if "lr" in row]
    train_loss = fmean(losses[-max(1, len(losses) // 10) :]) if losses else math.nan
    validation_loss = last["evaluation"].get("loss", math.nan)
    return {
        f"best {metric}": best["evaluation"].get(metric, math.nan),
        "train loss": train_loss,
        "validation loss": validation_loss,
        "loss gap": validation_loss - train_loss,
    }


def add_gains(results: Sequence[VariantResult], metric: str, mode: str) -> None:
    """Add to each run how much better its validation metric is than in the first result's run of the same seed.

    A seed chooses the examples, so most of the spread over seeds is common to all variants; a gain is free of it.
    """
    names = {f"best {metric}": "best"} | {f"{name} validation {metric}": name for name in EVALUATIONS}
    for result in results[1:]:
        for seed, run in result.runs.items():
            unchanged = results[0].runs.get(seed, {})
            for measured, name in names.items():
                gain = run.get(measured, math.nan) - unchanged.get(measured, math.nan)
                if not math.isnan(gain):
                    run[f"{name} {metric} gain"] = gain if mode == "max" else -gain


def columns(results: Sequence[VariantResult]) -> list[str]:
    """Return the names of the numbers that any run has."""
    runs = [run for result in results for run in result.runs.values()]
    names = dict.fromkeys(name for run in runs for name in run)
    return [name for name in names if any(not math.isnan(run.get(name, math.nan)) for run in runs)]


def format_table(results: Sequence[VariantResult]) -> str:
    """Return a Markdown table with a row for each variant: mean and standard deviation over the runs."""
    if not results:
        return "no run has ended"
    names = columns(results)
    if not any(name.startswith("last ") for name in names):
        return _format_columns(results, {name: name for name in names}, _first(names, "best "))
    tables = []
    for prefix, title in EVALUATIONS.items():
        own = {name: name.removeprefix(f"{prefix} ") for name in names if name.startswith(f"{prefix} ")}
        tables.append(f"{title}:\n\n{_format_columns(results, own, _first(names, f'{prefix} validation '))}")
    return "\n\n".join([*tables, NOTE])


def format_for_terminal(results: Sequence[VariantResult], metric: str, width: int) -> str:
    """Return the results at the best evaluation in lines of `width` columns: as many numbers as fit, watched first.

    width: 0: of no terminal; then, and where nothing is known, it is the table in Markdown.
    """
    names = columns(results)
    first = [f"best validation {metric}", f"best {metric}", f"best {metric} gain", f"best {metric} gap"]
    ordered = [name for name in dict.fromkeys([*first, *names]) if name in names and not name.startswith("last ")]
    if not width or not ordered:
        return format_table(results)
    has_last = any(name.startswith("last ") for name in names)  # the numbers of an evaluation, rather than of the run
    titles = ["variant", *(result.title() for result in results)]
    longest = max(map(display_width, titles))
    lines = [title + " " * (longest - display_width(title)) for title in titles]
    table = {"runs": [str(len(result.runs)) for result in results]}
    for name in ordered:
        form = ".0f" if name.endswith("step") else ".3f"
        heading = name.removeprefix("best ") if has_last else name
        table[heading] = [_cell(result.mean(name), result.spread(name), form) for result in results]
    shown = []
    for heading, cells in table.items():
        size = max(map(len, (heading, *cells)))
        if display_width(lines[0]) + 2 + size <= width:
            lines = [f"{line}  {cell:>{size}}" for line, cell in zip(lines, (heading, *cells), strict=True)]
            shown.append(heading)
    notes = [f"{'at the best evaluation of each run: ' * has_last}mean ± standard deviation over the runs"]
    notes += ["gain: better than the first line with the same seed"] * any(name.endswith(" gain") for name in shown)
    notes += ["gap: better on training examples than on validation"] * any(name.endswith(" gap") for name in shown)
    return "\n".join([*lines, *(wrap(note, width) for note in [*notes, "table.md has all numbers"])])


def _first(names: Sequence[str], beginning: str) -> str:
    """Return the first name with this beginning; "" for none."""
    return next((name for name in names if name.startswith(beginning)), "")


def _format_columns(results: Sequence[VariantResult], headings: dict[str, str], each: str) -> str:
    """Return one Markdown table.

    headings: {name of a number: heading of its column}. each: the number of which a last column has that of every run.
    """
    labels = list(results[0].labels)
    rows = [[*labels, "runs", *headings.values()], ["---"] * (len(labels) + 1 + len(headings))]
    most = max(len(result.runs) for result in results)
    shows_each = bool(each) and 1 < most <= FEW_RUNS
    if shows_each:
        rows[0].append(f"{headings[each]} of each run")
        rows[1].append("---")
    for result in results:
        cells = [
            _cell(result.mean(name), result.spread(name), ".0f" if name.endswith("step") else ".3f")
            for name in headings
        ]
        values = [f"{run.get(each, math.nan):.3f}" for run in result.runs.values()] if shows_each else []
        shown = [_shorten_number(cell) for cell in result.labels.values()]
        rows.append([*shown, str(len(result.runs)), *cells, *([" ".join(values)] if shows_each else [])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shorten_number(text: str) -> str:
    """Return a long number with four digits, and any other text as it is."""
    with suppress(ValueError):
        return f"{float(text):.4g}" if len(text) > LONG_CELL else text
    return text


def _cell(mean: float, spread: float, form: str) -> str:
    deviation = "" if math.isnan(spread) else f" ± {spread:{form}}"
    return "" if math.isnan(mean) else f"{mean:{form}}{deviation}"


def write_report(folder: Path, results: Sequence[VariantResult], records: Sequence[RunRecord]) -> list[Path]:
    """Write table.md, table.csv and runs.json to a study's folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, spreadsheet, all_runs = paths = [folder / "table.md", folder / "table.csv", folder / "runs.json"]
    write_text(markdown, [format_table(results), "\n"])
    write_text(
        all_runs, ["[\n", ",\n".join(to_json(asdict(record), ensure_ascii=False) for record in records), "\n]\n"]
    )
    names = columns(results)
    with replace_file(spreadsheet) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        headings = [f"{name.replace(' ', '_')}_{statistic}" for name in names for statistic in ("mean", "sd")]
        writer.writerow([*(results[0].labels if results else []), "runs", *headings])
        for result in results:
            numbers = [x for name in names for x in (result.mean(name), result.spread(name))]
            writer.writerow([*result.labels.values(), len(result.runs), *numbers])
    return paths
