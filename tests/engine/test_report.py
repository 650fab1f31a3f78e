"""engine.report: what the page and the table say of a log, charts, a run's summary, and a user's mistakes."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.config import Config, ConfigError, override, to_toml
from engine.errors import TrainingError
from engine.model_card import escaped
from engine.report import write_page
from engine.report.__main__ import main
from engine.report.charts import MAX_POINTS, Line, bar_chart, line_chart, smooth, thin, ticks
from engine.report.mistakes import findings_html
from engine.report.page import page
from engine.report.predictions import Findings
from engine.report.runs import Paired, open_runs, pair_by_seed
from engine.report.shown import Part, Shown
from engine.report.terminal import describe_pair, format_table

HOSTILE = "<script>alert('x')</script> & \"quoted\" <b>"
VOID = {"meta", "img"}


class Balance(HTMLParser):
    """A parser that fails where a tag is not closed, and collects the tags and what they load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)


def parse(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


def write_run(folder: Path, *, steps: int = 40, accuracy: float = 0.7, ended: bool = True, **settings: object) -> Path:
    """Write a run folder as the loop leaves it, without weights: an evaluation in the middle and one at the end."""
    rows = [
        {"step": i, "loss": 1 / i, "lr": 1e-4, "grad_norm": 1.0 + i % 3, "samples_per_second": 10.0}
        for i in range(1, steps + 1)
    ]
    for step, value in ((steps // 2, accuracy - 0.1), (steps, accuracy)):
        metrics = {"accuracy": value, "loss": 1 - value}
        rows.append({"step": step, "evaluation": metrics, "training": {"accuracy": 0.9, "loss": 0.1}, "best": True})
    if ended:
        rows.append({"step": steps, "end": "all steps done", "best_accuracy": accuracy, "best_step": float(steps)})
        rows[-1] |= {"test_accuracy": 0.66, "test_accuracy_low": 0.6, "test_accuracy_high": 0.7}
    (folder / "best").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = override(Config(), {"run.folder": str(folder), **settings})
    (folder / "best" / "recipe.toml").write_text(to_toml(config))
    (folder / "best" / "README.md").write_text(
        f"# x\n## Data\n\n- training: 7 examples {escaped(HOSTILE)} a\\_\n\n## Metrics\n- no\n"
    )
    return folder


def test_the_page_says_what_the_log_and_the_recipe_say(tmp_path):
    folder = write_run(tmp_path / "a", **{"optim.lr": 3e-4})
    (run,) = open_runs([str(folder)])
    html = page([run], ["Nothing was predicted."])
    parsed = parse(html)
    assert parsed.loaded == []
    assert not parsed.tags & {"script", "link", "iframe", "object"}
    row = re.search("<tr><td>accuracy</td>(.*?)</tr>", html)
    assert re.findall("<td>([^<]*)</td>", row.group(1)) == ["0.7", "0.9", "0.66"]
    assert "optim.lr = 0.0003" in html
    assert "training: 7 examples &lt;script&gt;alert(&#x27;x&#x27;)" in html
    assert "no</pre>" not in html  # the other sections of the card
    titles = [title.strip() for title in re.findall("<figcaption>([^<]*)", html)]
    assert titles[:2] == ["Loss", "accuracy (chooses the best weights)"]
    assert {"Gap of loss", "Gap of accuracy", "Learning rate", "Gradient norm", "Throughput"} <= set(titles)
    assert "step 40" not in run.notes


def test_names_and_texts_are_escaped(tmp_path):
    example = Shown(HOSTILE, HOSTILE, HOSTILE, "loss 3", 0.9, [Part(HOSTILE), Part(HOSTILE, "true", HOSTILE)])
    scores = dict.fromkeys(("precision", "recall", "f1", "count", "predicted"), 0.5)
    tables = {
        "per_class": {HOSTILE: scores},
        "confusion_matrix": {"labels": [HOSTILE, "b"], "counts": [[1, 2], [0, 3]]},
    }
    cells = {(HOSTILE, "b"): [example]}
    found = Findings(
        HOSTILE, "best", 6, 6, {HOSTILE: 0.5}, tables, [HOSTILE], [3, 4], [True, False], [example], "loss", cells=cells
    )
    run = open_runs([str(write_run(tmp_path / "a <script> & b"))])[0]
    html = page([run], [found])
    parsed = parse(html)
    assert not parsed.tags & {"script", "b2"}
    assert "alert('x')" not in html.replace("&#x27;", "'").replace("&lt;script&gt;alert('x')", "")
    assert '<a href="#cell-0-0">2</a>' in html
    assert 'id="cell-0-0"' in html
    assert "quoted" in findings_html(found, "cell-0", True)


def test_a_long_log_is_thinned_and_the_page_says_so(tmp_path):
    folder = write_run(tmp_path / "a", steps=20_000)
    html = page(open_runs([str(folder)]), ["-"])
    assert max(len(points.split()) for points in re.findall('points="([^"]*)"', html)) <= MAX_POINTS
    assert f"20,000 values are shown by {MAX_POINTS}" in html
    assert len(html) < 150_000


def test_thinning_keeps_the_highest_and_the_lowest_value():
    rng = random.Random(0)
    points = [(float(i), rng.random()) for i in range(5_000)]
    points[3_333], points[77] = (3_333.0, 50.0), (77.0, -50.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert {points[3_333], points[77]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:10]) == points[:10]


def test_smoothing_has_no_bias_and_is_an_average():
    assert [y for _, y in smooth([(i, 2.5) for i in range(9)], 5)] == pytest.approx([2.5] * 9)
    values, decay = [3.0, 1.0, 4.0, 1.0, 5.0], 1 - 2 / 5
    for n, (_, y) in enumerate(smooth(list(enumerate(values)), 4), 1):
        weights = [decay ** (n - 1 - i) for i in range(n)]
        assert y == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))


@pytest.mark.parametrize("ends", [(0, 1), (-3, 17), (1e-6, 2e-6), (0.7713, 0.7714), (1, 100_000), (-1e9, 1e9)])
def test_ticks_are_few_and_round(ends):
    found = ticks(*ends)
    assert 2 <= len(found) <= 7
    assert all(ends[0] - 1e-9 * abs(ends[0]) <= x <= ends[1] + 1e-9 * abs(ends[1]) for x in found)
    step = found[1] - found[0]
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [1e-9, 1e9], [-3e38, 3e38], [-5.0, 5.0], [0.0, 1e-12], [3.0] * 1_000]
)
def test_every_chart_has_finite_places(values):
    svg = line_chart("x", [Line("a", [(float(i), y) for i, y in enumerate(values)])], markers=[(0.0, "best")])
    parse(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert line_chart("x", [Line("a", [])]) == ""


def test_equal_seeds_are_compared_with_the_first_recipe(tmp_path):
    names = [
        write_run(tmp_path / "a0", accuracy=0.70, **{"run.seed": 0}),
        write_run(tmp_path / "a1", accuracy=0.80, **{"run.seed": 1, "log.every_steps": 7}),
        write_run(tmp_path / "b0", accuracy=0.74, **{"run.seed": 0, "optim.lr": 9e-5}),
        write_run(tmp_path / "b1", accuracy=0.78, **{"run.seed": 1, "optim.lr": 9e-5}),
        write_run(tmp_path / "b2", accuracy=0.99, **{"run.seed": 2, "optim.lr": 9e-5}),
        write_run(tmp_path / "c0", accuracy=0.99, **{"run.seed": 0, "data.train": "other.csv"}),
    ]
    runs = open_runs([str(name) for name in names])
    (pair,) = pair_by_seed(runs, "accuracy")
    assert "accuracy equal to the first recipe" in describe_pair(Paired("x", {0: 0.0}), "accuracy")
    assert pair.title == "optim.lr = 9e-05"
    assert pair.differences == pytest.approx({0: 0.04, 1: -0.02})
    assert (pair.mean, pair.spread) == pytest.approx((0.01, 0.06 / math.sqrt(2)))
    html = page(runs, ["-"] * 6)
    parse(html)
    assert "0: +0.0400, 1: -0.0200" in html
    for width in (50, 80, 200):
        table = format_table(runs, width)
        lines = table.splitlines()[: 1 + len(runs)]
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines] == ["run", "a0", "a1", "b0", "b1", "b2", "c0"]
    assert "optim.lr = 9e-05: accuracy better by 0.0100 ± 0.0424 than the first recipe, 2 equal seeds" in table


def test_what_is_missing_or_damaged_is_said(tmp_path):
    folder = write_run(tmp_path / "a", ended=False)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "loss": null, "lr": 1, "grad_norm": null}\n[1]\n{"step": 42, "lo')
    (folder / "best" / "README.md").unlink()
    (folder / "best" / "recipe.toml").unlink()
    (run,) = open_runs([str(folder)])
    html = page([run], ["Nothing was predicted."])
    parse(html)
    for part in ("2 lines of metrics.jsonl cannot be read", "has not ended", "no recipe.toml yet", "no best/README.md"):
        assert part in html
    assert run.last_step == 41
    assert "* has not ended" in format_table([run], 80)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    parse(page(open_runs([str(empty)]), ["-"]))


def test_the_page_has_the_summary_of_the_run(tmp_path):
    """Of several runs what is equal is there once; the card is for runs without a summary."""
    names = [write_run(tmp_path / name) for name in "abc"]
    for name in names[:2]:
        text = f"weights: x {HOSTILE}\n  ignored 3\n\na note\n\ntraining: 9 examples of {name.name}\n"
        (name / "summary.txt").write_text(f"{text}\nparameters: 7\ndevice: cpu\n")
    runs = open_runs([str(name) for name in names])
    assert runs[0].summary == {
        "Model loading": f"weights: x {HOSTILE}\n  ignored 3",
        "Data": "a note\n\ntraining: 9 examples of a",
        "Steps": "parameters: 7\ndevice: cpu",
    }
    html = page(runs, ["-"] * 3)
    parse(html)
    assert (html.count("ignored 3"), html.count("device: cpu")) == (1, 1)
    assert (html.count("training: 9 examples"), html.count("training: 7 examples")) == (2, 1)
    assert "<h3>a, b</h3>" in html


def test_a_run_that_has_not_ended_watches_the_metric_of_its_task(tmp_path):
    folder = write_run(tmp_path / "a", ended=False)
    log = folder / "metrics.jsonl"
    log.write_text(re.sub(r'("accuracy": [^,]*), ("loss": [^}]*)', r"\2, \1", log.read_text()))
    (run,) = open_runs([str(folder)])
    assert next(iter(run.evaluations[0]["evaluation"])) == "loss"
    assert (run.watched, run.mode) == ("accuracy", "max")


def test_each_of_several_tasks_has_its_predictions(tmp_path):
    (run,) = open_runs([str(write_run(tmp_path / "a", **{"run.task": "multi-task"}))])
    found = Findings("f", "best-x", 4, 6, {"f1": 0.25}, {}, [], [3], [True], [], "loss")
    html = page([run], [{"x": found, "<y>": "Nothing was predicted: no"}])
    parse(html)
    assert "<tr><td>x/f1</td>" in html
    assert "<h3 class='task'>&lt;y&gt;</h3><p>Nothing was predicted: no</p>" in html
    assert "now: of best-x/," in html


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["a/run", "b/run"], ["a", "b"]),
        (["a/one", "b/two"], ["one", "two"]),
        (["x/a/s/run", "x/b/s/run", "x/b/t/run"], ["a/s", "b/s", "b/t"]),
    ],
)
def test_runs_have_short_names_that_differ(folders, expected, tmp_path):
    runs = open_runs([str(write_run(tmp_path / folder)) for folder in folders])
    assert [run.name for run in runs] == expected


def test_counts_have_whole_ticks():
    html = bar_chart("Lengths", [0, 1, 2], [("examples", [9, 3])], "tokens")
    assert re.findall('text-anchor="end">([^<]*)', html) == ["0", "5"]


def test_a_page_without_predictions_needs_no_weights(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    assert main([str(folder), "--no-predict"]) == 0
    assert "--no-predict" in (folder / "report.html").read_text()
    assert main([f"{folder}/best", f"--output={tmp_path / 'b.html'}"]) == 0
    printed = capsys.readouterr()
    assert "nothing is predicted" in printed.err
    assert f"report: {tmp_path / 'b.html'}" in printed.out
    assert "Nothing was predicted: " in (tmp_path / "b.html").read_text()
    (folder / "best").rename(tmp_path / "other")
    assert main([str(folder)]) == 0
    assert "nothing is predicted: the run has not saved weights yet" in capsys.readouterr().err


def test_the_end_of_a_run_writes_the_page(tmp_path):
    folder = write_run(tmp_path / "a")
    write_page(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    parse(html)
    assert f"python -m engine.report {folder}" in html
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    with pytest.raises(TrainingError, match=r"could not be written: .*; the run is complete"):
        write_page(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a run folder"),
        (["missing"], "no such run folder"),
        (["."], "it has no metrics.jsonl"),
        (["a", "--outptu=x.html"], "did you mean 'output'"),
        (["a", "--max-examples=few"], "should be a number of rows"),
        (["a", "--optim.lr=1"], "has no effect on a trained model"),
        (["a", "--no-predict", "--output=no/x.html"], "there is no folder 'no'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        main(arguments)
