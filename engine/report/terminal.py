"""The table of runs for the terminal, which drops columns where the terminal is too narrow for them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from data.notes import count_of
from engine.report.runs import Paired, Run, pair_by_seed

SHORTEST_NAME = 12


def columns_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return {heading: a cell for each run}, the most important columns first."""
    watched = list(dict.fromkeys(run.watched for run in runs if run.watched))
    metrics = list(dict.fromkeys(name for run in runs for name in run.metric_names()))
    metrics.sort(key=lambda name: name not in watched)
    tests = list(dict.fromkeys(name for run in runs for name in run.test_metrics()))
    columns = {"best step": [str(run.best["step"]) if run.best else "-" for run in runs]}
    columns |= {name: [shown(run.best.get("evaluation", {}).get(name)) for run in runs] for name in metrics[:1]}
    columns |= {f"test {name}": [shown(run.test_metrics().get(name)) for run in runs] for name in tests[:1]}
    columns["steps"] = [f"{run.last_step:,}" + ("" if run.end else " *") for run in runs]
    columns["train loss"] = [shown(run.training[-1]["loss"] if run.training else None) for run in runs]
    columns["seed"] = ["-" if run.seed is None else str(run.seed) for run in runs]
    columns |= {name: [shown(run.best.get("evaluation", {}).get(name)) for run in runs] for name in metrics[1:]}
    columns |= {f"test {name}": [shown(run.test_metrics().get(name)) for run in runs] for name in tests[1:]}
    return {heading: cells for heading, cells in columns.items() if any(cell != "-" for cell in cells)}


def shown(value: object) -> str:
    """Return a number with four digits; - for none."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4g}" if is_number else "-"


def format_table(runs: Sequence[Run], width: int) -> str:
    """Return a row for each run, of at most `width` characters, and below it how recipes differ over equal seeds."""
    columns = columns_of(runs)
    longest = max(len(run.name) for run in runs)
    first = max(SHORTEST_NAME, min(longest, width // 3))
    lines = [f"{'run':<{first}}", *(f"{_shorten(run.name, first):<{first}}" for run in runs)]
    used, dropped = first, 0
    for heading, cells in columns.items():
        size = max(map(len, (heading, *cells)))
        if dropped or used + 2 + size > width:
            dropped += 1
            continue
        used += 2 + size
        lines = [f"{line}  {cell:>{size}}" for line, cell in zip(lines, (heading, *cells), strict=True)]
    if any(not run.end for run in runs):
        lines.append("* has not ended")
    if dropped:
        lines.append(f"{count_of(dropped, 'more column')} in the page")
    pairs = [describe_pair(pair, runs[0].watched) for pair in pair_by_seed(runs, runs[0].watched)]
    return "\n".join([*lines, *(textwrap.fill(pair, width, subsequent_indent="  ") for pair in pairs)])


def describe_pair(pair: Paired, metric: str) -> str:
    """Return how much better or worse a recipe is than the first one, over the seeds that both have."""
    deviation = "" if math.isnan(pair.spread) else f" ± {pair.spread:.4f}"
    seeds = count_of(len(pair.differences), "equal seed")
    if not round(pair.mean, 4):
        return f"{pair.title}: {metric} equal{deviation} to the first recipe, {seeds}"
    direction = "worse" if pair.mean < 0 else "better"
    return f"{pair.title}: {metric} {direction} by {abs(pair.mean):.4f}{deviation} than the first recipe, {seeds}"


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
