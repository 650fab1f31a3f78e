"""One rank of a measured run; torchrun starts it:

    torchrun --nproc-per-node 2 -m benchmarks.sharded_memory.ranks FOLDER STRATEGY PHASE

FOLDER is what big_model.py wrote. PHASE: load stops when the weights are read; train takes STEPS steps, and evaluates.
Each rank writes its memory after each phase, and the peak in it, to FOLDER/memory.STRATEGY.W.RANK.json.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine import checkpoint, distributed, train
from engine import config as configs
from engine.cli import StopRequest, run_command
from engine.distributed import Ranks
from engine.dtensors import local
from engine.log import RunLog
from engine.model import build_model

STEPS, GLOBAL_BATCH_SIZE, MAX_LENGTH = 3, 4, 16
IMPORTED_IN_A_RUN = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint")  # 100 MB of code
FIELDS = ("VmHWM", "RssAnon", "RssFile")


class LoadedError(Exception):
    """The phase that was asked for is over."""


class Memory:
    """The memory of this process after each phase, in bytes; the peak is that of the phase alone."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, int]] = {}

    def note(self, phase: str) -> None:
        """Note the end of a phase, and begin the next: 5 in clear_refs sets the peak to what is used now."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        self.phases[phase] = {name: 1024 * int(fields[name].split()[0]) for name in FIELDS}
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(folder: Path, strategy: str, last: str, ranks: Ranks) -> dict[str, Any]:
    """Return the phases of a run, and the numbers of parameters of the model and of this rank."""
    memory, sizes = Memory(), dict[str, int]()
    count = RunLog.count_step

    def built(*args: Any, **kwargs: Any) -> Any:
        memory.note("start")
        result = build_model(*args, **kwargs)
        parameters = [*result[0].parameters()]
        sizes["parameters"] = sum(p.numel() for p in parameters)
        sizes["own_parameters"] = sum(local(p).numel() for p in parameters)
        layers = [sum(p.numel() for p in layer.parameters()) for layer in result[0].backbone.layers]
        sizes["largest_layer"], sizes["outside_layers"] = max(layers), sizes["parameters"] - sum(layers)
        memory.note("load")
        if last == "load":
            raise LoadedError
        return result

    def counted(log: RunLog, step: int, *rest: Any) -> None:
        count(log, step, *rest)
        memory.note("first step" if step == 1 else "train")

    values = {
        "run.device": "cpu",
        "run.folder": str(folder / f"run.{strategy}.{ranks.world_size}"),
        "model.name": str(folder),
        "model.pooling": "cls",
        "data.train": str(folder / "train.jsonl"),
        "data.max_length": MAX_LENGTH,
        "train.global_batch_size": GLOBAL_BATCH_SIZE,
        "train.max_steps": STEPS,
        "eval.every_steps": 1_000_000,
        "distributed.strategy": strategy,
    }
    config = configs.override(configs.Config(), values)
    configs.check(config)
    with (
        patch.object(train, "build_model", built),
        patch.object(RunLog, "count_step", counted),
        patch.object(checkpoint, "save", lambda *args: 0.0),
        redirect_stdout(StringIO()),
        checkpoint.claim(config, ranks) as resumed,
    ):
        try:
            train.train(config, ranks, StopRequest(), resumed)
            memory.note("evaluate")
        except LoadedError:
            pass
    return {"phases": memory.phases, **sizes}


def main(argv: Sequence[str]) -> int:
    """Measure one run."""
    folder, strategy, last = Path(argv[0]), argv[1], argv[2]
    ranks = distributed.setup("cpu")
    for module in IMPORTED_IN_A_RUN:
        importlib.import_module(module)
    measured = measure(folder, strategy, last, ranks)
    (folder / f"memory.{strategy}.{ranks.world_size}.{ranks.rank}.json").write_text(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.argv[0] = "benchmarks.sharded_memory.ranks"
    run_command(main)
