"""When last/ is saved, what is kept of it, and that a run resumed from any of these saves is the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import CPU, StopAfter, arguments_of, assert_same_run, run_module, run_training

import models
from engine import checkpoint, train
from engine.checkpoint import verify
from engine.config import CheckpointSettings, ConfigError, override
from engine.distributed import Ranks
from engine.save_schedule import CLOCK_FACTOR, EVALUATION_FACTOR, SaveSchedule
from engine.state import TrainState

ROOT = Path(models.__file__).parent.parent


class CrashError(Exception):
    """Stands for kill -9: nothing more is written."""


def crash_before_step(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    calls = []

    def crashing(*args: object) -> None:
        calls.append(1)
        if len(calls) == count:
            raise CrashError

    monkeypatch.setattr(train.Penalties, "add_gradients_", crashing)


def step_of(folder: Path) -> int:
    return json.loads((folder / "state.json").read_text())["train"]["step"]


# The decision


STATE = TrainState(step=8, position=9, evaluated_step=8)


def schedule(seconds=1.0, evaluated_step=8, position=8, **settings):
    """A schedule whose last save had these counters."""
    made = SaveSchedule(CheckpointSettings(**settings), CPU, TrainState(7, position, evaluated_step=evaluated_step))
    made.seconds = seconds
    return made


CASES = {
    # (the schedule, seconds since the last save, due)
    "just saved": (schedule(), 1, False),
    "minutes": (schedule(), 601, True),
    "fewer minutes": (schedule(every_minutes=0.5), 51, True),
    "too soon": (schedule(every_minutes=0.5), 29, False),
    "too slow a disk": (schedule(every_minutes=0.5, seconds=10), 30 * 10, False),
    "rare on a slow disk": (schedule(every_minutes=0.5, seconds=10), CLOCK_FACTOR * 10, True),
    "no minutes": (schedule(every_minutes=0.0), 1e9, False),
    "evaluation": (schedule(evaluated_step=4), EVALUATION_FACTOR, True),
    "evaluation too soon": (schedule(evaluated_step=4), EVALUATION_FACTOR - 1, False),
    "each evaluation": (schedule(evaluated_step=4, every_minutes=0.0), 0, True),
    "steps": (schedule(every_steps=4, seconds=1e9), 0, True),
    "other steps": (schedule(every_steps=3), 0, False),
    "nothing new": (schedule(every_steps=4, position=9), 1e9, False),
    "not kept": (schedule(evaluated_step=4, keep=("best",)), 1e9, False),
}


@pytest.mark.parametrize("name", CASES)
def test_when_a_save_is_due(name):
    saves, elapsed, due = CASES[name]
    assert saves.is_due(STATE, elapsed) is due


def test_only_rank_0_says_how_long_ago_it_was():
    other = SaveSchedule(CheckpointSettings(), Ranks(1, 2, CPU.device), None)
    other.saved_at -= 100
    assert other.elapsed() == 0
    assert SaveSchedule(CheckpointSettings(), CPU, None).elapsed() >= 0


def test_nothing_is_saved_by_steps_before_the_first():
    assert not schedule(every_steps=4).is_due(TrainState(), 0)


# The saves of a run


@pytest.mark.parametrize("evaluations", [5, 100])
def test_p04_killed_after_a_save_by_steps_loses_at_most_these(tiny, monkeypatch, evaluations):
    """At step 6, amid the first epoch; with an evaluation every 100 steps all was lost before."""
    through = tiny(**{"run.folder": f"{tiny().run.folder}-through", "eval.every_steps": evaluations})
    result = run_training(through)
    config = tiny(**{"checkpoint.every_steps": 3, "eval.every_steps": evaluations})
    with monkeypatch.context() as patch:
        crash_before_step(patch, 8)
        with pytest.raises(CrashError):
            run_training(config)
    assert step_of(Path(config.run.folder) / "last") == 6
    assert run_training(override(config, {"run.resume": "yes"})) == result
    assert_same_run(config.run.folder, through.run.folder)


def test_saves_by_the_clock_and_a_wait_after_evaluations(tiny, monkeypatch):
    """The clock of rank 0 stands still: the first evaluation saves, the others wait, the end saves."""
    saved = []
    original = checkpoint.save

    def save(target, contents, state, ranks):
        saved.append((target.name, state.step))
        original(target, contents, state, ranks)
        return 1.0

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(SaveSchedule, "elapsed", lambda self: 5.0 if self.seconds else 0.0)
    run_training(tiny(**{"checkpoint.every_minutes": 10.0, "eval.every_steps": 1, "train.max_steps": 6}))
    assert [step for name, step in saved if name == "last"] == [1, 6]
    saved.clear()
    monkeypatch.setattr(SaveSchedule, "elapsed", lambda self: 601.0)
    run_training(
        tiny(**{"checkpoint.every_minutes": 10.0, "train.max_steps": 4, "run.folder": f"{tiny().run.folder}2"})
    )
    assert [step for name, step in saved if name == "last"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("keep", "folders"), [("best", {"best"}), ("last,best", {"best", "last"}), ("best,previous,last", None)]
)
def test_only_the_chosen_checkpoints_are_kept(tiny, keep, folders, capsys):
    config = tiny(**{"checkpoint.keep": keep})
    folder = Path(config.run.folder)
    assert run_training(config, StopAfter(12)) is None
    assert {path.name for path in folder.iterdir() if path.is_dir()} == (folders or {"best", "last", "previous"})
    assert all(verify(folder / name) is None for name in folders or ())
    assert ("it cannot be resumed, since checkpoint.keep" in capsys.readouterr().out) == (keep == "best")
    if keep == "best":
        with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
            run_training(override(config, {"run.resume": "yes"}))
    else:
        changed = override(config, {"run.resume": "yes", "checkpoint.keep": "last,best"})
        run_training(changed)  # previous/ of the longer list goes
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {"best", "last"}


@pytest.mark.parametrize("keep", ["", "last", "previous,best", "best,best", "best,newest"])
def test_a_list_that_keeps_too_little_is_refused(tiny, keep):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep = .*: choose best; last, best; or last, previous, best"):
        tiny(**{"checkpoint.keep": keep})
    with pytest.raises(ConfigError, match=r"checkpoint\.every_steps = 5 has no effect without last"):
        tiny(**{"checkpoint.keep": "best", "checkpoint.every_steps": 5})


def test_f02_crash_between_two_renames_keeps_the_only_last(tiny, monkeypatch):
    config = tiny(**{"checkpoint.keep": "last,best"})
    assert run_training(config, StopAfter(7)) is None
    folder = Path(config.run.folder)
    (folder / "last").rename(folder / ".old-last")
    run_training(override(config, {"run.resume": "yes"}))
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"best", "last"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_f01_killed_right_after_a_save_amid_an_epoch(tiny, tmp_path, ranks):
    through = tiny(**{"run.folder": str(tmp_path / "through"), "eval.every_steps": 100})
    assert run_module("engine.train", *arguments_of(through, tmp_path / "a.toml"), ranks=ranks).returncode == 0
    config = tiny(**{"checkpoint.every_steps": 4, "eval.every_steps": 100, "run.resume": "auto", "train.max_steps": 20})
    arguments = arguments_of(config, tmp_path / "b.toml")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    killed = subprocess.Popen(
        [sys.executable, *launcher, "-m", "engine.train", *arguments],
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while not (tmp_path / "run/last").exists() and killed.poll() is None:
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = run_module("engine.train", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "through")


def test_auto_does_not_write_over_a_run_that_ended_without_last(tiny):
    config = tiny(**{"checkpoint.keep": ("best",), "run.resume": "auto", "train.max_steps": 2})
    run_training(config)
    weights = (Path(config.run.folder) / "best" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"holds the best/ of a run that has ended"):
        run_training(config)
    assert (Path(config.run.folder) / "best" / "model.safetensors").read_bytes() == weights
