"""A checkpoint whose manifest fits and whose state.json or optimizer does not: a sentence, no crash, nothing wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import assert_same_run, logged_rows, run_training, tiny_config
from torch import Tensor

from engine import checkpoint, log, manifest
from engine.config import Config, ConfigError, override
from engine.errors import USER_ERRORS

BIAS = "exp_avg/backbone.embedding_norm.bias"
STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a negative step": lambda run: run["train"].update(step=-5),
    "a huge position": lambda run: run["train"].update(position=2**62),
    "a text": lambda run: run["train"].update(samples="5"),
    "a boolean": lambda run: run["train"].update(step=True),
    "a best value that is a text": lambda run: run["train"].update(best="good"),
    "a best step after the last": lambda run: run["train"].update(best_step=100),
    "another counter": lambda run: run["train"].update(foo=1),
    "no counter": lambda run: run["train"].pop("position"),
    "no counters": lambda run: run.pop("train"),
    "no data": lambda run: run.pop("data"),
    "plugins without names": lambda run: run.update(plugins=[1]),
    "no optimizer": lambda run: run.update(optimizer=None),
    "values in a list": lambda run: run["optimizer"].update(values=[1]),
    "a method of the optimizer": lambda run: run["optimizer"].update(values={"step/optimizer": 3}),
    "its groups": lambda run: run["optimizer"].update(values={"param_groups/optimizer": 3}),
    "parameters of a group": lambda run: run["optimizer"].update(values={"params/group 0": 3}),
    "a value that is no number": lambda run: run["optimizer"].update(values={"k/group 0": "abc"}),
}
CONTENTS = {"nothing": "", "a list": "[]", "NaN": "NaN", "deep": "[" * 100_000, "digits": "9" * 10_000}
OPTIMIZERS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no tensors": lambda tensors: tensors.clear(),
    "a tensor is missing": lambda tensors: tensors.pop(BIAS),
    "another shape": lambda tensors: tensors.update({BIAS: torch.zeros(3)}),  # AdamW's kernel wrote beyond it
    "another count": lambda tensors: tensors.update({BIAS.replace("exp_avg", "step"): torch.zeros(3)}),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint_folder, reviews) -> Config:
    config = tiny_config(checkpoint_folder, reviews, tmp_path_factory.mktemp("run"), {"train.max_steps": 3})
    run_training(config)
    return config


@pytest.fixture
def copied(finished, tmp_path) -> Config:
    """A copy of a run that has ended, to be resumed."""
    shutil.copytree(finished.run.folder, tmp_path / "run")
    return override(
        finished,
        {"run.folder": str(tmp_path / "run"), "run.resume": "yes", "train.max_steps": 4, "run.allow_changes": True},
    )


def seal(config: Config) -> Path:
    last = Path(config.run.folder) / "last"
    (last / "manifest.json").unlink()
    manifest.seal(last)
    return last


@pytest.mark.parametrize("name", STATES)
def test_f14_a_state_of_other_types_is_a_sentence(copied, name):
    path = Path(copied.run.folder) / "last/state.json"
    run = json.loads(path.read_text())
    STATES[name](run)
    path.write_text(json.dumps(run))
    seal(copied)
    with pytest.raises(
        ConfigError, match=r"state\.json is not the state of a run|not have the state of this optimizer"
    ):
        run_training(copied)


@pytest.mark.parametrize("name", CONTENTS)
def test_f14_a_state_that_is_none_is_a_sentence(copied, name):
    (Path(copied.run.folder) / "last/state.json").write_text(CONTENTS[name])
    last = seal(copied)
    with pytest.raises(USER_ERRORS, match=r"state\.json"):
        run_training(copied)
    with pytest.raises(USER_ERRORS, match=r"state\.json"):  # for evaluation and prediction
        checkpoint.read_plugin_checksums(last)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_f14_the_state_of_another_optimizer_is_a_sentence(copied, name):
    path = Path(copied.run.folder) / "last/optimizer.safetensors"
    tensors = load_file(path)
    OPTIMIZERS[name](tensors)
    save_file(tensors, path)
    seal(copied)
    with pytest.raises(ConfigError, match="does not have the state of this optimizer"):
        run_training(copied)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "objective.safetensors"])
def test_f14_a_file_that_is_none_of_tensors_is_a_sentence(copied, name):
    (Path(copied.run.folder) / "last" / name).write_bytes(b"x" * 100)
    seal(copied)
    with pytest.raises(USER_ERRORS, match=f"{name} is not a complete safetensors file"):
        run_training(copied)


def test_a_link_in_the_place_of_last_is_replaced(tiny, tmp_path):
    config = tiny(**{"train.max_steps": 10, "run.folder": str(tmp_path / "run")})
    run_training(config)
    for target in ("/nowhere/at/all", "last"):
        shutil.rmtree(tmp_path / "run/last")
        (tmp_path / "run/last").symlink_to(target)
        run_training(override(config, {"run.resume": "yes"}))
        assert checkpoint.verify(tmp_path / "run/last") is None


def test_a_lock_that_is_a_pipe_is_a_sentence(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/.lock")
    with pytest.raises(ConfigError, match=r"its \.lock is not a regular file"):
        run_training(tiny())
    with pytest.raises(ConfigError, match="should not have a NUL"):
        run_training(tiny(**{"run.folder": "a\0b"}))


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_log_that_was_removed_is_written_again(tiny, tmp_path, monkeypatch, capsys, what):
    """An editor saves a file by another one with its name."""
    through = tiny(**{"train.max_steps": 6, "run.folder": str(tmp_path / "through")})
    run_training(through)
    ours = log.RunLog.log_step

    def log_step(self, step, *numbers):
        if step == 3:
            self.path.unlink()
            if what == "replaced":
                self.path.write_text("edited\n")
        ours(self, step, *numbers)

    monkeypatch.setattr(log.RunLog, "log_step", log_step)
    config = override(through, {"run.folder": str(tmp_path / "run")})
    run_training(config)
    assert_same_run(config.run.folder, through.run.folder)
    assert capsys.readouterr().out.count("metrics.jsonl was removed or replaced; it is written again") == 1


def test_deep_lines_of_a_log_are_left_out(copied):
    path = Path(copied.run.folder) / "metrics.jsonl"
    deep = ["[" * 100_000, '{"step": 1, "a": ' + '{"a": ' * 2000 + "1" + "}" * 2001]
    path.write_text("\n".join([*deep, path.read_text()]))
    run_training(copied)
    assert [row["step"] for row in logged_rows(copied.run.folder)] == [1, 2, 3, 3, 4, 4, 4]
