"""P4, P5: a run that was stopped and goes on is the run that was never stopped, bit for bit; and who may go on."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
from support.runs import (
    StopAfter,
    assert_same_run,
    assert_same_tensors,
    logged_rows,
    run_training,
    script_metric,
    tiny_config,
    write_reviews,
)

from engine import checkpoint, run_folder, train
from engine import config as configs
from engine.config import ConfigError, override

VARIANTS = {
    "whole": {},
    "micro-batches": {"train.micro_batch_size": 3},
    "token budget": {"train.micro_batch_tokens": 100},
    "workers": {"train.micro_batch_size": 5, "data.num_workers": 2},
    "fp16": {"train.precision": "fp16", "train.micro_batch_size": 5},
    "lora": {"model.lora.rank": 4},
}


@pytest.fixture(scope="module")
def uninterrupted(checkpoint_folder, reviews, tmp_path_factory):
    """uninterrupted(variant) -> (folder, result) of a run that went through, made once."""

    @functools.cache
    def make(variant):
        config = tiny_config(checkpoint_folder, reviews, tmp_path_factory.mktemp("through") / "run", VARIANTS[variant])
        return Path(config.run.folder), run_training(config)

    return make


def going_on(config, resume="yes", **changes):
    return override(config, {"run.resume": resume} | changes)


@pytest.mark.parametrize(("variant", "steps"), [*(("whole", n) for n in (0, 5, 19)), *((v, 8) for v in VARIANTS)])
def test_p04_stopped_and_resumed_is_never_stopped(tiny, uninterrupted, variant, steps):
    """Before the first step; just after an evaluation; amid the second epoch; before the last step."""
    config = tiny(**VARIANTS[variant])
    assert run_training(config, StopAfter(steps)) is None
    state = json.loads((Path(config.run.folder) / "last/state.json").read_text())["train"]
    assert (state["step"], state["position"]) == (steps, steps)
    through, result = uninterrupted(variant)
    assert run_training(going_on(config)) == result
    assert_same_run(config.run.folder, through)


def test_p04_stopped_after_every_single_step(tiny, uninterrupted):
    config = tiny(**VARIANTS["micro-batches"])
    result = run_training(config, StopAfter(1))
    parts = 1
    while result is None:
        result = run_training(going_on(config), StopAfter(1))
        parts += 1
    assert parts == 20  # nothing stops a run whose last step is done
    through, expected = uninterrupted("micro-batches")
    assert result == expected
    assert_same_run(config.run.folder, through)


def test_the_comparison_can_fail(tiny, uninterrupted):
    config = tiny(**VARIANTS["whole"] | {"run.seed": 1})
    run_training(config)
    with pytest.raises(AssertionError):
        assert_same_run(config.run.folder, uninterrupted("whole")[0])


class CrashError(Exception):
    """Stands for kill -9: nothing is caught, nothing more is written."""


def crash_on_saving(monkeypatch, name, step):
    save = checkpoint.save

    def crashing(target, contents, state, ranks):
        if target.name == name and state.step == step:
            raise CrashError
        return save(target, contents, state, ranks)

    monkeypatch.setattr(checkpoint, "save", crashing)


def test_p04_a_crash_between_two_checkpoints(tiny, uninterrupted, monkeypatch):
    """Steps 6 and 7 were logged, and will be taken and logged again; the last line was being written."""
    config, calls = tiny(), []

    def crashing(*args):
        calls.append(1)
        if len(calls) == 8:
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(train.Penalties, "add_gradients_", crashing)
        with pytest.raises(CrashError):
            run_training(config)
    log = Path(config.run.folder) / "metrics.jsonl"
    assert [row["step"] for row in logged_rows(config.run.folder)][-2:] == [6, 7]
    with log.open("a") as stream:
        stream.write('{"step": 8, "lo')
    run_training(going_on(config))
    assert_same_run(config.run.folder, uninterrupted("whole")[0])


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("step", [5, 10])
def test_p04_a_crash_before_or_between_saving_best_and_last(tiny, uninterrupted, monkeypatch, name, step):
    """The metric rises, so that there is a best/ to save at both evaluations."""
    script_metric(monkeypatch, [0.1, 0.1, 0.2, 0.3, 0.4] if step == 5 else [0.1, 0.2, 0.2, 0.3, 0.4])
    config = tiny()
    with monkeypatch.context() as patch:
        crash_on_saving(patch, name, step)
        with pytest.raises(CrashError):
            run_training(config)
    assert (Path(config.run.folder) / "best").exists() == ((name, step) != ("best", 5))
    if step == 5:  # no last/ yet: only a fresh start is left
        with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
            run_training(going_on(config, "yes"))
    result = run_training(going_on(config, "auto"))
    assert result["best_step"] == 20
    through = uninterrupted("whole")[0]
    for file in ("model", "optimizer"):
        assert_same_tensors(Path(config.run.folder) / f"last/{file}.safetensors", through / f"last/{file}.safetensors")
    rows = logged_rows(config.run.folder)
    assert [row["step"] for row in rows if "evaluation" in row] == [5, 10, 15, 20]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))


def test_resume_auto_starts_a_new_run_or_continues_one(tiny, uninterrupted):
    config = tiny(**{"run.resume": "auto"})
    assert run_training(config, StopAfter(9)) is None
    assert run_training(config, StopAfter(9)) is None
    run_training(config)
    assert_same_run(config.run.folder, uninterrupted("whole")[0])


def test_start_refuses_a_finished_run_and_resume_an_empty_folder(tiny):
    config = tiny(**{"train.max_steps": 2})
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        run_training(going_on(config))
    run_training(config)
    with pytest.raises(ConfigError, match=r"already holds a run \(last, best\): --resume continues it"):
        run_training(config)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_p05_a_run_at_its_end_has_nothing_to_go_on_with(tiny, reviews, capsys):
    config = tiny(**{"data.test": str(reviews)})
    result = run_training(config)
    before = folder_bytes(Path(config.run.folder))
    table = capsys.readouterr().out.split("all steps done")[1]
    assert run_training(going_on(config)) == result
    assert {"test_accuracy", "best_accuracy", "best_step"} < result.keys()
    assert folder_bytes(Path(config.run.folder)) == before
    table, _, _ = table.partition(config.run.folder)
    again, _, rest = capsys.readouterr().out.split("all steps done")[1].partition(config.run.folder)
    assert again == table  # with every evaluation of the run
    assert rest.startswith("/best/README.md is kept as it is; without it, it is written again\n")


@pytest.mark.parametrize("steps", [5, 7, 12, 15])
def test_p05_patience_and_best_survive(tiny, monkeypatch, steps):
    script_metric(monkeypatch, [0.5, math.nan, 0.5, 0.4, 0.9], loss=1.0)
    config = tiny(**{"eval.patience": 3, "train.max_steps": 40})
    assert run_training(config, StopAfter(steps)) is None
    result = run_training(going_on(config))
    assert result == {"best_accuracy": 0.5, "best_step": 5.0}
    state = json.loads((Path(config.run.folder) / "last/state.json").read_text())["train"]
    assert (state["step"], state["bad_evaluations"], state["best"]) == (20, 3, 0.5)
    assert logged_rows(config.run.folder)[-1]["end"] == "out of patience"
    # And the patience is still used up when it is resumed once more.
    before = folder_bytes(Path(config.run.folder))
    assert run_training(going_on(config)) == result
    assert folder_bytes(Path(config.run.folder)) == before


def test_p05_more_patience_is_a_change_that_goes_on(tiny, monkeypatch):
    script_metric(monkeypatch, [0.5, 0.4, 0.6, 0.5])
    config = tiny(**{"eval.patience": 1})
    assert run_training(config) == {"best_accuracy": 0.5, "best_step": 5.0}
    changes = {"eval.patience": 2, "run.allow_changes": True}
    assert run_training(going_on(config, **changes)) == {"best_accuracy": 0.6, "best_step": 15.0}
    assert [row["end"] for row in logged_rows(config.run.folder) if "end" in row] == ["all steps done"]


def test_p05_nan_is_never_the_best(tiny, monkeypatch):
    script_metric(monkeypatch, [math.nan, 0.2, math.nan, 0.1])
    config = tiny()
    assert run_training(config) == {"best_accuracy": 0.2, "best_step": 10.0}
    best = json.loads((Path(config.run.folder) / "best/state.json").read_text())
    assert best["train"]["step"] == 10


def test_p05_without_any_number_the_lowest_loss_is_best(tiny, monkeypatch, reviews):
    script_metric(monkeypatch, [math.nan] * 5)  # the last one is that of the test data
    config = tiny(**{"data.test": str(reviews)})
    result = run_training(config)
    assert result is not None
    losses = {row["step"]: row["evaluation"]["loss"] for row in logged_rows(config.run.folder) if "evaluation" in row}
    assert result["best_step"] == min(losses, key=lambda step: losses[step])
    assert math.isnan(result["best_accuracy"])
    assert result["test_loss"] > 0
    assert checkpoint.verify(Path(config.run.folder) / "best") is None


CHANGES = {
    "rate": {"optim.lr": 2e-3},
    "two": {"train.global_batch_size": 8, "optim.weight_decay": 0.0},
    "length": {"data.max_length": 24},
    "smoothing": {"regularize.label_smoothing": 0.1},
    "more steps": {"train.max_steps": 26},
}


@pytest.fixture
def interrupted(tiny):
    config = tiny()
    assert run_training(config, StopAfter(7)) is None
    return config


@pytest.mark.parametrize("name", ["last", "best"])
def test_f04_a_refused_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch, name):
    new, rename = tmp_path / f".writing-{name}", Path.rename
    for folder in (tmp_path / name, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)

    def refuse(path, target):
        if path == new:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        run_folder.replace(new, tmp_path / name, keep_previous=True)
    assert (tmp_path / name / "file").read_text() == name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, name])


def test_f18_another_pooling_needs_a_new_run(interrupted, tmp_path):
    last = Path(interrupted.run.folder) / "last"
    with pytest.raises(ConfigError, match="cannot go on with another pooling") as error:
        run_training(going_on(interrupted, **{"model.pooling": "mean", "run.allow_changes": True}))
    assert f"--model.name {last} --model.head_init reset" in str(error.value)
    start = {"model.name": str(last), "model.head_init": "reset", "model.pooling": "mean", "run.resume": "no"}
    assert run_training(going_on(interrupted, **start | {"run.folder": str(tmp_path / "new")}))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_f18_another_recipe_is_refused_by_name_unless_allowed(interrupted, capsys, changes):
    before = folder_bytes(Path(interrupted.run.folder))
    with pytest.raises(ConfigError, match="was saved with other settings or data") as error:
        run_training(going_on(interrupted, **changes))
    for key, value in changes.items():
        assert f"{key}: " in str(error.value)
        assert f" -> {value!r}" in str(error.value)
    assert str(error.value).count(" -> ") == len(changes)
    assert folder_bytes(Path(interrupted.run.folder)) == before
    capsys.readouterr()
    assert run_training(going_on(interrupted, **changes | {"run.allow_changes": True}))
    assert f"with changes (run.allow_changes):\n  {next(iter(changes))}: " in capsys.readouterr().out
    steps = changes.get("train.max_steps", 20)
    rows = logged_rows(interrupted.run.folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert [row["end"] for row in rows if "end" in row] == ["all steps done"]


def test_the_recipe_of_a_checkpoint_runs_again(interrupted, tmp_path):
    run_training(going_on(interrupted, **{"optim.lr": 5e-4, "run.allow_changes": True}))
    again = configs.parse([f"{interrupted.run.folder}/last/recipe.toml", "--run.folder", str(tmp_path / "other")], "")
    assert (again.run.resume, again.run.allow_changes, again.optim.lr) == ("no", False, 5e-4)
    assert run_training(again)


def test_f18_other_data_is_refused_unless_allowed(tiny, tmp_path, capsys):
    data = write_reviews(tmp_path / "data.jsonl", 60)
    config = tiny(**{"data.train": str(data)})
    assert run_training(config, StopAfter(3)) is None
    write_reviews(data, 60, seed=1)
    with pytest.raises(ConfigError, match="the encoded training or validation data is not the same"):
        run_training(going_on(config))
    assert run_training(going_on(config, **{"run.allow_changes": True}))
    assert "the encoded training or validation data is not the same" in capsys.readouterr().out


def test_what_is_the_machines_may_change(interrupted, uninterrupted):
    changes = {"log.every_steps": 3, "eval.batch_tokens": 50, "data.num_workers": 1, "run.allow_changes": False}
    run_training(going_on(interrupted, **changes))
    folder, through = Path(interrupted.run.folder), uninterrupted("whole")[0]
    assert_same_tensors(folder / "last/model.safetensors", through / "last/model.safetensors")
    rows = [row["step"] for row in logged_rows(folder) if "loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18, 20]  # the last step is always logged
