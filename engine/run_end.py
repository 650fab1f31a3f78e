"""The end of a run on the screen: its evaluations in a table, the result, what it wrote, and the commands to go on."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import MEMORY
from data.notes import list_some
from engine.commands import as_started
from engine.disk import format_bytes

FILES = ("best/", "last/", "metrics.jsonl", "summary.txt", "report.html")  # of a run folder, for its reader
LOSS = "loss"
OTHERS = 2  # metrics on the screen beside the watched one and the loss


def choose_columns(watched: str, metrics: Sequence[str], details: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics that the screen shows: the watched one, a user's own, the task's first ones, and the loss.

    metrics: of the task, in its order. details: those that are not shown unless watched. own: of plugins, and what
    each of several tasks watches.
    """
    others = [name for name in metrics if name not in (watched, LOSS, *details, *own)]
    chosen = [watched, *own, *others[: max(0, OTHERS - len(own))], *([LOSS] if LOSS in metrics else [])]
    return tuple(dict.fromkeys(chosen))


def format_metrics(metrics: Mapping[str, float], columns: Sequence[str]) -> str:
    """Return the metrics of the columns, without those that this evaluation lacks; the first one with its interval.

    columns: (): all metrics.
    """
    intervals = getattr(metrics, "intervals", {})
    names = [name for name in columns if name in metrics] if columns else [*metrics]
    bounds = {name: "[{:.4f}, {:.4f}]".format(*intervals[name]) for name in names[:1] if name in intervals}
    return "  ".join(f"{name} {metrics[name]:.4f}{' ' * (name in bounds)}{bounds.get(name, '')}" for name in names)


def evaluation_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], width: int = 0) -> str:
    """Return the evaluations of a run, one a line, the best one marked, and how many metrics have no column.

    rows: {"step": ..., "best": ..., metric: value}. columns: (): all metrics. width: of the terminal; 0: of none.
    """
    if not rows:
        return "no evaluation"
    metrics = [name for name in rows[0] if name not in ("step", "best")]
    names = [name for name in columns if name in metrics] if columns else metrics
    mark = "  <- best"
    while width and len(names) > 1 and 6 + sum(2 + max(9, len(name)) for name in names) + len(mark) > width:
        names = names[:-1]
    last_best = max((i for i, row in enumerate(rows) if row["best"]), default=-1)
    widths = {name: max(9, len(name)) for name in names}
    lines = ["  step  " + "  ".join(f"{name:>{widths[name]}}" for name in names)]
    for i, row in enumerate(rows):
        values = "  ".join(f"{row.get(name, math.nan):>{widths[name]}.4f}" for name in names)
        lines.append(f"{row['step']:>6}  {values}{mark if i == last_best else ''}")
    if others := [name for name in metrics if name not in names]:
        lines.append(f"{len(others)} more in metrics.jsonl: {list_some(others, most=4)}")
    return "\n".join(lines)


def result_line(result: Mapping[str, float], columns: Sequence[str]) -> str:
    """Return the best value, its step, and the test metrics of the columns; (): all of them, and bounds."""
    tested = {name.removeprefix("test_"): value for name, value in result.items() if name.startswith("test_")}
    found = [name for name in columns if name in tested] if columns else [*tested]
    shown = [f"{name} {value:.4g}" for name, value in result.items() if not name.startswith("test_")]
    for i, name in enumerate(found):
        low, high = tested.get(f"{name}_low"), tested.get(f"{name}_high")
        bounds = "" if low is None or high is None or i or not columns else f" [{low:.4g}, {high:.4g}]"
        shown.append(f"test_{name} {tested[name]:.4g}{bounds}")
    return "  ".join(shown)


def describe_folder(folder: Path, seconds: float, start: int = 0) -> str:
    """Return what a run left in its folder, how much room that takes, and how long it took since step `start`."""
    written = [name for name in FILES if (folder / name).exists()]
    written[1:1] = sorted(f"{path.name}/" for path in folder.glob("best-*") if path.is_dir())  # of each task
    since = f" since it was resumed at step {start:,}" if start else ""
    return f"{folder}: {', '.join(written)}; {_used_bytes(folder)} on the disk, after {format_seconds(seconds)}{since}"


def _used_bytes(folder: Path) -> str:
    used = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # removed meanwhile, or not to be read
            used += path.stat().st_size if path.is_file() else 0
    return format_bytes(used)


def next_commands(folder: Path, labelled: str, plugins: Sequence[str] = ()) -> str:
    """Return the commands to go on with.

    labelled: a labelled file to evaluate on; "", or rows in memory: the user names one. plugins: those of the run; a
    checkpoint loads none by itself. Of several tasks each has a folder of its own; the first of them stands for all.
    """
    tasks = sorted(path for path in folder.glob("best-*") if path.is_dir())
    model = shlex.quote(str(tasks[0] if tasks else folder))
    test = shlex.quote(labelled) if labelled and not labelled.startswith(MEMORY) else "FILE"
    commands = [
        f"python -m engine.evaluate {model} --data.test {test}",
        f"python -m engine.predict {model} --input FILE --output predictions.jsonl",
        f"python -m engine.report {shlex.quote(str(folder))}",
    ]
    own = f" --run.plugins {shlex.quote(','.join(plugins))}" if plugins else ""
    return "\n".join(["next:", *(f"  {as_started(command)}{own}" for command in commands)])


def format_seconds(seconds: float) -> str:
    """Return a duration in words: 7.3 s, 1 min 17 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
