"""The part of the page about what a run's best weights predict for the validation rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from data.notes import count_of
from engine.report.charts import Line, bar_chart, line_chart, point_chart
from engine.report.judge import UNREAD
from engine.report.predictions import Findings
from engine.report.shown import Part, Shown

MOST_CLASSES = 24  # of a matrix that can be read
MOST_ROWS = 40  # of the table of classes
MOST_CONFUSIONS = 20
MOST_POINTS = 500
NUM_BINS = 24  # of lengths
MARKS = {"both": "right", "true": "missed", "predicted": "predicted, wrongly"}
SMALLEST, LARGEST = 3.0, 11.0  # radius of a bin of confidences


def findings_html(found: Findings, anchor: str, shows_metrics: bool) -> str:
    """Return the charts, the tables and the mistakes. anchor: the start of the names of links, of this run alone."""
    some = "" if found.count == found.total else f" of {found.total:,}, drawn with the seed of the run"
    parts = [
        f"<p>{count_of(found.count, 'example')}{some}, of {escape(found.source)}, predicted by {found.weights}/.</p>",
        notes_html(found.notes),
    ]
    parts.append(_metrics(found.metrics) if shows_metrics else "")
    calibration = found.tables.get("calibration")
    charts = [_reliability(calibration) if calibration else "", _thresholds(found), _scores(found), _lengths(found)]
    if any(charts):
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    if matrix := found.tables.get("confusion_matrix"):
        parts.append(_confusions(matrix, found.cells, anchor))
    if classes := found.tables.get("per_class"):
        parts.append(_per_class(classes))
    is_wrong = "mistakes" if found.is_wrong else "examples"
    is_same = {one.id for one in found.worst} == {one.id for one in found.confident}
    worst = f"The worst {is_wrong} ({found.measure})" + (", and the most confident ones" if is_same else "")
    parts.append(_examples(worst, found.worst) if found.worst else "")
    parts.append(_examples("The most confident mistakes", found.confident) if found.confident and not is_same else "")
    return "".join(parts)


def notes_html(notes: Sequence[str]) -> str:
    """Return sentences as a list; "" for none."""
    return f"<ul class='notes'>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def table_html(headings: Sequence[str], rows: Sequence[Sequence[str]], class_name: str = "") -> str:
    """Return a table; cells are HTML. The first column is text, the others are numbers."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{class_name}"><tr>{head}</tr>{body}</table></div>'


def _metrics(metrics: Mapping[str, float]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value:.4g}</dd></div>" for name, value in metrics.items())
    return f'<dl class="numbers">{items}</dl>'


def _reliability(calibration: Mapping[str, Any]) -> str:
    """Return the accuracy of the predictions of each bin of confidence; the area of a point is their number."""
    bins = [one for one in calibration["bins"] if one["count"]]
    most = max((one["count"] for one in bins), default=1)
    points = [
        (
            one["confidence"],
            one["accuracy"],
            max(SMALLEST, LARGEST * math.sqrt(one["count"] / most)),
            f"confidence {one['from']:.2f} to {one['to']:.2f}: {one['count']:,} predictions, "
            f"mean {one['confidence']:.3f}, {one['accuracy']:.3f} of them right",
        )
        for one in bins
    ]
    note = f"Expected calibration error {calibration['ece']:.4f}"
    if "temperature" in calibration:
        note += f"; {calibration['ece_uncalibrated']:.4f} without the temperature {calibration['temperature']:.4g}"
    note += ". On the line, confidence is as high as the share of right predictions; below, it is too high."
    return point_chart("Reliability", points, "confidence", "share that is right", note)


def _thresholds(found: Findings) -> str:
    names = list(found.thresholds[0][1]) if found.thresholds else []
    lines = [
        Line(name, [(t, values[name]) for t, values in found.thresholds if not math.isnan(values[name])], i)
        for i, name in enumerate(names)
    ]
    return line_chart(
        "Threshold", lines, y_label=found.thresholds_of, x_label="probability above which it is predicted",
        y_range=(0.0, 1.12),
        markers=[] if math.isnan(found.applied) else [(found.applied, f"applied: {found.applied:.3g}")],
    )  # fmt: skip


def _scores(found: Findings) -> str:
    step = max(1, math.ceil(len(found.pairs) / MOST_POINTS))
    points = [(true, score, 3.0, f"true {true:.4g}, predicted {score:.4g}") for score, true in found.pairs[::step]]
    note = f"{len(points):,} of {len(found.pairs):,} examples." if step > 1 else ""
    return point_chart("Predictions", points, "true", "predicted", note)


def _lengths(found: Findings) -> str:
    """Return a histogram of the lengths, with the share of wrong predictions; "" where all are equal."""
    lengths = np.array(found.lengths)
    if not len(lengths) or lengths.min() == lengths.max():
        return ""
    count = int(min(NUM_BINS, lengths.max() - lengths.min() + 1))
    edges = np.linspace(lengths.min(), lengths.max() + 1, count + 1)
    if len(found.is_wrong) != len(lengths):
        return bar_chart("Lengths", edges.tolist(), [("examples", np.histogram(lengths, edges)[0].tolist())], "tokens")
    wrong = np.array(found.is_wrong)
    parts = [
        (name, np.histogram(lengths[own], edges)[0].tolist()) for name, own in (("right", ~wrong), ("wrong", wrong))
    ]
    return bar_chart("Lengths", edges.tolist(), parts, "tokens")


def _confusions(matrix: Mapping[str, Any], cells: Mapping[tuple[str, str], Sequence[Shown]], anchor: str) -> str:
    """Return the matrix, or for many classes the most frequent confusions, and behind each cell its examples."""
    labels, counts, unit = matrix["labels"], matrix["counts"], matrix.get("unit", "examples")
    number = {cell: i for i, cell in enumerate(cells)}

    def link(true: str, predicted: str, text: str) -> str:
        i = number.get((true, predicted))
        return text if i is None else f'<a href="#{anchor}-{i}">{text}</a>'

    title = f"Confusion matrix of {unit}"
    if len(labels) <= MOST_CLASSES:
        shown = _matrix(labels, counts, link)
    else:
        title = "The most frequent confusions"
        wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
        rows = [
            [escape(true), escape(predicted), link(true, predicted, f"{-n:,}")]
            for n, true, predicted in sorted((-n, labels[i], labels[j]) for n, i, j in wrong)[:MOST_CONFUSIONS]
        ]
        shown = table_html(["true", "predicted", unit], rows)
    hidden = "".join(
        f'<section class="cell" id="{anchor}-{i}">{_examples(f"True {true}, predicted {predicted}", own)}</section>'
        for (true, predicted), i in number.items()
        if (own := cells[true, predicted])
    )
    hint = "<p class='note'>Follow a number to see examples of it.</p>" if cells else ""
    return f"<h3>{title}</h3>{shown}{hint}{hidden}"


def _matrix(labels: Sequence[str], counts: Sequence[Sequence[int]], link: Any) -> str:
    """Return a row for each true class; the shade is the share of the row."""
    head = "".join(f"<th scope='col'><span>{escape(label)}</span></th>" for label in labels)
    rows = []
    for i, row in enumerate(counts):
        if labels[i] == UNREAD and not any(row):  # no word truly is that
            continue
        total = max(1, sum(row))
        tds = "".join(
            f'<td class="{"right" if i == j else "wrong"}{" deep" if n / total > 0.55 else ""}" '
            f'style="--share:{100 * n / total:.0f}%">{link(labels[i], labels[j], f"{n:,}") if n else ""}</td>'
            for j, n in enumerate(row)
        )
        rows.append(f"<tr><th scope='row'>{escape(labels[i])}</th>{tds}</tr>")
    corner = "<th class='corner'>true ↓ predicted →</th>"
    return f'<div class="scroll"><table class="matrix"><tr>{corner}{head}</tr>{"".join(rows)}</table></div>'


def _per_class(classes: Mapping[str, Mapping[str, float]]) -> str:
    """Return the values of each class, the lowest F1 first."""
    order = sorted(classes.items(), key=lambda item: item[1]["f1"])
    rows = [
        [
            escape(name),
            *(f"{values[key]:.3f}" for key in ("precision", "recall", "f1")),
            f"{values['count']:,.0f}",
            f"{values['predicted']:,.0f}",
        ]
        for name, values in order[:MOST_ROWS]
    ]
    more = f"<p class='note'>{len(order) - MOST_ROWS:,} classes with a higher F1 are not shown.</p>"
    table = table_html(["class", "precision", "recall", "F1", "true", "predicted"], rows)
    return f"<h3>Classes</h3>{table}{more if len(order) > MOST_ROWS else ''}"


def _examples(title: str, examples: Sequence[Shown]) -> str:
    has_images = any(one.image for one in examples)
    shown = "".join(_example(one) for one in examples)
    marks = {part.mark for one in examples for part in one.parts} & {*MARKS}
    key = " ".join(f"<mark class='{mark}'>{name}</mark>" for mark, name in MARKS.items() if mark in marks)
    key = f"<p class='note'>{key}</p>" if marks - {"both"} else ""
    return f'<h3>{escape(title)}</h3>{key}<div class="{"images" if has_images else "examples"}">{shown}</div>'


def _example(one: Shown) -> str:
    """Return an example with what is right, what was predicted and its text or image."""
    facts = [f"<b>{escape(one.id)}</b>"]
    facts += [f"true <span class='true'>{escape(one.true)}</span>"] if one.true else []
    facts += [f"predicted <span class='predicted'>{escape(one.predicted)}</span>"] if one.predicted else []
    facts += [f"probability {one.confidence:.3f}"] if not math.isnan(one.confidence) else []
    facts += [escape(one.error)] if one.error else []
    picture = f'<img src="{one.image}" alt="image {escape(one.id)}">' if one.image else ""
    text = "".join(_part(part) for part in one.parts)
    paragraph = f"<p dir=auto>{text}</p>" if text else ""
    return f"<article>{picture}<p class='facts'>{' · '.join(facts)}</p>{paragraph}</article>"


def _part(part: Part) -> str:
    if part.mark == "name":
        return f"<small class='column'>{escape(part.text)}</small> "
    text = escape(part.text)
    if not part.mark:
        return text
    label = f"<small>{escape(part.label)}</small>" if part.label not in ("", "answer", "predicted") else ""
    return f"<mark class='{part.mark}'>{text}{label}</mark>"
