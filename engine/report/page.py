"""The page: what the runs reached, their curves, what the best weights predict, recipes and data."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from html import escape

import torch

from data.notes import count_of
from engine.report.charts import MAX_POINTS
from engine.report.curves import legend_of, main_charts, other_charts
from engine.report.mistakes import findings_html, notes_html, table_html
from engine.report.predictions import Findings
from engine.report.runs import Run, differing_settings, pair_by_seed
from engine.report.style import STYLE
from engine.report.summary_file import DATA, MODEL, STEPS
from engine.report.terminal import columns_of
from engine.report.terminal import shown as _number

Examined = Findings | str  # what was predicted, or why nothing was
OfTasks = Mapping[str, Examined]  # the same for each of several tasks


def page(runs: Sequence[Run], examined: Sequence[Examined | OfTasks]) -> str:
    """Return the page as HTML. examined: of each run what was found; a sentence where nothing was predicted."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    sections = {
        "Results": _results(runs, examined),
        "Curves": _curves(runs),
        "Predictions": _predictions(runs, examined),
    }
    sections |= {"Recipe": _recipes(runs), DATA: _paragraphs(runs, DATA), MODEL: _paragraphs(runs, MODEL)}
    sections |= {"Environment": _paragraphs(runs, STEPS) + _environment()}
    sections = {name: html for name, html in sections.items() if html}
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = " ".join(f'<a href="#{ids[name]}">{name}</a>' for name in sections)
    body = "".join(f'<h2 id="{ids[name]}">{name}</h2>{html}' for name, html in sections.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(_subtitle(runs))}</p><nav>{links}</nav>{body}</body></html>\n"
    )


def _subtitle(runs: Sequence[Run]) -> str:
    """Return the tasks and the models of the runs."""
    names = [f"{run.settings['run.task']}, {run.settings['model.name']}" for run in runs if run.settings]
    return "; ".join(dict.fromkeys(names))


def _results(runs: Sequence[Run], examined: Sequence[Examined | OfTasks]) -> str:
    columns = columns_of(runs)
    if len(runs) == 1:
        return _one_result(runs[0], examined[0])
    rows = [[escape(run.name), *(escape(cells[i]) for cells in columns.values())] for i, run in enumerate(runs)]
    table = table_html(["run", *map(escape, columns)], rows)
    unfinished = "<p class='note'>* has not ended</p>" if any(not run.end for run in runs) else ""
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return f"{table}{unfinished}{_pairs(runs)}{notes_html(notes)}"


def _of_tasks(found: Examined | OfTasks) -> OfTasks:
    return found if isinstance(found, Mapping) else {"": found}


def _metrics_now(found: Examined | OfTasks) -> tuple[str, dict[str, float]]:
    """Return the heading and the metrics of what was predicted, TASK/NAME for several tasks; {} for nothing."""
    of_tasks = _of_tasks(found).items()
    all_found = {f"{name}/" if name else "": one for name, one in of_tasks if not isinstance(one, str)}
    metrics = {f"{prefix}{key}": value for prefix, one in all_found.items() for key, value in one.metrics.items()}
    counts = [f"{one.count:,}" for one in all_found.values()]
    is_part = any(one.count < one.total for one in all_found.values())
    return f"validation, now ({' and '.join(counts)} examples)" if is_part else "validation, now", metrics


def _one_result(run: Run, found: Examined | OfTasks) -> str:
    """Return the numbers of a run, and a table of all its metrics: of the best weights, of the end, and of the test."""
    best, last = run.best, run.evaluations[-1] if run.evaluations else {}
    facts = {"steps": f"{run.last_step:,}", "seed": "-" if run.seed is None else str(run.seed)}
    facts |= {f"best {run.watched}": _number(best["evaluation"].get(run.watched))} if best else {}
    facts |= {"at step": f"{best['step']:,}"} if best else {}
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    columns: dict[str, Mapping[str, float]] = {"validation, best": best.get("evaluation", {})}
    columns |= {"training examples, best": best.get("training", {}), "test": run.test_metrics()}
    columns |= {"validation, last": last.get("evaluation", {}) if last is not best else {}}
    now, metrics = _metrics_now(found)
    columns |= {now: metrics}
    columns = {title: values for title, values in columns.items() if values}
    names = dict.fromkeys([*run.metric_names(), *(name for values in columns.values() for name in values)])
    rows = [[escape(name), *(_number(values.get(name)) for values in columns.values())] for name in names]
    table = table_html(["metric", *columns], rows) if rows else ""
    state = f"<p>Ended: {escape(str(run.end['end']))}.</p>" if run.end else ""
    weights = [f"{one.weights}/" for one in _of_tasks(found).values() if not isinstance(one, str)]
    applied = f"now: of {escape(' and '.join(weights))}, with the temperature and thresholds of config.json."
    applied = f"<p class='note'>{applied}</p>" if metrics else ""
    return f'<dl class="numbers">{items}</dl>{state}{table}{applied}{notes_html(run.notes)}'


def _pairs(runs: Sequence[Run]) -> str:
    """Return how much better each recipe is than the first, over the seeds that both have."""
    metric = runs[0].watched
    rows = [
        [
            escape(pair.title),
            f"{pair.mean:+.4f}",
            "" if pair.spread != pair.spread else f"{pair.spread:.4f}",
            ", ".join(f"{escape(str(seed))}: {value:+.4f}" for seed, value in pair.differences.items()),
        ]
        for pair in pair_by_seed(runs, metric)
    ]
    if not rows:
        return ""
    headings = ["recipe", "mean", "standard deviation", "of each seed"]
    title = f"<h3>Better than the first recipe by, in {escape(metric)}, with equal seeds</h3>"
    return title + table_html(headings, rows)


def _curves(runs: Sequence[Run]) -> str:
    figures, others = main_charts(runs), other_charts(runs)
    if not figures:
        return "<p>metrics.jsonl has no numbers yet.</p>"
    more = (
        f"<details><summary>{count_of(len(others), 'more metric')}</summary>{_grid(others)}</details>" if others else ""
    )
    most = max(len(run.training) for run in runs)
    kept = "a curve keeps the lowest and the highest value of each of equal stretches"
    thinned = f"<p class='note'>Lines of a log: up to {most:,}; {kept}.</p>" if most > MAX_POINTS else ""
    return f"{legend_of(runs) if len(runs) > 1 else ''}{_grid(figures)}{thinned}{more}"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _predictions(runs: Sequence[Run], examined: Sequence[Examined | OfTasks]) -> str:
    parts = []
    for i, (run, found) in enumerate(zip(runs, examined, strict=True)):
        html, is_several = "", isinstance(found, Mapping)
        for j, (name, one) in enumerate(_of_tasks(found).items()):
            anchor = f"task-{j}-cell-{i}" if is_several else f"cell-{i}"
            html += f"<h3 class='task'>{escape(name)}</h3>" if is_several else ""
            html += f"<p>{escape(one)}</p>" if isinstance(one, str) else findings_html(one, anchor, len(runs) > 1)
        if len(runs) == 1:
            return html
        parts.append(f"<details{' open' if i == 0 else ''}><summary>{escape(run.name)}</summary>{html}</details>")
    return "".join(parts)


def _recipes(runs: Sequence[Run]) -> str:
    """Return the settings that differ between the runs, and those of each that differ from the defaults."""
    parts = []
    if len(runs) > 1:
        differing = differing_settings(runs)
        rows = [[escape(key), *(escape(repr(value)) for value in values)] for key, values in differing.items()]
        names = [escape(run.name) for run in runs]
        same = "<p>All settings are equal.</p>"
        parts.append(f"<h3>Between the runs</h3>{table_html(['setting', *names], rows, 'settings') if rows else same}")
    for run in runs:
        title = "Different from the defaults" + ("" if len(runs) == 1 else f": {escape(run.name)}")
        lines = escape("\n".join(run.changed)) or "no recipe, or no difference"
        parts.append(f"<h3>{title}</h3><pre>{lines}</pre>")
    return "".join(parts)


def _paragraphs(runs: Sequence[Run], title: str) -> str:
    """Return what each run said of the model, the data or the steps, where it is equal once; "" where nobody did."""
    names: dict[str, list[str]] = {}
    for run in runs:
        text = run.summary.get(title, "\n".join(run.data) if title == DATA else "")
        names.setdefault(text, []).append(run.name)
    if not any(names):
        return "<p>Not known.</p>" if title == DATA else ""
    heads = [f"<h3>{escape(', '.join(own))}</h3>" if len(names) > 1 else "" for own in names.values()]
    texts = [f"<pre>{escape(text)}</pre>" if text else "<p>Not known.</p>" for text in names]
    return "".join(head + text for head, text in zip(heads, texts, strict=True))


def _environment() -> str:
    """Return where this report was written; where a run has run is in its own summary."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    here = (
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}{gpu}"
    )
    return f"<p>This report was written with {escape(here)}.</p>"
