"""Every shipped recipe, unchanged and on its own data: two steps, an evaluation, a prediction of a few rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support.runs import StopAfter, assert_same_run, run_training

import models as native
from data.formats.lines import locate
from engine import config as configs
from engine import predict
from engine.config import ConfigError
from engine.tasks import TASKS

ROOT = Path(native.__file__).parent.parent
SHORT = {"train.max_steps": 2, "eval.every_steps": 2, "eval.num_shown_generations": 1, "run.device": "cpu"}


def is_prepared(name: str) -> bool:
    """Return whether a file exists: some data may not be redistributed, or is in another package."""
    if name.startswith("package:") and importlib.util.find_spec(name.removeprefix("package:").split("/")[0]) is None:
        return False
    return name.startswith("package:") or locate(name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", configs.shipped_recipes())
def test_a_recipe_trains_evaluates_and_predicts(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    recipe = configs.read_recipe(name)
    missing = [file for file in (recipe.data.train, recipe.model.name) if not is_prepared(file)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: the first lines of the recipe say how to prepare it")
    writes = {"generate.max_new_tokens": 4} if recipe.run.task in TASKS and TASKS[recipe.run.task].generates else {}
    config = configs.override(recipe, SHORT | writes | {"run.folder": str(tmp_path / "run")})
    result = run_training(config)
    assert result is not None
    assert result["best_step"] == 2
    source = recipe.data.validation or recipe.data.test
    if source and not source.endswith((".gz", "ubyte", ".tar")):
        output = tmp_path / "predictions.jsonl"
        few = tmp_path / f"few{Path(source).suffix}"
        few.write_text("".join(locate(source).read_text(encoding="utf-8").splitlines(keepends=True)[:8]))
        if few.suffix != ".json":
            assert predict.main([str(tmp_path / "run"), "--input", str(few), "--output", str(output)]) == 0
            assert all("id" in json.loads(line) for line in output.read_text().splitlines())


def test_recipe_of_a_dinov2_resumes_exactly_and_dry_runs(tmp_path, capsys):
    few = SHORT | {"data.max_train_examples": 48, "data.test": "", "train.max_steps": 4, "train.global_batch_size": 8}
    recipe = configs.override(configs.read_recipe("fashion_mnist_dinov2"), few | {"run.folder": str(tmp_path / "run")})
    assert not run_training(configs.override(recipe, {"run.dry_run": True}))
    shown = capsys.readouterr().out
    assert "parameters: 805,642, 805,642 of them trained" in shown
    assert not (tmp_path / "run").exists()
    whole = run_training(configs.override(recipe, {"run.folder": str(tmp_path / "whole")}))
    assert run_training(recipe, StopAfter(3)) is None
    assert run_training(configs.override(recipe, {"run.resume": "yes"})) == whole
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_unknown_recipe_is_answered_with_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"did you mean 'movie_reviews'\?"):
        configs.read_recipe("movie_review_")
