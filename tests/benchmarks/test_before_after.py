"""benchmarks.before_after: equal and different losses of two trees, and the ratio of their speeds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import before_after

ROOT = Path(before_after.__file__).parent.parent


def test_only_numbers_of_the_mathematics_are_compared(tmp_path):
    rows = [
        {"step": 1, "loss": 0.5, "lr": 1e-3, "samples_per_second": 7.0, "peak_memory_mb": 9},
        {"step": 1, "evaluation": {"accuracy": 0.5, "seconds": 3.0}},
        {"event": "start", "torch": "2"},
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"step 1 loss": 0.5, "step 1 lr": 1e-3, "step 1 evaluation accuracy": 0.5, "step 1 step": 1}
    assert before_after.read_numbers(log) == expected


def test_the_first_number_that_differs_is_named():
    before = {"step 1 loss": 0.5, "step 2 loss": 0.25}
    assert before_after.describe(before, dict(before)) == "all 2 numbers are identical"
    after = before | {"step 2 loss": 0.25000000000000006}
    said = before_after.describe(before, after)
    assert said == "1 number differs, first step 2 loss: 0.25 before, 0.25000000000000006 after"
    assert before_after.describe(before, {"step 1 loss": 0.5}).startswith("1 number differs")


@pytest.mark.parametrize(("loss", "code"), [(0.5, 0), (0.25, 1)])
def test_the_exit_code_says_whether_losses_are_equal(monkeypatch, loss, code):
    trees = (Path("before"), Path("after"))

    def call(tree: Path, *command: str) -> None:
        (folder,) = [Path(text.partition("=")[2]) for text in command if text.startswith("--run.folder=")]
        folder.mkdir()
        row = {"step": 1, "loss": loss if tree == trees[1] else 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(row))

    monkeypatch.setattr(before_after, "call", call)
    monkeypatch.setattr(before_after, "extract", lambda commit, folder: trees[0])
    monkeypatch.setattr(before_after, "ROOT", trees[1])
    assert before_after.main(["HEAD", "movie_reviews"]) == code


@pytest.mark.parametrize(("gain", "end"), [(1.5, "second\n"), (1.0, "second, not resolved\n")])
def test_trees_are_timed_in_turn(monkeypatch, capsys, gain, end):
    """Each pair is slower than the one before it; the ratio of a pair does not see that."""
    order, trees = [], (Path("before"), Path("after"))

    def call(tree: Path, *command: str) -> None:
        if command[1] == "benchmarks.timed_training":
            order.append(tree)
            rate = 100.0 / (1 + (len(order) - 1) // 2) * (gain if tree == trees[1] else 1.0)
            Path(command[2]).write_text(json.dumps({"samples_per_second": rate}))

    monkeypatch.setattr(before_after, "call", call)
    monkeypatch.setattr(before_after, "extract", lambda commit, folder: trees[0])
    monkeypatch.setattr(before_after, "ROOT", trees[1])
    assert before_after.main(["HEAD", "--time", "minilm-short", "--runs", "3"]) == 0
    assert order == [*trees] * 3
    assert capsys.readouterr().out.endswith(end)


def test_an_unknown_commit_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: "):
        before_after.extract("no-such-commit", tmp_path)


@pytest.mark.slow
def test_a_changed_tree_is_found_and_an_unchanged_one_is_not(tmp_path):
    """In a repository of its own: first nothing is changed, then the learning rate of the recipe."""
    for name in ("engine", "models", "data", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "before"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "benchmarks.before_after", "HEAD", "review_sentences", "--steps", "2"]
    command += ["--train.global_batch_size=4", "--data.max_train_examples=40", "--data.max_length=16"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "numbers are identical" in done.stdout
    recipe = tmp_path / "engine" / "recipes" / "review_sentences.toml"
    text = recipe.read_text(encoding="utf-8")
    assert text.count("\nlr = ") == 1
    recipe.write_text(text.replace("\nlr = ", "\nlr = 2"), encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "numbers differ, first step 1 lr" in done.stdout
