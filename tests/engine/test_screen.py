"""What a run prints: the first screen, the bar, few metrics, the end; quiet; JSON lines; widths of terminals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.runs import StopAfter, run_training
from tqdm import tqdm

from data.notes import display_width, short_label
from engine.config import LogSettings, ModelSettings, override
from engine.evaluate import Metrics
from engine.first_screen import Summary, describe_model, first_screen, name_default_recipe, unusual_report
from engine.metrics import multi_label_classification, token_classification
from engine.metrics.multi_label_classification import per_label_table
from engine.metrics.text_classification import per_class_table
from engine.metrics.token_classification import type_table
from engine.report.summary_file import MODEL, read_summary
from engine.run_end import (
    choose_columns,
    describe_folder,
    evaluation_table,
    format_metrics,
    format_seconds,
    next_commands,
    result_line,
)
from engine.screen import LINES, Screen, bar_format, step_line, wrap
from engine.tasks import TASKS
from models.checkpoints.weights import LoadReport

HEADERS = {per_label_table: multi_label_classification.HEADER_SIZE, type_table: token_classification.HEADER_SIZE}
TEXTS = [
    "a b c",
    "word " * 40,
    "   indented " + "x " * 60,
    "/a/long/path/" * 9,
    "负面 " * 30 + "end",
    "a\n" + "b " * 50,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [0, 20, 50, 80])
def test_lines_are_wrapped_and_lose_no_word(text, width):
    wrapped = wrap(text, width)
    assert wrapped.split() == text.split()
    if not width:
        assert wrapped == text
    for line in wrapped.split("\n"):
        assert not width or display_width(line) <= width or len(line.split()) == 1, line


@pytest.mark.parametrize("total", [9, 120, 12_000, 1_000_000])
@pytest.mark.parametrize("width", [40, 50, 69, 70, 80, 99, 100, 160])
@pytest.mark.parametrize("elapsed", [30, 40_000])
def test_a_bar_has_one_line_with_loss_and_time_left(width, total, elapsed):
    left = tqdm.format_interval(elapsed)
    form, numbers = bar_format(width, total, left, 0.66051, 8.3e-5, 61.3)
    options = {"bar_format": form, "postfix": numbers, "unit": "step"}
    line = tqdm.format_meter(total // 2, total, elapsed, ncols=width - 1, **options)
    assert len(line) < width
    assert "loss 0.66" in line
    assert f"{total // 2}/{total}" in line or (width < 50 and "50%" in line)
    assert re.search(r"<(\d+:)?\d\d:\d\d, | (\d+:)?\d\d:\d\d left, ", line)
    assert line.rstrip("]").endswith(numbers), "nothing is cut off"
    if total < 1000 and width >= 50 and elapsed < 3600:
        assert "lr 8.3" in line
        assert "61" in line.partition("lr")[2], "the speed"


@pytest.mark.parametrize(
    ("width", "end"), [(0, "examples/s"), (80, "examples/s"), (50, "61.3 ex/s"), (40, "8.33e-05"), (30, "0.6605")]
)
def test_a_line_of_training_fits(width, end):
    line = step_line(width, 120, 0.66051, 8.33e-5, 1.032, 61.3)
    assert line.startswith("step    120  loss 0.6605")
    assert line.endswith(end)
    assert not width or len(line) <= width


def summary_with(warnings: int, notes: int) -> Summary:
    facts = {"model": ["bert from a checkpoint", "22.6 M parameters"], "task": ["text-classification"]}
    facts |= {"data": ["9,511 training examples"], "device": ["cpu"], "steps": ["120"], "output": ["runs/x"]}
    said = [f"training: {i} of 100 texts are wrong in a way that takes many words to say here" for i in range(warnings)]
    return Summary("all of it", facts, said, [f"note {i}" for i in range(notes)], report="", columns=(), recipe={})


@pytest.mark.parametrize("warnings", [0, 1, 3, 4, 12])
@pytest.mark.parametrize("notes", [0, 1, 30])
def test_the_first_screen_has_15_lines_and_counts_the_rest(warnings, notes):
    lines = first_screen(summary_with(warnings, notes), 80)
    text = "\n".join(lines)
    assert len(lines) < LINES, "with the line that names the recipe"
    assert all(len(line) <= 80 for line in lines)
    shown = text.count("       warning: ")
    assert shown >= min(warnings, 1)
    assert ("more warning" in text) == (shown < warnings)
    assert f"{warnings - shown} more warning" in text or shown == warnings
    assert (f"{notes} note" in text) == (notes > 0)
    assert ("summary.txt" in text) == (shown < warnings or notes > 0)
    whole = "\n".join(first_screen(summary_with(warnings, notes), 0))
    assert whole.count("warning: ") == warnings
    assert whole.count("       note ") == notes
    assert notes * warnings == 0 or whole.rindex("warning: ") < whole.index("note 0")


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_a_long_warning_is_cut_and_that_is_said(width):
    labels = [f"'标签 {i}'" for i in range(300)]
    found = summary_with(2, 1)
    found = found._replace(warnings=[f"no validation example of {', '.join(labels)}", *found.warnings])
    lines = first_screen(found, width)
    assert all(display_width(line) <= width for line in lines)
    text = re.sub(r"\s+", " ", "\n".join(lines))
    assert " ... the end of this warning, 2 more warnings and 1 note: all in summary.txt" in text
    assert len(lines) < LINES or width < 80
    assert all(label in "\n".join(first_screen(found, 0)) for label in labels)


def test_text_of_the_data_does_not_steer_the_terminal(capsys):
    Screen(LogSettings()).say("a\x1b[2Jb\rc\x9bd\u202ee\n  标签\u3000ok")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\rc\\x9bd\\u202ee\n  标签\u3000ok\n"
    assert short_label("a\nb" + "c" * 99) == "a\\nb" + "c" * 34 + "..."
    assert [display_width(text) for text in ("ab", "标签", "e\u0302x", "👍")] == [2, 4, 2, 2]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_quiet_run_that_is_stopped_says_how_to_go_on(as_json, tiny, capsys):
    assert run_training(tiny(**{"log.level": "quiet", "log.json": as_json}), StopAfter(1)) is None
    (line,) = capsys.readouterr().out.splitlines()
    text = json.loads(line)["warning"] if as_json else line
    assert text == "stopped at step 1; the same command with --resume continues the run"


@pytest.mark.parametrize("table", [per_class_table, per_label_table, type_table])
def test_tables_of_labels_are_aligned_in_columns(table):
    labels = ("负面的评论", "b\nad", "L" * 99)
    statistics = torch.ones(10 if table is per_class_table else HEADERS[table] + 9, dtype=torch.float64)
    lines = table(statistics, labels).split("\n")[:4]
    assert [line[:40].strip() for line in lines[1:]] == ["负面的评论", "b\\nad", "L" * 37 + "..."]
    assert len({display_width(line[: line.index(".")]) for line in lines[1:3]}) == 1


@pytest.mark.parametrize(
    ("parameters", "trained", "size"),
    [
        (22_566_146, 22_566_146, "22.6 M parameters"),
        (2_000_000, 50_000, "2 M parameters, 2.50% trained"),
        (9_876, 9_876, "9,876 parameters"),
    ],
)
def test_the_model_is_shown_with_its_size_and_what_was_loaded(parameters, trained, size):
    report = LoadReport("a/file", loaded=["x"] * 9, initialised=["head.weight"], ignored=["y"])
    weights = SimpleNamespace(model_type="bert")
    model = SimpleNamespace(report=report, spec=SimpleNamespace(architecture=SimpleNamespace(weights=weights)))
    settings = ModelSettings(name="a")
    tensors = "tensors: 9 loaded, 1 new (head), 1 unused"
    shown = describe_model(model, parameters, trained, settings, "runs/x")
    assert shown == ["bert from a", f"{size}; {tensors}"]
    assert unusual_report(report, settings) == ""
    report.initialised.append("backbone.weight")
    assert describe_model(model, 9, 9, settings, "runs/x")[1] == "9 parameters; tensors: 9 loaded, 2 new, 1 unused"
    assert unusual_report(report, settings) == str(report)
    report.source = "runs/x/last"
    assert describe_model(model, 9, 9, settings, "runs/x")[0] == "bert from runs/x/last"


@pytest.mark.parametrize("task", TASKS)
def test_the_screen_shows_the_watched_metric_and_a_few_more(task):
    found = TASKS[task]
    for watched in found.metrics:
        columns = choose_columns(watched, found.metrics, found.details, [])
        assert columns[0] == watched
        assert len(columns) == len({*columns}) <= 4
        assert not {*columns[1:]} & {*found.details}
    assert choose_columns("a", ("a", "b", "c", "d", "mine", "loss"), (), ["mine"]) == ("a", "mine", "b", "loss")


def test_only_the_watched_metric_has_its_interval():
    metrics = Metrics({"loss": 0.5, "accuracy": 0.75, "f1": 0.5}, {"accuracy": (0.7, 0.8), "f1": (0.4, 0.6)})
    assert format_metrics(metrics, ("accuracy", "f1")) == "accuracy 0.7500 [0.7000, 0.8000]  f1 0.5000"
    result = {"best_accuracy": 0.75, "best_step": 9.0} | {f"test_{k}": v for k, v in metrics.with_bounds().items()}
    result |= {f"test_label{i}": 0.1 for i in range(500)}
    line = "best_accuracy 0.75  best_step 9  test_accuracy 0.75 [0.7, 0.8]  test_loss 0.5"
    assert result_line(result, ("accuracy", "loss")) == line


def test_the_table_at_the_end_fits_and_names_what_it_leaves_out():
    rows = [{"step": i, "accuracy": i / 9, "f1": 0.5, "recall": 0.1, "loss": 0.2, "best": i < 3} for i in (1, 2, 3)]
    for width in (0, 50, 80):
        lines = evaluation_table(rows, ("accuracy", "f1", "loss", "recall"), width).split("\n")
        assert all(len(line) <= width for line in lines) or not width
        assert [line.endswith("<- best") for line in lines[:4]] == [False, False, True, False]
        left_out = [name for name in ("f1", "loss", "recall") if name not in lines[0].split()]
        assert left_out == (lines[4].partition(": ")[2].split(", ") if len(lines) > 4 else [])
        assert bool(left_out) == (width == 50)


def test_the_next_commands_can_be_copied(tmp_path, monkeypatch):
    folder = tmp_path / "my run"
    assert next_commands(folder, "").count(f"'{folder}'") == 3
    assert f"engine.evaluate '{folder}' --data.test 'a b.csv'\n" in next_commands(folder, "a b.csv")
    (folder / "best-reviews").mkdir(parents=True)
    assert f"engine.predict '{folder}/best-reviews' --input" in next_commands(folder, "")
    monkeypatch.setattr(sys, "orig_argv", ["python", "/usr/bin/finetune-train", "few_reviews"])
    assert f"finetune-evaluate '{folder}/best-reviews' --data.test FILE" in next_commands(folder, "")
    assert next_commands(folder, "", ["my parts.py"]).count(" --run.plugins 'my parts.py'") == 3
    assert "--data.test FILE" in next_commands(folder, "memory:validation_rows")
    (folder / "gone").symlink_to("nowhere")
    assert describe_folder(folder, 5.0) == f"{folder}: best-reviews/; 0 bytes on the disk, after 5.0 s"
    assert describe_folder(folder, 5.0, 1200).endswith("after 5.0 s since it was resumed at step 1,200")
    assert [format_seconds(s) for s in (7.26, 77, 7500)] == ["7.3 s", "1 min 17 s", "2 h 5 min"]


@pytest.mark.parametrize(("argv", "named"), [([], False), (["--optim.lr", "1"], False), (["mine.toml"], True)])
def test_a_bare_call_says_which_recipe_it_runs(argv, named, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "engine.train", *argv])
    line = "recipe movie_reviews, a shipped one; another: torchrun -m engine.train RECIPE"
    assert name_default_recipe(argv) == ("" if named else line)


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("level", ["info", "quiet"])
@pytest.mark.parametrize("as_json", [True, False])
def test_what_each_kind_of_line_becomes(level, as_json, is_main, capsys):
    screen = Screen(LogSettings(level=level, json=as_json), is_main)
    screen.show("fact")
    screen.say("note")
    screen.say("warning: old")
    screen.warn("spike")
    screen.result("best 1")
    screen.write_row({"step": 1, "loss": float("nan")})
    screen.write_row({"step": 2, "end": "done"})
    wanted = {
        ("info", False): ["fact", "note", "warning: old", "spike", "best 1"],
        ("quiet", False): ["warning: old", "spike", "best 1"],
        ("info", True): [{"note": "note"}, {"warning": "old"}, {"warning": "spike"}, {"step": 1, "loss": None}],
        ("quiet", True): [{"warning": "old"}, {"warning": "spike"}],
    }[level, as_json]
    wanted += [{"step": 2, "end": "done"}] if as_json else []
    lines = capsys.readouterr().out.splitlines()
    assert (list(map(json.loads, lines)) if as_json else lines) == (wanted if is_main else [])


def test_a_run_as_json_or_quiet_is_the_same_run(tiny, tmp_path, capsys):
    few = {"train.max_steps": 4, "eval.every_steps": 2, "optim.name": "lion", "data.max_length": 8}
    rows, printed = {}, {}
    for name, settings in {"usual": {}, "json": {"log.json": True}, "quiet": {"log.level": "quiet"}}.items():
        run_training(tiny(**few | settings | {"run.folder": str(tmp_path / name)}))
        printed[name] = capsys.readouterr()
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows[name] = [{k: v for k, v in row.items() if not k.endswith(("_second", "_seconds", "_mb"))} for row in found]
    assert rows["usual"] == rows["json"] == rows["quiet"]
    lines = list(map(json.loads, printed["json"].out.splitlines()))
    own = [json.loads(line) for line in (tmp_path / "json" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "step" in line] == own
    said = [*(line for line in lines if "step" not in line)]
    assert all([*line] in (["note"], ["warning"]) for line in said)
    assert any("truncated to data.max_length" in str(line) for line in said)
    assert [line for line in printed["quiet"].out.splitlines() if "warning: " not in line] == [
        line for line in printed["usual"].out.splitlines() if line.startswith("best_accuracy ")
    ]
    assert not any(text.err for text in printed.values())
    described = (tmp_path / "usual" / "summary.txt").read_text()
    assert described.startswith(f"weights: {Path(tiny().model.name)}\n  loaded       37 tensors")
    assert "texts truncated to data.max_length" in described
    usual = printed["usual"].out
    assert usual.count("truncated to data.max_length") == 2, "of the training and the validation data"
    assert usual.endswith(f"  python -m engine.report {tmp_path / 'usual'}\n")
    assert "metrics.jsonl, summary.txt, report.html; " in usual


def test_a_resumed_run_adds_to_the_summary_of_its_start(tiny, tmp_path):
    config = tiny(**{"train.max_steps": 4, "eval.every_steps": 2})
    assert run_training(config, StopAfter(3)) is None
    first = (tmp_path / "run" / "summary.txt").read_text()
    run_training(override(config, {"run.resume": "yes"}))
    text = (tmp_path / "run" / "summary.txt").read_text()
    assert text.startswith(f"{first}\nresumed from step 3\n\nweights: {tmp_path / 'run' / 'last'}\n")
    assert read_summary(tmp_path / "run")[MODEL] == first.partition("\n\n")[0]
