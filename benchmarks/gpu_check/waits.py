"""Part 3: no wait of the host for the device in forward and backward, for every task.

torch raises an error where a call waits while torch.cuda.set_sync_debug_mode is "error". A task is trained by
engine.train on the tiny data of the tests; the first step, in which libraries are set up, may wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_check.check import Check, first_line, has_tests, run_training
from engine import checkpoint, config
from engine.config import Config
from engine.precision import Precision
from engine.tasks import TASKS

STEPS = 4
OPTIONS: dict[str, dict[str, Any]] = {  # options that add something to forward or backward, with text-classification
    "class weights": {"regularize.class_weights": ("balanced",)},
    "R-Drop": {"regularize.r_drop_weight": 1.0},
    "FGM": {"regularize.fgm_epsilon": 0.5},
    "activation checkpointing": {"train.activation_checkpointing": True},
    "LoRA": {"model.lora.rank": 2},
}


def run(check: Check) -> None:
    """Train every task for a few steps."""
    if not has_tests():
        check.note("tasks", "not checked: they need the folder tests and pytest")
        return
    if check.device.type != "cuda":
        check.note("waits", "a CPU has none; the steps only run")
    options = [(task, "", {}) for task in TASKS] + [("text-classification", *option) for option in OPTIONS.items()]
    for task, name, settings in options:
        if not check.has_time_for(3, f"{task} {name}".strip()):
            return
        for precision in ("bf16",) if check.device.type == "cuda" else ("fp32",):
            train_task(check, task, name, settings | {"train.precision": precision})


def train_task(check: Check, task: str, name: str, settings: dict[str, Any]) -> None:
    """Write a row: whether a task waited, and where."""
    from support import task_data

    folder = check.scratch / f"{task} {name}".strip().replace(" ", "-")
    folder.mkdir()
    values = task_data.write(task, folder) | {"run.device": check.device.type, "run.folder": str(folder / "run")}
    values |= {"train.max_steps": STEPS, "eval.num_shown_generations": 0, "eval.every_steps": STEPS}
    cfg: Config = config.override(Config(), values | settings)
    found = ""
    try:
        with forbidden_waits(check.device), patch.object(checkpoint, "save", lambda *args: 0.0):
            run_training(check, cfg)
    except RuntimeError as error:
        found = first_line(error)
    check.add(f"{task} {name}".strip(), settings["train.precision"], ok=not found, where=found)


@contextmanager
def forbidden_waits(device: torch.device) -> Iterator[None]:
    """Make a wait for the GPU an error in every forward, backward and clipping of engine.train after the first."""
    modes = ("default", "error")
    calls = {"forward": 0, "backward": 0, "clip_": 0}

    def guarded(name: str) -> Callable[..., Any]:
        function = getattr(Precision, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode(modes[calls[name] > 1])
            try:
                return function(*args)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode(modes[0])

        return call

    with (
        patch.object(Precision, "forward", guarded("forward")),
        patch.object(Precision, "backward", guarded("backward")),
        patch.object(Precision, "clip_", guarded("clip_")),
    ):
        yield
