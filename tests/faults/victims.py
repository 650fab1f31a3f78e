"""What goes wrong inside a run: patches that a rank applies to itself before it trains.

As a command, for torchrun: `python -m faults.victims ACTION RANK STEP RECIPE ...`; on other ranks it is engine.train.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data import DataError
from engine import train
from engine.cli import run_command


def raise_bug() -> None:
    raise ZeroDivisionError("only this rank knows this")


def raise_mistake() -> None:
    raise DataError("only this rank knows this")


def restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


ACTIONS: dict[str, Callable[[], object]] = {
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(10_000),
    "bug": raise_bug,
    "mistake": raise_mistake,
    "three deaths": lambda: restart_count() < 3 and os.kill(os.getpid(), signal.SIGKILL),
}


def at_step(action: str, rank: int, step: int, place: str = "Penalties.add_gradients_") -> None:
    """Do the action when this rank reaches the `step`-th call of a function of engine.train."""
    if int(os.environ.get("RANK", 0)) != rank:
        return
    owner: Any = train
    *path, name = place.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            ACTIONS[action]()
        return original(*args, **kwargs)

    setattr(owner, name, watched)


def note_ids(file: Path) -> None:
    """Append the ids of each optimizer step of this rank to a file of its own, one line a step."""
    original = train.training_steps
    target = file.with_name(f"{file.name}.{os.environ.get('RANK', 0)}")

    def watched(*args: Any, start: int = 0, **kwargs: Any) -> Any:
        for step, micro_batches in enumerate(original(*args, start=start, **kwargs), start):
            ids = [example for batch in micro_batches for example in batch.ids]
            with target.open("a") as stream:
                stream.write(json.dumps([step, ids]) + "\n")
            yield micro_batches

    train.training_steps = watched


def in_worker(action: Callable[[], object], example: str) -> None:
    """Do the action when a loader's worker makes the step with this example."""
    from data.examples import TextExamples

    original = TextExamples.batch

    def watched(self: Any, indices: Any, *rest: Any, **kwargs: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None and example in [self.ids[int(i)] for i in indices]:
            action()
        return original(self, indices, *rest, **kwargs)

    TextExamples.batch = watched  # type: ignore[method-assign]


def main(argv: list[str]) -> int:
    action, rank, step, *rest = argv
    at_step(action, int(rank), int(step))
    return train.main(rest)


if __name__ == "__main__":
    sys.argv[0] = "engine.train"
    run_command(main)
