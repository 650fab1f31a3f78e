"""What the runs of a study came to, from their metrics.jsonl: tables and a picture, with the spread over seeds."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

EVALUATIONS = {
    "best": "At the best evaluation, by what the run itself watches",
    "last": "At the last evaluation",
}
COLOURS = {"best": "#1f6fb4", "last": "#d9541e"}
NOTE = (
    "Mean ± standard deviation over the seeds. A gap is how much better the model is on what it was trained on; "
    "a gain is on validation, over the recipe as it is with the same seed."
)
GREY = "#555555"


@dataclass(frozen=True)
class Line:
    """A variant of the recipe, and what was measured in each of its runs that have ended."""

    labels: dict[str, str]  # {column: what it says of the variant}
    runs: dict[int, dict[str, float]]  # by seed, as `measure` gives it

    def title(self) -> str:
        """The name of a change, or `key=value` of what varies, without the sections."""
        parts = (x if key == "change" else f"{key.rpartition('.')[2]}={x}" for key, x in self.labels.items())
        return ", ".join(parts) or "as it is"

    def mean(self, name: str) -> float:
        return fmean(self._values(name))

    def spread(self, name: str) -> float:
        """Standard deviation over the seeds; NaN for a single one."""
        values = self._values(name)  # by numpy: the standard library's fails on a NaN
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def _values(self, name: str) -> list[float]:
        return [one.get(name, math.nan) for one in self.runs.values()]


def read_run(folder: Path) -> list[dict[str, Any]] | None:
    """The rows of a run's metrics.jsonl; None for a run that has not ended."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    return rows if rows and "end" in rows[-1] else None


def measure(rows: Sequence[dict[str, Any]], metric: str, mode: str) -> dict[str, float]:
    """{name: value} of a run that has ended, NaN where a task has no such metric.

    Where training examples were evaluated too (eval.train_subset_size), `metric` and the loss of both, at the best and at
    the last evaluation. A gap is how much better the model is on what it was trained on, so one that overfits has a
    large one, whichever way the metric points. Otherwise the training loss is that of training itself, with its
    dropout and augmentation: the mean of the last tenth of what was logged.

    metric, mode: of the study, the same for all its runs, though one of them may watch another to stop early.
    """
    evaluations = {row["step"]: row for row in rows if "evaluation" in row}
    best = evaluations.get(int(rows[-1]["best_step"]), {"evaluation": {}})
    last = evaluations[max(evaluations)] if evaluations else best
    if "training" not in last:
        losses = [row["loss"] for row in rows if "lr" in row]
        trained = fmean(losses[-max(1, len(losses) // 10) :]) if losses else math.nan
        loss = last["evaluation"].get("loss", math.nan)
        at_best = best["evaluation"].get(metric, math.nan)
        return {f"best {metric}": at_best, "train loss": trained, "validation loss": loss, "loss gap": loss - trained}
    found = {}
    for at, row in (("best", best), ("last", last)):
        found[f"{at} step"] = row.get("step", math.nan)
        for name, better in ({metric: mode} | {"loss": "min"}).items():
            train, validation = (row.get(part, {}).get(name, math.nan) for part in ("training", "evaluation"))
            found[f"{at} train {name}"], found[f"{at} validation {name}"] = train, validation
            found[f"{at} {name} gap"] = train - validation if better == "max" else validation - train
    return found


def add_gains(lines: Sequence[Line], metric: str, mode: str) -> None:
    """Add to each run how much better `metric` is on validation than in the first line's run of the same seed.

    A seed draws the examples, so most of the spread over seeds is common to all lines; that of a gain is without it.
    """
    for line in lines[1:]:
        for seed, found in line.runs.items():
            for at, name in (("best", f"best {metric}"), *((at, f"{at} validation {metric}") for at in EVALUATIONS)):
                gain = found.get(name, math.nan) - lines[0].runs.get(seed, {}).get(name, math.nan)
                if not math.isnan(gain):
                    found[f"{at} {metric} gain"] = gain if mode == "max" else -gain


def columns(lines: Sequence[Line]) -> list[str]:
    """The names of what was measured in any run."""
    runs = [one for line in lines for one in line.runs.values()]
    names = dict.fromkeys(name for one in runs for name in one)
    return [name for name in names if any(not math.isnan(one.get(name, math.nan)) for one in runs)]


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row a variant, mean and standard deviation over the seeds."""
    if not lines:
        return "no run has ended"
    names = columns(lines)
    if not any(name.startswith("last ") for name in names):
        return _markdown(lines, {name: name for name in names})
    parts = []
    for at, title in EVALUATIONS.items():
        own = {name: name.removeprefix(f"{at} ") for name in names if name.startswith(f"{at} ")}
        parts.append(f"{title}:\n\n{_markdown(lines, own)}")
    parts.append(NOTE)
    return "\n\n".join(parts)


def _markdown(lines: Sequence[Line], names: dict[str, str]) -> str:
    """names: {what was measured: the head of its column}."""
    labels = list(lines[0].labels)
    rows = [[*labels, "runs", *names.values()], ["---"] * (len(labels) + 1 + len(names))]
    for line in lines:
        cells = [_cell(line.mean(name), line.spread(name), ".0f" if name.endswith("step") else ".3f") for name in names]
        rows.append([*line.labels.values(), str(len(line.runs)), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(mean: float, spread: float, form: str) -> str:
    shown = "" if math.isnan(spread) else f" ± {spread:{form}}"
    return "" if math.isnan(mean) else f"{mean:{form}}{shown}"


def write(folder: Path, lines: Sequence[Line], metric: str) -> list[Path]:
    """table.md, table.csv and, where matplotlib is there, plot.png in the folder of a study; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.md", folder / "table.csv"]
    paths[0].write_text(table(lines) + "\n", encoding="utf-8")
    names = columns(lines)
    with paths[1].open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        heads = [f"{name.replace(' ', '_')}_{what}" for name in names for what in ("mean", "sd")]
        writer.writerow([*(lines[0].labels if lines else []), "runs", *heads])
        for line in lines:
            numbers = [x for name in names for x in (line.mean(name), line.spread(name))]
            writer.writerow([*line.labels.values(), len(line.runs), *numbers])
    if lines and importlib.util.find_spec("matplotlib") is not None:
        paths.append(folder / "plot.png")
        plot(lines, metric, paths[-1])
    return paths


@dataclass(frozen=True)
class Series:
    """One mark a variant, or two and the gap between them: the names of what was measured."""

    colour: str
    train: str
    validation: str


def _panels(names: Sequence[str], metric: str) -> dict[str, list[Series]]:
    """{title: its series}, of what was measured."""
    if any(name.startswith("last ") for name in names):
        panels = {
            what: [Series(colour, f"{at} train {what}", f"{at} validation {what}") for at, colour in COLOURS.items()]
            for what in dict.fromkeys((metric, "loss"))
        }
    else:
        panels = {f"best {metric}": [Series(COLOURS["best"], "", f"best {metric}")]}
        panels["loss at the end"] = [Series(COLOURS["last"], "train loss", "validation loss")]
    return {title: series for title, series in panels.items() if any(s.validation in names for s in series)}


def plot(lines: Sequence[Line], metric: str, path: Path) -> None:
    """A row a variant: hollow on training examples, filled on validation, and the gap between; bars are the spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(columns(lines), metric)
    height = 1.3 + 0.45 * len(lines)
    figure, grid = pyplot.subplots(1, len(panels), figsize=(9, height), sharey=True, squeeze=False)
    for axes, (title, series) in zip(grid[0], panels.items(), strict=True):
        for place, one in enumerate(series):
            _draw(axes, lines, one, shift=0.26 * (place - (len(series) - 1) / 2))
        axes.set_title(title, fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    labels = [
        ", ".join(x if k == "change" else f"{k.rpartition('.')[2]}={x}" for k, x in line.labels.items())
        for line in lines
    ]
    grid[0][0].set_yticks(range(len(lines)), [textwrap.fill(x, 26) or "as it is" for x in labels], fontsize=9)
    grid[0][0].set_ylim(len(lines) - 0.5, -0.5)
    both = any(len(series) > 1 for series in panels.values())
    figure.legend(handles=_legend(pyplot, both), loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axes: Any, lines: Sequence[Line], series: Series, shift: float) -> None:
    """A series' marks, `shift` rows below the middle of their rows; dotted, the first line's validation, to compare."""
    colour = series.colour
    axes.axvline(lines[0].mean(series.validation), color=colour, linestyle=":", linewidth=1, alpha=0.7, zorder=0)
    for row, line in enumerate(lines):
        ends = [line.mean(name) for name in (series.train, series.validation)]
        axes.plot(ends, [row + shift] * 2, color=colour, linewidth=3, alpha=0.25, solid_capstyle="butt", zorder=1)
        for name, filling in ((series.train, "white"), (series.validation, colour)):
            spread = line.spread(name)
            axes.errorbar(
                line.mean(name),
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
    """both: the best and the last evaluation are shown, each in its colour."""
    marks = [("training", "white"), ("validation", GREY)]
    handles = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=GREY, markerfacecolor=filling, label=label)
        for label, filling in marks
    ]
    if both:
        handles += [pyplot.Line2D([], [], color=x, linewidth=3, label=f"{at} evaluation") for at, x in COLOURS.items()]
    return [*handles, pyplot.Line2D([], [], color=GREY, linestyle=":", label="validation of the first row")]
