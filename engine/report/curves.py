"""The charts of metrics.jsonl: the loss, every metric, the learning rate, gradient norms, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence

from engine.report.charts import Line, legend, line_chart, smooth
from engine.report.runs import Point, Run, curve

NUMBERS_OF_STEPS = {  # key of a training line: (title, unit)
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "samples_per_second": ("Throughput", "examples per second"),
    "tokens_per_second": ("Throughput", "tokens per second"),
    "peak_memory_mb": ("Peak memory", "MB"),
    "data_wait_seconds": ("Waiting for data", "seconds since the line before"),
}
NOT_SHOWN = {"step", "loss", *NUMBERS_OF_STEPS}
SMOOTHED = 20  # the average goes over about one in 20 of the lines
FEWEST = 20  # lines, with which the loss is smoothed
MOST_METRICS = 3  # beside the loss, of those that a run prints; the others are behind a click


def main_charts(runs: Sequence[Run]) -> list[str]:
    """Return the figures of the loss, the metrics that the runs print, the gaps and the numbers of the steps."""
    figures = [_loss_chart(runs), *(_metric_chart(runs, name) for name in _main_metrics(runs))]
    figures += [_gap_chart(runs, name) for name in dict.fromkeys(("loss", *[run.watched for run in runs]))]
    for key, (title, unit) in NUMBERS_OF_STEPS.items():
        lines = [_line(run, runs, curve(run.training, key)) for run in runs]
        highest = max((y for line in lines for _, y in line.points), default=0.0)
        y_range = (0.0, 1.05 * highest) if key == "lr" and highest else None  # it ends near 0 by design: no log axis
        figures.append(line_chart(title, lines, y_label=unit, y_range=y_range, from_zero=True))
    others = dict.fromkeys(key for run in runs for row in run.training for key in row if key not in NOT_SHOWN)
    for key in others:
        figures.append(line_chart(key, [_line(run, runs, curve(run.training, key)) for run in runs]))
    return [figure for figure in figures if figure]


def other_charts(runs: Sequence[Run]) -> list[str]:
    """Return the figures of the other metrics."""
    shown = {"loss", *_main_metrics(runs)}
    names = dict.fromkeys(name for run in runs for name in run.metric_names() if name not in shown)
    return [figure for name in names if (figure := _metric_chart(runs, name))]


def _main_metrics(runs: Sequence[Run]) -> list[str]:
    """Return the metrics that the runs watch, and a few of the others, those first that a run prints."""
    watched = list(dict.fromkeys(run.watched for run in runs if run.watched != "loss"))
    names = dict.fromkeys(name for run in runs for name in run.metric_names() if name not in (*watched, "loss"))
    details = {name for run in runs for name in run.details}
    others = sorted(names, key=lambda name: name in details)
    return [*watched, *others[: max(0, MOST_METRICS - len(watched))]]


def _named(run: Run, runs: Sequence[Run], what: str = "") -> str:
    """Return the name of a line: of the run where there are several, and of what it shows."""
    return " ".join(filter(None, (run.name if len(runs) > 1 else "", what))) or run.name


def legend_of(runs: Sequence[Run]) -> str:
    """Return the names of several runs beside their colours, which all charts have."""
    return legend([Line(run.name, [], i) for i, run in enumerate(runs)])


def _line(run: Run, runs: Sequence[Run], points: Sequence[Point], what: str = "") -> Line:
    """Return the line of a run in its colour; of several runs legend_of has the names, once."""
    return Line(_named(run, runs, what), points, runs.index(run), listed=len(runs) == 1)


def _best_marker(runs: Sequence[Run]) -> list[tuple[float, str]]:
    """Return the step of the best weights; none for several runs, whose lines would cover each other."""
    return [(float(runs[0].best["step"]), "best")] if len(runs) == 1 and runs[0].best else []


def _loss_chart(runs: Sequence[Run]) -> str:
    """Return the loss of the steps, raw and smoothed, and of the validation data."""
    lines, is_one, note = list[Line](), len(runs) == 1, ""
    for i, run in enumerate(runs):
        raw = curve(run.training, "loss")
        is_smoothed = len(raw) >= FEWEST
        if is_smoothed:
            span = max(5.0, len(raw) / SMOOTHED)
            lines += [Line("training, each line", raw, 0, "faint")] if is_one else []
            lines.append(_line(run, runs, smooth(raw, span), "training, smoothed" if is_one else ""))
            note = f"Smoothed: the moving average of about {span:.0f} lines of the log."
        else:
            lines.append(_line(run, runs, raw, "training" if is_one else ""))
        validation = curve(run.evaluations, "loss", "evaluation")
        kind = "" if is_one else "dashed"
        lines.append(Line(_named(run, runs, "validation"), validation, 1 if is_one else i, kind, listed=is_one))
    note += "" if is_one else " Dashed: validation."
    return line_chart("Loss", lines, markers=_best_marker(runs), note=note)


def _metric_chart(runs: Sequence[Run], name: str) -> str:
    """Return a metric of the validation data, with intervals, and of training examples where they were evaluated."""
    lines, is_one = list[Line](), len(runs) == 1
    has_bars = has_training = False
    for i, run in enumerate(runs):
        points = curve(run.evaluations, name, "evaluation")
        bars = _intervals(run, name, points) if is_one else []
        has_bars |= bool(bars)
        name_of_line = _named(run, runs, "validation" if is_one else "")
        lines.append(Line(name_of_line, points, 1 if is_one else i, bars=bars, listed=is_one))
        training = curve(run.evaluations, name, "training")
        has_training |= bool(training)
        lines.append(Line(_named(run, runs, "training"), training, 0 if is_one else i, "dashed", listed=is_one))
    note = "Bars: the interval of eval.confidence." if has_bars else ""
    note += "Dashed: training examples." if has_training and not is_one else ""
    watched = " (chooses the best weights)" if any(run.watched == name for run in runs) else ""
    return line_chart(f"{name}{watched}", lines, markers=_best_marker(runs), note=note)


def _intervals(run: Run, name: str, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the ends of the interval of each point; [] where not all have one."""
    ends = {row["step"]: row.get("intervals", {}).get(name) for row in run.evaluations}
    found = [ends.get(int(step)) for step, _ in points]
    return [(float(low), float(high)) for low, high in filter(None, found)] if all(found) else []


def _gap_chart(runs: Sequence[Run], name: str) -> str:
    """Return how much better a metric is on training examples than on validation; "" where it was not evaluated."""
    lines = []
    for run in runs:
        training = dict(curve(run.evaluations, name, "training"))
        validation = dict(curve(run.evaluations, name, "evaluation"))
        sign = -1 if name == "loss" or (name == run.watched and run.mode == "min") else 1
        points = [(step, sign * (training[step] - validation[step])) for step in training if step in validation]
        lines.append(_line(run, runs, points))
    title = f"Gap of {name}"
    return line_chart(title, lines, y_label="how much better on training examples", markers=_best_marker(runs))
