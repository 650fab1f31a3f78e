"""A metric of one's own: a function of all predictions and references, from a file that --run.plugins names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cases import evaluation, predictions
from support.runs import logged_rows, run_training, tiny_config

from engine.config import ConfigError
from engine.errors import TrainingError
from engine.plugins import load_plugins
from engine.tasks import TASKS, find_task

SHARE = """
def share_of_positives(predictions, references):
    right = [p == r for p, r in zip(predictions, references, strict=True) if r == "positive"]
    return sum(right) / len(right)
"""


@pytest.fixture(autouse=True)
def _tables_as_they_were():
    yield
    load_plugins([])


def plugin(folder: Path, text: str) -> str:
    path = folder / "my_metric.py"
    path.write_text(text)
    load_plugins([str(path)])
    return str(path)


@pytest.mark.parametrize("table", ["", '\nMETRICS = {"share_of_positives": share_of_positives}\n'])
def test_it_is_watched_and_is_that_of_the_predictions(table, checkpoint_folder, reviews, tmp_path):
    path = plugin(tmp_path, SHARE + table)
    given = {"run.plugins": path, "eval.metric": "share_of_positives", "eval.mode": "max", "train.max_steps": 5}
    config = tiny_config(checkpoint_folder, reviews, tmp_path / "run", given)
    result = run_training(config)
    (row,) = [row for row in logged_rows(tmp_path / "run") if "evaluation" in row]
    assert row["evaluation"]["share_of_positives"] == result["best_share_of_positives"]
    found = evaluation(tmp_path / "run", reviews, "--run.plugins", path)
    made = predictions(tmp_path / "run", reviews, "--run.plugins", path)
    truth = [json.loads(line)["label"] for line in reviews.read_text().splitlines()]
    right = [row["label"] == "positive" for row, label in zip(made, truth, strict=True) if label == "positive"]
    assert found["share_of_positives"] == pytest.approx(sum(right) / len(right))
    assert found["share_of_positives"] == pytest.approx(found["recall_positive"])


def test_a_mistake_in_it_is_one_sentence_before_the_first_step(checkpoint_folder, reviews, tmp_path):
    path = plugin(tmp_path, "\n\ndef mine(predictions, references):\n    return len(predicted)\n")
    given = {"run.plugins": path, "eval.metric": "mine", "eval.mode": "max"}
    config = tiny_config(checkpoint_folder, reviews, tmp_path / "run", given)
    with pytest.raises(TrainingError, match=r"'mine' failed in .*my_metric\.py:4: NameError: name 'predicted'"):
        run_training(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_mistakes_are_named(tmp_path):
    plugin(tmp_path, "def mine(predictions, references):\n    return 'much'\n")
    with pytest.raises(TrainingError, match=r"'mine' in .*my_metric\.py:1 should return a number, not 'much'"):
        TASKS["text-classification"].own_metrics["mine"]([], [])
    with pytest.raises(ConfigError, match=r"eval\.metric = 'mine' is not a metric of causal-lm"):
        find_task("causal-lm", "mine")
    with pytest.raises(ConfigError, match=r"should be a function of predictions and references"):
        plugin(tmp_path, "METRICS = {'mine': len}\n")
    with pytest.raises(ConfigError, match=r"has a metric 'accuracy' already"):
        plugin(tmp_path, "def accuracy(predictions, references):\n    return 1\n")
    with pytest.raises(ConfigError, match=r"and no metric, a function of predictions and references: nothing to add"):
        plugin(tmp_path, "def other(a, b):\n    return 1\n")
