"""What goes wrong inside a run: patches that a rank applies to itself before it trains.

As a command, for torchrun: `python -m faults.victims ACTION RANK STEP RECIPE ...`; on other ranks it is engine.train.
It leaves notes beside the recipe: each rank's process, when the action was done, and how a rank ended by itself.
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
from engine.cli import StopRequest, run_command
from engine.state import TrainState


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
    "one death": lambda: restart_count() < 1 and os.kill(os.getpid(), signal.SIGKILL),
    "three deaths": lambda: restart_count() < 3 and os.kill(os.getpid(), signal.SIGKILL),
    "nothing": lambda: None,
}


def at_step(
    action: str, rank: int, step: int, place: str = "Penalties.add_gradients_", acted: Path | None = None
) -> None:
    """Do the action when this rank reaches the `step`-th call of a function of engine.train. acted: a file for when."""
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
            if acted:
                acted.write_text(str(time.monotonic()))
            ACTIONS[action]()
        return original(*args, **kwargs)

    setattr(owner, name, watched)


def own(file: Path) -> Path:
    """Return the file of this rank."""
    return file.with_name(f"{file.name}.{os.environ.get('RANK', 0)}")


def note_signal(file: Path) -> None:
    """Append to a file of this rank how many steps the optimizer had taken when a signal reached the loop."""
    target, steps = own(file), [0]
    receive, advance = StopRequest._receive, TrainState.advance

    def counted(self: TrainState, stepped: bool, samples: int) -> None:
        advance(self, stepped, samples)
        steps[0] = self.step

    def noted(self: StopRequest, number: int, frame: object) -> None:
        with target.open("a") as stream:
            stream.write(f"{steps[0]}\n")
        receive(self, number, frame)

    StopRequest._receive, TrainState.advance = noted, counted  # type: ignore[method-assign]


def note_end(file: Path) -> None:
    """Write to a file of this rank the exit code that it ends with by itself; of several ranks, by os._exit."""
    target, end = own(file), os._exit

    def noted(code: int) -> None:
        target.write_text(str(code))
        end(code)

    os._exit = noted  # type: ignore[assignment]


def note_ids(file: Path) -> None:
    """Append the ids of each optimizer step of this rank to a file of its own, one line a step.

    The first line: all ids of the training data, in the order of the file.
    """
    original = train.training_steps
    target = own(file)

    def watched(examples: Any, *args: Any, start: int = 0, **kwargs: Any) -> Any:
        target.write_text(json.dumps(list(examples.ids)) + "\n")
        for step, micro_batches in enumerate(original(examples, *args, start=start, **kwargs), start):
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
    recipe = Path(rest[0])
    own(recipe.with_name("process")).write_text(str(os.getpid()))
    note_signal(recipe.with_name("signal"))
    note_end(recipe.with_name("end"))
    at_step(action, int(rank), int(step), acted=recipe.with_name("acted"))
    return train.main(rest)


if __name__ == "__main__":
    sys.argv[0] = "engine.train"
    run_command(main)
