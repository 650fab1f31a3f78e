"""The log of a run: its rates, TensorBoard, and the evaluation of training examples."""

from __future__ import annotations

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
from support.runs import logged_rows, open_log, run_training

from engine import log as logs
from engine.config import ConfigError


def test_rates_leave_out_only_evaluation_and_saving(tmp_path, monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    log = open_log(tmp_path, total=8)

    def steps(numbers):
        for step in numbers:
            now.seconds += 2
            log.count_step(step, samples=8, tokens=100, waited=0.5)

    def evaluation(step):
        now.seconds += 30
        log.log_evaluation(step, {"accuracy": 1.0}, {}, True, seconds=30)
        now.seconds += 50  # of saving
        log.restart_clock()

    steps([1, 2])
    evaluation(2)  # before the first training line
    steps([3])
    evaluation(3)
    steps([4])
    log.log_step(4, 0.5, 1e-3, 1.0, {})
    evaluation(4)  # right after a training line
    steps([5, 6])
    log.log_step(6, 0.5, 1e-3, 1.0, {})
    steps([7, 8])
    log.log_step(8, 0.5, 1e-3, 1.0, {})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["samples_per_second"] for row in rows] == [4, 4, 4]
    assert [row["tokens_per_second"] for row in rows] == [50, 50, 50]
    assert [row["data_wait_seconds"] for row in rows] == [2, 1, 1]


@pytest.mark.parametrize("dry", [False, True])
def test_missing_tensorboard_is_found_before_any_file_is_read(tiny, monkeypatch, dry):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else original(name, *more)
    )
    config = tiny(**{"log.report_to": "wandb,tensorboard", "data.train": "nowhere.jsonl", "run.dry_run": dry})
    with pytest.raises(ConfigError, match=r"log\.report_to = tensorboard needs the tensorboard package: pip install"):
        run_training(config)


def test_training_examples_are_evaluated_if_the_recipe_says_so(tiny, capsys):
    config = tiny(**{"eval.train_subset_size": 30, "data.max_train_examples": 60})
    run_training(config)
    rows = [row for row in logged_rows(config.run.folder) if "evaluation" in row]
    assert len(rows) == 4
    assert all(row["training"].keys() == row["evaluation"].keys() for row in rows)
    assert all(row["training"] != row["evaluation"] for row in rows)
    shown = capsys.readouterr().out
    assert "60 training and 12 validation examples" in shown
    assert len(re.findall(r"^ +training    accuracy \S+  .*loss ", shown, re.MULTILINE)) == 4
    plain = tiny(**{"data.max_train_examples": 60, "run.folder": f"{config.run.folder}-plain"})
    run_training(plain)
    assert [{k: v for k, v in row.items() if k != "training"} for row in logged_rows(config.run.folder)] == logged_rows(
        plain.run.folder
    )  # nothing else changes


@pytest.mark.parametrize(("old", "new"), [("loss", "lo}s"), ("0.5", '"x"'), ("best", "bes|"), ("evaluation", "eva")])
def test_f03_damaged_line_of_the_log_ends_no_run(tmp_path, old, new):
    row = '{"step": 1, "evaluation": {"loss": 0.5, "accuracy": 0.5}, "best": true}\n'
    (tmp_path / "metrics.jsonl").write_text(row + row.replace(old, new))
    log = open_log(tmp_path, start=2, total=2)
    assert log.table().splitlines()[1].split()[:3] == ["1", "0.5000", "0.5000"]
    assert (tmp_path / "metrics.jsonl").read_text().startswith(row)
    log.close()


def test_f04_log_of_a_folder_that_became_read_only(tmp_path, monkeypatch, capsys):
    log = open_log(tmp_path, total=1)
    real = log.file
    log.file = open(tmp_path / "metrics.jsonl", "rb", buffering=0)  # noqa: SIM115, it can be neither written nor cut
    log.log_step(1, 0.5, 1e-3, 1.0, {})
    log.file.close()
    log.file = real
    log.log_step(2, 0.5, 1e-3, 1.0, {})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]
    assert capsys.readouterr().out.count("cannot be written") == 1
