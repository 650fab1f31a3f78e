"""The plots of a study: the mean and spread of each variant, and the curve of each run. They need matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.writing import replace_file
from engine.study_report import RunRecord, VariantResult, columns

COLOURS = {"best": "#1f6fb4", "last": "#d9541e"}
GREY = "#555555"
MOST_NAMED = 10  # variants with a colour of their own among the curves


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


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_curves(records: Sequence[RunRecord], metric: str, path: Path) -> None:
    """Plot the metric of each run over its steps; thin lines are single runs, of one colour for each variant."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5))
    titles = list(dict.fromkeys(record.title for record in records))
    colours = pyplot.get_cmap("tab10").colors
    for record in records:
        place = titles.index(record.title)
        points = [(row["step"], row["evaluation"].get(metric, math.nan)) for row in record.evaluations]
        is_first = record is next(other for other in records if other.title == record.title)
        axes.plot(
            *zip(*points, strict=True),
            color=colours[place] if place < MOST_NAMED else GREY,
            linewidth=1.2 if place < MOST_NAMED else 0.5,
            linestyle=":" if record.state == "pruned" else "-",
            alpha=0.7,
            label=textwrap.shorten(record.title, 60) if is_first and place < MOST_NAMED else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"{metric} on validation")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def plot(results: Sequence[VariantResult], metric: str, path: Path) -> None:
    """Plot a row for each variant: hollow marks for training, filled marks for validation, bars for the spread.

    Small marks are the single runs.
    """
    pyplot = _pyplot()
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
            if len(result.runs) > 1 and name == series.validation:
                values = [run.get(name, math.nan) for run in result.runs.values()]
                axes.plot(values, [row + shift] * len(values), "|", color=colour, alpha=0.5, markersize=7, zorder=1)
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
