"""Runs on several ranks that stop, fail, or go on while last/ is written: `python -m support.sharded_saves FOLDER ...`.

Each run is a fork of this process per rank, which has imported torch once (tests/faults/runs.py). The results of the
scenarios are in FOLDER/results.json, and the tests compare the folders of the runs.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import runs
from faults.runs import Bench, Ended, Run

from engine import config as configs
from engine import train
from models.checkpoints.tensor_writer import TensorWriter
from support import sharded
from support.runs import StopAfter

# {name: (ranks, distributed.strategy, ranks of a machine)}
PLACES = {"one": (1, "ddp", 1), "ddp": (2, "ddp", 2), "fsdp": (2, "fsdp", 2), "fsdp4": (4, "fsdp", 4)}
PLACES |= {"fsdp3": (3, "fsdp", 3), "hsdp": (4, "hsdp", 2)}
SETTINGS: dict[str, object] = {
    "model.dropout.all": 0.0,
    "optim.lr": 1e-4,
    "optim.eps": 1e-3,  # Adam divides by |g| + eps: a gradient of 0 but for rounding would be a step of its own
    "train.max_steps": 6,
    "eval.every_steps": 3,
    "eval.metric": "loss",
    "train.micro_batch_size": 3,
    "regularize.ema_decay": 0.9,
}
FP16 = {"train.precision": "fp16", "model.dropout.all": 0.1}
STOPPED = 143  # the exit code of a run that was stopped


class Scenarios:
    """The runs of one launch, in a folder of their own."""

    def __init__(self, folder: Path):
        self.bench = Bench(folder)
        self.results: dict[str, Any] = {}

    def run(
        self,
        name: str,
        place: str,
        *options: str,
        settings: dict[str, object] | None = None,
        in_child: Callable[[], object] | None = None,
        config: configs.Config | None = None,
    ) -> Ended:
        """Run FOLDER/NAME at a place, from where it is; note how it ended."""
        ranks, strategy, of_machine = PLACES[place]
        folder = self.bench.folder / name
        changes = {"run.folder": str(folder), "run.resume": "auto", "distributed.strategy": strategy}
        run = Run(self.bench, folder, SETTINGS | (settings or {}) | changes)
        if config is not None:
            run.recipe.write_text(configs.to_toml(configs.override(config, changes)))

        def prepare() -> None:
            os.environ["LOCAL_WORLD_SIZE"] = str(of_machine)
            if in_child is not None:
                in_child()

        ended = run.finish(*options, ranks=ranks, in_child=prepare)
        self.results[name] = {"codes": ended.codes, "out": ended.out, "err": ended.err, "left": run.leftovers()}
        return ended

    def begin(self, name: str, place: str, settings: dict[str, object] | None = None) -> None:
        """Run FOLDER/NAME and stop it after two steps."""

        def stop() -> None:
            train.StopRequest = lambda: StopAfter(2)  # type: ignore[assignment,misc]

        self.run(name, place, settings=settings, in_child=stop)

    def go_on(self, name: str, begun: str, place: str, settings: dict[str, object] | None = None) -> None:
        """Resume a copy of a run at a place."""
        shutil.copytree(self.bench.folder / begun, self.bench.folder / name)
        self.run(name, place, settings=settings)


def move(scenarios: Scenarios, *pairs: str) -> None:
    """Stop a run at a place and resume it at another one, for each "PLACE to PLACE"; one that is not stopped."""
    scenarios.run("through", "one")
    for begun in dict.fromkeys(pair.split(" to ")[0] for pair in pairs):
        scenarios.begin(begun, begun)
    for pair in pairs:
        scenarios.go_on(pair, *pair.split(" to "))


def repeat(scenarios: Scenarios) -> None:
    """Stop a run with dropout and a loss scale, and resume it as it was; one that is not stopped."""
    scenarios.run("exact through", "fsdp", settings=FP16)
    scenarios.begin("exact begun", "fsdp", FP16)
    scenarios.go_on("exact", "exact begun", "fsdp", FP16)


def fill_disk(scenarios: Scenarios, name: str) -> None:
    """Let a disk be full: of rank 1, which writes its second optimizer shard; of rank 0, which writes best/."""
    rank, file = {"shard": ("1", "optimizer"), "best": ("0", "model.safetensors")}[name]

    def patch() -> None:
        write, seen = TensorWriter.write, set()

        def refused(self: Any, key: str, tensor: Any) -> None:
            if os.environ["RANK"] == rank and Path(self._stream.name).name.startswith(file):
                if key in seen or (name == "best" and len(seen) == 3):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                seen.add(key)
            write(self, key, tensor)

        TensorWriter.write = refused  # type: ignore[method-assign]

    scenarios.run(f"full {name}", "fsdp", settings={"checkpoint.every_steps": 2}, in_child=patch)


def clear_disk(scenarios: Scenarios, name: str) -> None:
    """Resume the run whose disk was full."""
    scenarios.go_on(f"cleared {name}", f"full {name}", "fsdp", {"checkpoint.every_steps": 2})


def overlap(scenarios: Scenarios) -> None:
    """Train a GPT-2, and let the thread that writes last/ wait until the loop is one step further."""
    changes = {"checkpoint.every_steps": 2, "train.max_steps": 4, "eval.every_steps": 4}
    case = sharded.Case({"train.micro_batch_size": 2} | changes, ("dialogue", "gpt2"))
    config = sharded.settings_of_case(case, scenarios.bench.folder / "cases")

    def patch() -> None:
        from engine import shard_writer

        write, set_rate, rates, waited = shard_writer._write_file, train.set_learning_rate, [], []
        further = threading.Event()

        def wait(*args: Any) -> None:
            if not waited:
                waited.append(further.wait(60))
                print(f"a step was taken meanwhile: {waited[0]}")
            write(*args)

        def count(*args: Any) -> None:
            rates.append(1)
            if len(rates) == 4:  # the save is before the third step
                further.set()
            set_rate(*args)

        shard_writer._write_file, train.set_learning_rate = wait, count

    scenarios.run("overlap", "fsdp", config=config, in_child=patch)


def save_others(scenarios: Scenarios) -> None:
    """Train a T5 on three ranks, whose shards are uneven, and a LoRA, whose last/ has merged matrices."""
    config = sharded.settings_of_case(sharded.Case(data=("summarization", "t5")), scenarios.bench.folder / "cases")
    scenarios.run("t5", "fsdp3", config=config)
    scenarios.run("lora", "fsdp", settings={"model.lora.rank": 2, "regularize.ema_decay": 0.0})


SCENARIOS: dict[str, Callable[..., None]] = {
    "move": move,
    "repeat": repeat,
    "full": fill_disk,
    "cleared": clear_disk,
    "overlap": overlap,
    "others": save_others,
}


def main(argv: list[str]) -> int:
    """Make the runs of "NAME" or "NAME:ARGUMENT:..." below a folder."""
    runs.prepare_ranks()
    for module in ("fsdp", "tensor", "checkpoint", "device_mesh"):
        importlib.import_module(f"torch.distributed.{module}")
    scenarios = Scenarios(Path(argv[0]))
    for entry in argv[1:]:
        name, *arguments = entry.split(":")
        SCENARIOS[name](scenarios, *arguments)
    (scenarios.bench.folder / "results.json").write_text(json.dumps(scenarios.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
