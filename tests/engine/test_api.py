"""Training, evaluation and prediction from Python (engine/api.py): on every task, equal to the commands on files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sized
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.runs import assert_same_run, run_module

import engine
from data import DataError, Row
from engine.config import Config, ConfigError, override, read_recipe

ROOT = Path(engine.__file__).parent.parent


def rows_of(reviews: Path) -> list[dict]:
    return [json.loads(line) for line in reviews.read_text().splitlines()]


@pytest.fixture
def trained(tiny, tmp_path) -> Path:
    """The folder of a finished run."""
    engine.run_training(tiny(**{"run.folder": str(tmp_path / "trained"), "train.max_steps": 2}))
    return tmp_path / "trained"


def test_rows_in_memory_train_the_run_of_their_file(tiny, tmp_path, reviews):
    """The same losses and weights; only the name of the data differs."""
    config = tiny(**{"run.folder": str(tmp_path / "file"), "train.max_steps": 6, "eval.every_steps": 3})
    of_file = engine.run_training(config)
    rows = [Row(**row) for row in rows_of(reviews)]
    of_rows = engine.run_training(config, train_rows=rows, **{"run.folder": str(tmp_path / "rows")})
    assert of_file == of_rows
    assert_same_run(tmp_path / "file", tmp_path / "rows")


def test_validation_and_test_rows_are_used(tiny, reviews):
    rows = rows_of(reviews)
    config = tiny(**{"train.max_steps": 4, "eval.every_steps": 2})
    result = engine.run_training(config, rows[:80], rows[80:100], rows[100:])
    assert {"best_accuracy", "test_accuracy"} <= result.keys()


def test_files_of_the_recipe_are_not_used_beside_train_rows(tiny, tmp_path, reviews):
    """Its validation file belongs to its training file; one that the caller names is used."""
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "good film", "label": "of another data set"}\n')
    config = tiny(**{"train.max_steps": 2, "data.validation": str(strange), "data.test": str(strange)})
    result = engine.run_training(config, rows_of(reviews))
    assert "best_accuracy" in result
    assert "test_accuracy" not in result
    config = tiny(**{"train.max_steps": 2, "run.resume": "auto", "run.folder": str(tmp_path / "other")})
    with pytest.raises(DataError, match="unknown label 'of another data set'"):
        engine.run_training(config, rows_of(reviews), data__validation=str(strange))


def test_overrides_take_dots_or_two_underscores(tiny):
    config = tiny(**{"train.max_steps": 3})
    result = engine.run_training(config, optim__lr=2e-3, **{"eval.every_steps": 1})
    assert result["best_step"] in (1, 2, 3)
    recipe = (Path(config.run.folder) / "last" / "recipe.toml").read_text()
    assert "lr = 0.002" in recipe


def test_a_run_is_used_any_number_of_times_in_one_process(tiny, reviews):
    config = tiny(**{"train.max_steps": 4})
    engine.run_training(config)
    rows = rows_of(reviews)[:12]
    first, second = (engine.predict_rows(config.run.folder, [row["text"] for row in rows]) for _ in range(2))
    assert first == second
    assert [row["id"] for row in first] == [str(i) for i in range(1, 13)]
    by_dict = engine.predict_rows(config.run.folder, rows)
    assert [row["id"] for row in by_dict] == [row["id"] for row in rows]
    assert [row["logits"] for row in by_dict] == [row["logits"] for row in first]
    by_row = engine.predict_rows(config.run.folder, [Row(text=row["text"]) for row in rows])
    assert by_row == first


def test_rows_are_predicted_as_the_command_predicts_their_file(tiny, tmp_path, reviews):
    config = tiny(**{"train.max_steps": 4})
    engine.run_training(config)
    out = tmp_path / "out.jsonl"
    arguments = [config.run.folder, "--input", reviews, "--output", out, "--run.device", "cpu"]
    assert run_module("engine.predict", *arguments).returncode == 0
    of_file = [json.loads(line) for line in out.read_text().splitlines()]
    assert engine.predict_rows(config.run.folder, rows_of(reviews)) == of_file
    measured = tmp_path / "metrics.json"
    arguments = [config.run.folder, "--data.test", reviews, "--output", measured, "--run.device", "cpu"]
    assert run_module("engine.evaluate", *arguments).returncode == 0
    others = ("checkpoint", "data", "examples", "left_out", "per_class", "confusion_matrix", "calibration")
    expected = {k: v for k, v in json.loads(measured.read_text()).items() if k not in others}
    assert engine.evaluate_rows(config.run.folder, rows_of(reviews)) == expected


def test_a_mistake_is_an_error_with_the_row(tiny):
    config = tiny(**{"train.max_steps": 2})
    with pytest.raises(DataError, match=r"train_rows:2: no column 'label'"):
        engine.run_training(config, train_rows=[{"text": "good film", "label": "a"}, {"text": "bad film"}])
    engine.run_training(config)
    with pytest.raises(ConfigError, match=r"is a pair, and this model reads one text"):
        engine.predict_rows(config.run.folder, [("one", "two")])
    with pytest.raises(ConfigError, match=r"--optim\.lr has no effect on a trained model"):
        engine.predict_rows(config.run.folder, ["one"], **{"optim.lr": 1.0})
    with pytest.raises(ConfigError, match=r"unknown setting .eval\.batchtokens"):
        engine.predict_rows(config.run.folder, ["one"], **{"eval.batchtokens": 1})
    with pytest.raises(ConfigError, match="no such run folder"):
        engine.predict_rows("runs/none", ["one"])


def test_pairs_of_texts_are_read_where_the_model_reads_two(tiny, reviews):
    rows = [row | {"second": row["text"][::-1]} for row in rows_of(reviews)]
    config = tiny(**{"train.max_steps": 2, "data.text_pair_column": "second"})
    engine.run_training(config, train_rows=rows)
    pairs = [(row["text"], row["second"]) for row in rows[:5]]
    by_pair = engine.predict_rows(config.run.folder, pairs)
    by_dict = engine.predict_rows(config.run.folder, [{k: row[k] for k in ("text", "second")} for row in rows[:5]])
    assert by_pair == by_dict


def test_a_config_is_made_of_settings_alone(checkpoint_folder, tmp_path, reviews):
    """No recipe at all."""
    settings = {"model.name": str(checkpoint_folder), "model.pooling": "cls", "data.max_length": 32}
    config = override(Config(), settings | {"run.folder": str(tmp_path / "run"), "train.max_steps": 2})
    assert engine.run_training(config, train_rows=rows_of(reviews))["best_step"] > 0


class Frame(list):
    """Iterates over the names of its columns, as a data frame does."""

    columns = ("text", "label")


@pytest.mark.parametrize(
    "rows",
    ["the cat", b"x", {"text": ["a", "b"]}, Path("x.jsonl"), Frame(["text", "label"]), 3],
    ids=lambda rows: type(rows).__name__,
)
def test_what_is_no_list_of_rows_is_refused(tiny, trained, rows):
    """Some of these can be iterated over, and would be predicted for as texts."""
    config = tiny(**{"train.max_steps": 2})
    with pytest.raises(DataError, match=r"^train_rows = .* is not a list of rows"):
        engine.run_training(config, train_rows=rows)
    for function in (engine.predict_rows, engine.evaluate_rows):
        with pytest.raises(DataError, match=r"^rows = .* is not a list of rows"):
            function(trained, rows)
    with pytest.raises(ConfigError, match=r"\{\} is not a recipe: give a Config"):
        engine.run_training({})


def test_rows_may_come_from_a_generator(tiny, trained, reviews):
    rows = rows_of(reviews)
    config = tiny(**{"train.max_steps": 2, "augment.text.delete": 0.2})
    assert engine.run_training(config, train_rows=(row for row in rows))["best_step"] > 0
    assert engine.predict_rows(trained, (row for row in rows)) == engine.predict_rows(trained, rows)


@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_signal_handlers_are_those_of_the_caller_afterwards(tiny, monkeypatch, end):
    """In a notebook a later Ctrl-C must interrupt the cell, however the run ended."""
    from engine import train

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def evaluate(model: object, examples: Sized, context: object) -> dict[str, float]:
        assert signal.getsignal(signal.SIGINT) != before[0]
        if end == "failed":
            raise RuntimeError("mine")
        if end == "stopped" and len(examples):  # once: a second signal ends the process
            os.kill(os.getpid(), signal.SIGINT)
        return {"accuracy": 1.0}

    monkeypatch.setattr(train, "evaluate", evaluate)
    expected = {
        "done": nullcontext(),
        "failed": pytest.raises(RuntimeError),
        "stopped": pytest.raises(KeyboardInterrupt),
    }
    with expected[end]:
        engine.run_training(tiny(**{"train.max_steps": 4, "eval.every_steps": 2}))
    assert [signal.getsignal(number) for number in numbers] == before


def test_importing_the_engine_does_not_import_its_functions():
    code = (
        "import sys, engine; bad = {'torch', 'engine.api'} & {*sys.modules}; engine.predict_rows; raise SystemExit(bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() in ("", "set()")
    with pytest.raises(AttributeError, match="no attribute 'predict_row'"):
        _ = engine.predict_row


def test_a_recipe_is_written_as_the_command_writes_it(tmp_path, reviews, checkpoint_folder, monkeypatch):
    from engine import new

    monkeypatch.chdir(tmp_path)
    settings = {"model.name": str(checkpoint_folder), "run.plugins": (), "train.tf32": True}
    written = engine.write_recipe("text-classification", reviews, tmp_path / "a.toml", **settings, optim__lr=1e-3)
    assert written == tmp_path / "a.toml"
    given = [
        f"--model={checkpoint_folder}",
        "--train.tf32=true",
        "--optim.lr=0.001",
        "--run.plugins=",
        "--output=b.toml",
    ]
    assert new.main(["text-classification", f"--data={reviews}", *given]) == 0
    assert read_recipe("a.toml") == override(read_recipe("b.toml"), {"run.folder": "runs/a"})
    with pytest.raises(ConfigError, match=r"a\.toml exists"):
        engine.write_recipe("text-classification", reviews, "a.toml", **settings)
    assert engine.write_recipe("text-classification", reviews, "a.toml", force=True, **settings) == Path("a.toml")


def test_a_report_is_written_where_it_is_said(trained, tmp_path):
    assert engine.write_report(trained, predict=False) == trained / "report.html"
    assert "Nothing was predicted" in (trained / "report.html").read_text(encoding="utf-8")
    assert engine.write_report(trained / "best", predict=False) == trained / "report.html"
    page = engine.write_report(trained, trained, output=tmp_path / "page.html", run__device="cpu")
    assert page == tmp_path / "page.html"
    assert "<svg" in page.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="name a run folder"):
        engine.write_report()
    with pytest.raises(ConfigError, match=r"optim\.lr has no effect on a trained model"):
        engine.write_report(trained, optim__lr=1.0)
