"""engine.report: what the page shows of predictions: confusions, mistakes, thresholds, marks in texts."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from data import Row
from engine.config import DataSettings, TokenClassificationSettings
from engine.report.judge import word_confusions
from engine.report.mistakes import findings_html
from engine.report.predictions import Findings, _cells, threshold_values
from engine.report.shown import MAX_CHARACTERS, Shown, crop, mark_spans
from engine.tasks import TaskSettings


def test_words_are_confused_by_the_type_of_their_entity():
    labels, settings = (
        ["B-X", "I-X", "B-Y", "O"],
        TaskSettings(DataSettings(label_column="tags"), TokenClassificationSettings()),
    )
    rows = [Row("1", 1, {"tags": ["B-X", "I-X", "O", "B-Y", "O"]})]
    matrix, pairs = word_confusions(rows, [{"tags": ["B-Y", "B-X", "O", None, "I-X"]}], settings, labels)
    assert matrix["labels"] == ["O", "X", "Y", "(not read)"]
    assert matrix["counts"] == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert pairs == [[("X", "Y"), ("X", "X"), ("O", "O"), ("Y", "(not read)"), ("O", "X")]]
    tables = {"confusion_matrix": matrix}
    cells = {pair: [Shown("1", *pair, "", 0.5, [])] for pair in _cells(pairs, [0.5])}
    html = findings_html(Findings("f", "best", 1, 1, {}, tables, [], [], [], [], "loss", cells=cells), "cell-0", False)
    assert html.count("<a href") == 5, "each number leads to its examples, also where the prediction is right"
    assert html.count("<th scope='row'>") == 3, "no word truly was not read"


def test_the_most_frequent_confusions_have_examples():
    """Also among many that are equally frequent: the table and its examples choose the same ones."""
    names = [f"c{i:03}" for i in range(200)]
    pairs = [(name, "c199") for name in names[:199]] + [("c150", "c149")] * 3
    cells = _cells([[pair] for pair in pairs], [0.5] * len(pairs))
    counts = [[pairs.count((a, b)) for b in names] for a in names]
    shown = {pair: [Shown("1", *pair, "", 0.5, [])] for pair in cells}
    tables = {"confusion_matrix": {"labels": names, "counts": counts}}
    html = findings_html(Findings("f", "best", 1, 1, {}, tables, [], [], [], [], "loss", cells=shown), "cell-0", False)
    rows = re.findall("<tr><td>(c[0-9]+)</td><td>(c[0-9]+)</td><td>(.*?)</td>", html)
    assert rows[0][:2] == ("c150", "c149")
    assert len(rows) == 20
    assert all("href" in cell for *_, cell in rows)


def test_cells_show_the_most_confident_examples():
    """Those of wrong predictions come first where there are too many cells; an example without a confidence last."""
    pairs = [[("a", "b")], [("a", "b"), ("a", "b")], [("a", "a")], [("a", "b")]]
    assert _cells(pairs, [math.nan, 0.2, 0.9, 0.7]) == {("a", "a"): [2], ("a", "b"): [3, 1, 0]}
    many = [[(f"r{i}", f"r{i}")] for i in range(99)] + [[("z", "y")]]
    assert _cells(many, [0.5] * 100)["z", "y"] == [99]


def test_the_same_mistakes_are_shown_once():
    one, other = (Shown(name, "a", "b", "", 0.5, []) for name in "12")
    found = Findings("f", "best", 2, 2, {}, {}, [], [], [True, True], [one, other], "loss", confident=[other, one])
    html = findings_html(found, "cell-0", False)
    assert html.count("<article>") == 2
    assert "The worst mistakes (loss), and the most confident ones" in html
    assert findings_html(replace(found, confident=[one]), "cell-0", False).count("<article>") == 3


def test_the_threshold_chart_says_of_what_and_which_is_applied():
    values = [(i / 10, {"recall": 1.0, "precision": 0.5, "F1": 2 / 3}) for i in range(1, 10)]
    found = Findings("f", "best", 2, 2, {}, {}, [], [], [], [], "", values, 0.5, "of <b>")
    html = findings_html(found, "cell-0", False)
    assert "of &lt;b&gt;" in html
    assert "applied: 0.5" in html
    assert "applied" not in findings_html(replace(found, applied=math.nan), "cell-0", False)


def test_thresholds_count_what_is_above_them():
    generator = torch.Generator().manual_seed(0)
    p, is_positive = torch.rand(60, generator=generator), torch.rand(60, generator=generator) > 0.6
    for threshold, values in threshold_values(p, is_positive)[::9]:
        chosen = [x > threshold for x in p.tolist()]
        hits = sum(one and other for one, other in zip(chosen, is_positive.tolist(), strict=True))
        assert values["recall"] == pytest.approx(hits / int(is_positive.sum()))
        assert values["precision"] == pytest.approx(hits / sum(chosen) if any(chosen) else math.nan, nan_ok=True)


def test_marks_keep_the_text_and_say_what_was_found():
    text = "Anna Lee lives in Ulm, not Rome."
    true, predicted = [(0, 8, "PER"), (18, 21, "LOC")], [(0, 4, "PER"), (18, 21, "ORG"), (27, 31, "LOC")]
    parts = mark_spans(text, true, predicted)
    assert "".join(part.text for part in parts) == text
    assert [(part.text, part.mark, part.label) for part in parts if part.mark] == [
        ("Anna", "both", "PER"),
        (" Lee", "true", "PER"),
        ("Ulm", "predicted", "LOC → ORG"),
        ("Rome", "predicted", "LOC"),
    ]


def test_a_long_text_is_shown_around_its_mark():
    parts = crop(mark_spans("a " * 3_000 + "HERE" + " b" * 3_000, [(6_000, 6_004, "x")], []))
    assert ("HERE", "true") in [(part.text, part.mark) for part in parts]
    assert sum(len(part.text) for part in parts) <= MAX_CHARACTERS + 4
    assert (parts[0].text, parts[-1].text) == ("… ", " …")
