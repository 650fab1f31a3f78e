"""A watched metric that cannot compare models: said before training, and ties go to the lower loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.cases import dry_run, run, settings_for, write_file
from support.task_data import DATA

from engine import tasks
from engine.errors import TrainingError
from engine.state import TrainState
from engine.watch import explain_best

TEXT = "the cat saw a house"
RED = {"text": TEXT, "label": "red"}
ENTITY = {"tokens": ["anna", "saw", "rome"], "tags": ["B-NAME", "O", "O"]}
TEXTS = [{"text": TEXT, "label": label} for label in ("red", "blue") for _ in range(4)]
LABELLED = [{"text": TEXT, "labels": ["red"]}] * 4
SCORED = [{"text": TEXT, "score": score} for score in (1, 2, 3, 4)]
RELATION = {"text": "anna lives in rome .", "subject": "anna", "object": "rome"}
RELATED = [RELATION | {"relation": relation} for relation in ("lives_in", "no_relation")] * 4


def related(*pairs: tuple[str, str], names: tuple[str, str]) -> list[dict[str, str]]:
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


SUMMARY, PAIR = ("text", "summary"), ("source", "target")
# {name: (task, training rows, validation rows, the watched metric, a part of the warning)}
CASES = {
    "one class": ("text-classification", TEXTS, [RED] * 3, "accuracy", "'red' is the only class there"),
    "one row": ("text-classification", TEXTS, [RED], "accuracy", "one example"),
    "no label": ("multi-label-classification", LABELLED, [{"text": TEXT, "labels": []}] * 3, "f1_micro", "has a label"),
    "constant": ("text-regression", SCORED, [{"text": TEXT, "score": 2}] * 3, "spearman", "eval.metric = mse can"),
    "no entity": ("token-classification", [ENTITY] * 4, [ENTITY | {"tags": ["O"] * 3}] * 2, "f1", "in an entity"),
    "no relation": ("relation-extraction", RELATED, [RELATED[1]] * 3, "f1", "'no_relation'"),
    "punctuation": (
        "summarization",
        related((TEXT, "a cat"), names=SUMMARY),
        [("a", "!"), ("b", "?")],
        "rougeL",
        "word",
    ),
    "one word": ("summarization", related((TEXT, "a cat"), names=SUMMARY), [("a", "b"), ("b", "c")], "rouge2", "two"),
    "three words": ("translation", related((TEXT, "a cat"), names=PAIR), [("a", "a b c"), ("b", "x")], "bleu", "four"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_metric_that_cannot_judge_is_said_before_training(name, tmp_path, capsys):
    task, train, validation, metric, warning = CASES[name]
    if isinstance(validation[0], tuple):
        validation = related(*validation, names=PAIR if task == "translation" else SUMMARY)
    file = write_file(tmp_path / "validation.jsonl", validation)
    settings = settings_for(task, tmp_path, train, data__validation=str(file), eval__metric=metric)
    (line,) = [line for line in dry_run(settings, capsys).splitlines() if metric in line and "warning" in line]
    assert warning in line


@pytest.mark.parametrize("task", DATA)
def test_no_warning_where_the_metric_can_judge(task, tmp_path, capsys):
    from support import task_data

    settings = task_data.write(task, tmp_path) | {"run.folder": str(tmp_path / "run")}
    assert "cannot compare models" not in dry_run(settings, capsys)


def script(monkeypatch: pytest.MonkeyPatch, metric: str, values: list[tuple[float, float]]) -> None:
    """Replace the metrics of text classification: each evaluation takes the next (metric, loss)."""
    left = iter(values)

    def compute_metrics(statistics, labels):
        value, loss = next(left)
        return {metric: value, "loss": loss}

    changed = replace(tasks.TASKS["text-classification"], compute_metrics=compute_metrics)
    monkeypatch.setitem(tasks.TASKS, "text-classification", changed)


def test_ties_keep_the_lower_loss_and_the_end_says_so(tmp_path, capsys, monkeypatch):
    script(monkeypatch, "accuracy", [(0.5, 3.0), (0.5, 1.0), (0.5, 2.0)])
    settings = settings_for("text-classification", tmp_path, TEXTS, eval__every_steps=1, train__max_steps=3)
    printed = run(settings, capsys)
    assert "accuracy was 0.5 in all 3 evaluations" in printed
    assert json.loads((tmp_path / "run/best/state.json").read_text())["train"]["step"] == 2


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_a_metric_that_is_never_a_number_does_not_end_in_silence(loss, tmp_path, capsys, monkeypatch):
    script(monkeypatch, "accuracy", [(math.nan, loss), (math.nan, loss), (0.25, loss)])
    test = write_file(tmp_path / "test.jsonl", TEXTS)
    settings = settings_for("text-classification", tmp_path, TEXTS, eval__every_steps=1, data__test=str(test))
    if math.isnan(loss):
        with pytest.raises(TrainingError, match="accuracy and the loss were not numbers in any evaluation"):
            run(settings, capsys)
        assert not Path(tmp_path / "run/best").exists()
    else:
        printed = run(settings, capsys)
        assert "accuracy was not a number in any evaluation; best/ has the weights with the lowest loss" in printed
        assert "test_accuracy 0.25" in printed


def test_few_or_different_values_need_no_explanation():
    state = TrainState(best=0.5, best_step=1, best_loss=1.0)
    assert explain_best(state, "f1", [0.5, 0.5]) == explain_best(state, "f1", [0.5, 0.5, 0.25]) == ""
