"""The results of a study, from the metrics.jsonl of its runs: a table and a plot of means and spreads over seeds."""

from __future__ import annotations

import csv
import importlib.util
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from data.writing import replace_file, write_text
from engine.log import read_rows

EVALUATIONS = {
    "best": "At the best evaluation, by the run's own metric",
    "last": "At the last evaluation",
}
COLOURS = {"best": "#1f6fb4", "last": "#d9541e"}
NOTE = (
    "Mean ± standard deviation over the seeds. A gap is how much better the model is on training examples than on "
    "validation. A gain is how much better a change is on validation than the unchanged recipe with the same seed."
)
GREY = "#555555"


@dataclass(frozen=True)
class VariantResult:
    """A variant of the recipe, and the numbers of each of its finished runs."""

    labels: dict[str, str]  # {column: cell}
    runs: dict[int, dict[str, float]]  # {seed: the run's summarize_run}

    def title(self) -> str:
        """Return the name of a change, or `key=value` of each varied setting, without its section."""
        labels = (x if key == "change" else f"{key.rpartition('.')[2]}={x}" for key, x in self.labels.items())
        return ", ".join(labels) or "as it is"

    def mean(self, name: str) -> float:
        """Return the mean over the seeds; NaN if a run has no such number."""
        return fmean(self._values(name))

    def spread(self, name: str) -> float:
        """Return the standard deviation over the seeds; NaN for a single seed."""
        values = self._values(name)  # numpy.std, since statistics.stdev fails on a NaN
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def _values(self, name: str) -> list[float]:
        return [run.get(name, math.nan) for run in self.runs.values()]


def read_run(folder: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a run's metrics.jsonl; None for a run that has not ended."""
    try:
        rows = read_rows(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return None
    return rows if rows and "end" in rows[-1] else None


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
    """Return a Markdown table with a row for each variant: mean and standard deviation over the seeds."""
    if not results:
        return "no run has ended"
    names = columns(results)
    if not any(name.startswith("last ") for name in names):
        return _format_columns(results, {name: name for name in names})
    tables = []
    for prefix, title in EVALUATIONS.items():
        own = {name: name.removeprefix(f"{prefix} ") for name in names if name.startswith(f"{prefix} ")}
        tables.append(f"{title}:\n\n{_format_columns(results, own)}")
    return "\n\n".join([*tables, NOTE])


def _format_columns(results: Sequence[VariantResult], headings: dict[str, str]) -> str:
    """Return one Markdown table. headings: {name of a number: heading of its column}."""
    labels = list(results[0].labels)
    rows = [[*labels, "runs", *headings.values()], ["---"] * (len(labels) + 1 + len(headings))]
    for result in results:
        cells = [
            _cell(result.mean(name), result.spread(name), ".0f" if name.endswith("step") else ".3f")
            for name in headings
        ]
        rows.append([*result.labels.values(), str(len(result.runs)), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(mean: float, spread: float, form: str) -> str:
    deviation = "" if math.isnan(spread) else f" ± {spread:{form}}"
    return "" if math.isnan(mean) else f"{mean:{form}}{deviation}"


def write_report(folder: Path, results: Sequence[VariantResult], metric: str) -> list[Path]:
    """Write table.md, table.csv and, if matplotlib is installed, plot.png to a study's folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, spreadsheet = paths = [folder / "table.md", folder / "table.csv"]
    write_text(markdown, [format_table(results), "\n"])
    names = columns(results)
    with replace_file(spreadsheet) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        headings = [f"{name.replace(' ', '_')}_{statistic}" for name in names for statistic in ("mean", "sd")]
        writer.writerow([*(results[0].labels if results else []), "runs", *headings])
        for result in results:
            numbers = [x for name in names for x in (result.mean(name), result.spread(name))]
            writer.writerow([*result.labels.values(), len(result.runs), *numbers])
    if results and importlib.util.find_spec("matplotlib") is not None:
        paths.append(folder / "plot.png")
        plot(results, metric, paths[-1])
    return paths


@dataclass(frozen=True)
class Series:
    """The two numbers of a variant that are plotted together: on training examples ("": none) and on validation."""

    colour: str
    train: str
    validation: str


def _panels(names: Sequence[str], metric: str) -> dict[str, list[Series]]:
    """Return {title of a panel: its series}, for the numbers that the runs have."""
    if any(name.startswith("last ") for name in names):
        panels = {
            measured: [
                Series(colour, f"{prefix} train {measured}", f"{prefix} validation {measured}")
                for prefix, colour in COLOURS.items()
            ]
            for measured in dict.fromkeys((metric, "loss"))
        }
    else:
        panels = {f"best {metric}": [Series(COLOURS["best"], "", f"best {metric}")]}
        panels["loss at the end"] = [Series(COLOURS["last"], "train loss", "validation loss")]
    return {title: series for title, series in panels.items() if any(s.validation in names for s in series)}


def plot(results: Sequence[VariantResult], metric: str, path: Path) -> None:
    """Plot a row for each variant: hollow marks for training, filled marks for validation, bars for the spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(columns(results), metric)
    height = 1.3 + 0.45 * len(results)
    figure, grid = pyplot.subplots(1, len(panels), figsize=(9, height), sharey=True, squeeze=False)
    for axes, (title, series) in zip(grid[0], panels.items(), strict=True):
        for index, one in enumerate(series):
            _plot_series(axes, results, one, shift=0.26 * (index - (len(series) - 1) / 2))
        axes.set_title(title, fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    titles = [textwrap.fill(result.title(), 26) for result in results]
    grid[0][0].set_yticks(range(len(results)), titles, fontsize=9)
    grid[0][0].set_ylim(len(results) - 0.5, -0.5)
    both = any(len(series) > 1 for series in panels.values())
    figure.legend(handles=_legend(pyplot, both), loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def _plot_series(axes: Any, results: Sequence[VariantResult], series: Series, shift: float) -> None:
    """Plot the marks of a series, `shift` rows below the middle of their rows.

    A dotted line shows the first result's validation for comparison.
    """
    colour = series.colour
    axes.axvline(results[0].mean(series.validation), color=colour, linestyle=":", linewidth=1, alpha=0.7, zorder=0)
    for row, result in enumerate(results):
        ends = [result.mean(name) for name in (series.train, series.validation)]
        axes.plot(ends, [row + shift] * 2, color=colour, linewidth=3, alpha=0.25, solid_capstyle="butt", zorder=1)
        for name, filling in ((series.train, "white"), (series.validation, colour)):
            spread = result.spread(name)
            axes.errorbar(
                result.mean(name),
                row + shift,
                xerr=None if math.isnan(spread) else spread,
                fmt="o",
                markersize=5.5,
                color=colour,
                markerfacecolor=filling,
                elinewidth=1,
                capsize=2,
            )


def _legend(pyplot: Any, both: bool) -> list[Any]:
    """Return the handles of the legend. both: the best and the last evaluation are shown, each in its own colour."""
    marks = [("training", "white"), ("validation", GREY)]
    handles = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=GREY, markerfacecolor=filling, label=label)
        for label, filling in marks
    ]
    if both:
        handles += [
            pyplot.Line2D([], [], color=colour, linewidth=3, label=f"{name} evaluation")
            for name, colour in COLOURS.items()
        ]
    return [*handles, pyplot.Line2D([], [], color=GREY, linestyle=":", label="validation of the first row")]
