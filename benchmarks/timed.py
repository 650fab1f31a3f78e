"""One timed run of engine.train, in a process of its own; benchmarks/throughput.py starts these.

    torchrun -m benchmarks.timed RESULT.json STEPS [--split] [--tf32] RECIPE --section.key=value ...

It is the loop's own step with all that belongs to it. Rates, waiting and memory are those that the run logs itself, of
STEPS steps after the first WARM_UP. Then nothing is evaluated or saved. With --split some more steps follow, in which
the parts of the loop are timed from outside, the device waited for before and after each.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import flops
from benchmarks.flops import Sizes
from data import Batch
from engine import checkpoint, cli, config, distributed, train
from engine.cli import StopRequest
from engine.config import Config
from engine.distributed import Ranks
from engine.ema import Ema
from engine.log import RunLog
from engine.precision import DTYPES, Precision
from engine.regularize import Penalties

WARM_UP = 5  # steps; a line of metrics.jsonl is of as many
PARTS: tuple[tuple[type, str, str], ...] = (  # (class, method that the loop calls, what its time is called)
    (Precision, "backward", "backward"),
    (Precision, "unscale_", "clip"),
    (Precision, "clip_", "clip"),
    (Precision, "step", "optimizer"),
    (Penalties, "add_gradients_", "penalties"),
    (Ema, "update_", "average"),
)


class Run:
    """What is seen of a run from outside, by standing around the functions that the loop calls."""

    def __init__(self, device: torch.device, steps: int, split: bool):
        self.timed = range(WARM_UP, WARM_UP + steps)
        self.split = range(self.timed.stop, self.timed.stop + WARM_UP * split)
        self.groups: list[list[Sizes]] = []  # the micro-batches of each step, also of those that fp16 leaves out
        self.taken: list[int] = []  # the optimizer's steps after each of them
        self.model: Any = None
        self.now = flops.clock(device)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.splitting = False

    @property
    def end(self) -> int:
        """The steps of all."""
        return max(self.timed.stop, self.split.stop)

    @property
    def step(self) -> int:
        """The optimizer's steps so far."""
        return self.taken[-1] if self.taken else 0

    def groups_until(self, step: int) -> list[list[Sizes]]:
        """What was read since the line of metrics.jsonl before that of `step`."""
        first, last = (self.taken.index(s) + 1 for s in (step - WARM_UP, step))
        return self.groups[first:last]

    def installed(self) -> ExitStack:
        """Stand around everything, until the stack is closed."""
        stack = ExitStack()
        for owner, name, part in PARTS:
            stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(RunLog, "count", self._count(RunLog.count)))
        stack.enter_context(patch.object(train, "training_steps", self._steps(train.training_steps)))
        stack.enter_context(patch.object(train, "build_model", self._build(train.build_model)))
        stack.enter_context(patch.object(distributed, "wrap", self._wrap(distributed.wrap)))
        stack.enter_context(patch.object(checkpoint, "save", lambda *args: None))
        return stack

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.splitting:
                return function(*args, **kwargs)
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[part] += self.now() - start
            return result

        return timed

    def _steps(self, function: Callable[..., Iterator[list[Batch]]]) -> Callable[..., Iterator[list[Batch]]]:
        """Each step that the loop fetches passes here; the time between two is that of a whole step."""

        def steps(*args: Any, **kwargs: Any) -> Iterator[list[Batch]]:
            groups = function(*args, **kwargs)
            fetch = self._timed("data", lambda: next(groups))
            begun = 0.0
            while True:
                if self.split and self.step == self.split.start and not self.splitting:
                    self.splitting, begun = True, self.now()
                elif self.step == self.split.stop and self.splitting:
                    self.splitting = False
                    self.seconds["whole"] = self.now() - begun
                group = fetch()
                self.groups.append([Sizes.of(batch) for batch in group])
                yield group

        return steps

    def _count(self, function: Callable[..., None]) -> Callable[..., None]:
        def count(log: RunLog, step: int, *args: Any) -> None:
            self.taken.append(step)
            function(log, step, *args)

        return count

    def _build(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            built = function(*args, **kwargs)
            self.model = self.model or built[0]  # the first one; L2-SP builds another
            return built

        return build

    def _wrap(self, function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """The model as the loop calls it: around DDP, compiled code and an objective of several passes."""
        known: set[int] = set()

        def wrap(*args: Any, **kwargs: Any) -> nn.Module:
            parallel = function(*args, **kwargs)
            if self.split and id(parallel) not in known:  # unfreezing wraps the same model again
                known.add(id(parallel))
                if compiled := getattr(parallel, "_compiled_call_impl", None):  # hooks would be compiled too
                    parallel._compiled_call_impl = self._timed("forward", compiled)
                else:
                    begun: list[float] = []
                    parallel.register_forward_pre_hook(lambda *_: begun.append(self.now()) if self.splitting else None)
                    parallel.register_forward_hook(lambda *_: self._forward(begun))
            return parallel

        return wrap

    def _forward(self, begun: list[float]) -> None:
        if begun:
            self.seconds["forward"] += self.now() - begun.pop()

    def parts(self) -> dict[str, float]:
        """{part: its share of the steps that were split}; other: what lies between the parts."""
        whole = self.seconds.pop("whole", 0.0)
        if not whole:
            return {}
        shares = {part: seconds / whole for part, seconds in self.seconds.items()}
        return shares | {"other": 1 - sum(shares.values())}


class StopAtEnd(StopRequest):
    """Ends the loop when all that is timed is done, or at a signal as ever."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def __bool__(self) -> bool:
        return self.run.step >= self.run.end or super().__bool__()


def measure(cfg: Config, ranks: Ranks, steps: int, split: bool = False, tf32: bool = False) -> dict[str, Any] | None:
    """Train for as many steps and say what it took; None on other ranks, and after a signal.

    steps: of the optimizer, a multiple of WARM_UP. tf32: on a GPU, fp32 products from rounded factors. Raises as
    engine.train does.
    """
    run = Run(ranks.device, steps, split)
    settings = {"train.max_steps": run.end + 1, "log.every_steps": WARM_UP, "eval.every_steps": run.end + 2}
    cfg = config.override(cfg, settings)
    stop = StopAtEnd(run)
    if tf32:
        torch.set_float32_matmul_precision("high")
    with run.installed(), checkpoint.claim(cfg, ranks) as resumed:
        train.train(cfg, ranks, stop, resumed)
    stop.unlisten()
    return None if stop.signal else summarize(run, cfg, ranks, "tf32" if tf32 else cfg.train.precision)


def summarize(run: Run, cfg: Config, ranks: Ranks, precision: str) -> dict[str, Any] | None:
    """What a run that has ended took, of its timed steps, over all ranks; None on other ranks than the main one."""
    lines = [run.groups_until(step + WARM_UP) for step in run.timed[::WARM_UP]]
    groups = [group for line in lines for group in line]
    needed = [sum(flops.model_flops(run.model, sizes) for sizes in group) for group in groups]
    tokens = distributed.all_sum(*(sum(sizes.tokens for group in line for sizes in group) for line in lines))
    total, examples = distributed.all_sum(sum(needed), sum(sizes.examples for group in groups for sizes in group))
    typical = groups[sorted(range(len(groups)), key=needed.__getitem__)[len(groups) // 2]]
    largest = max(typical, key=lambda sizes: sizes.tokens)
    peak = flops.gemm_peak(run.model, largest, DTYPES[cfg.train.precision], ranks.device) * ranks.world_size
    stated = flops.datasheet(ranks.device, precision)
    if not ranks.is_main:
        return None
    rows = [json.loads(line) for line in (Path(cfg.run.folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] - 1 in run.timed]
    # From the logged rate of tokens: in digits it has more than that of examples.
    seconds = sum(count / row["tokens_per_second"] for count, row in zip(tokens, rows, strict=True))
    return {
        "samples_per_second": examples / seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "flops_per_second": total / seconds,
        "gemm_flops_per_second": peak,
        "mfu": total / seconds / peak,
        "mfu_datasheet": total / seconds / (stated * ranks.world_size) if stated else None,
        "waiting": sum(row["data_wait_seconds"] for row in rows) / seconds,
        "peak_memory_mb": rows[-1]["peak_memory_mb"],
        "loss": rows[-1]["loss"],
        "threads": torch.get_num_threads(),
        "split": {part: round(share, 4) for part, share in run.parts().items()},
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--split", action="store_true", help="time the parts of the loop too")
    parser.add_argument("--tf32", action="store_true", help="fp32 products on a GPU's tensor cores")
    arguments, others = parser.parse_known_args(argv)
    cfg = config.parse(others, parser.format_usage())
    ranks = distributed.setup(cfg.run.device)
    result = measure(cfg, ranks, arguments.steps, arguments.split, arguments.tf32)
    if result is not None:
        arguments.result.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
