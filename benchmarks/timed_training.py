"""One timed run of engine.train in a separate process; throughput.py starts these processes.

    torchrun -m benchmarks.timed_training RESULT.json STEPS [--split] [--launches] [--cudnn-attention on|off]
        [--without PIECE] RECIPE --section.key=value ...

The training step is the unchanged one of engine.train. Rates, waiting and memory are read from the run's own log, for
STEPS steps after the first WARM_UP. Nothing is evaluated or saved. --split adds WARM_UP steps in which the parts of the
loop are timed from outside; the device is synchronised before and after each part. --launches adds PROFILED steps under
torch's profiler, which counts the kernels that are launched and the waits for the device. --without trains without one
of the pieces in switches.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import flops, switches
from benchmarks.flops import Sizes
from data import Batch
from engine import checkpoint, cli, config, distributed, train
from engine.cli import StopRequest
from engine.config import Config
from engine.distributed import Ranks
from engine.dtensors import local
from engine.ema import Ema
from engine.log import RunLog
from engine.precision import DTYPES, Precision
from engine.regularize import Penalties

WARM_UP = 5  # steps; also the number of steps per line of metrics.jsonl
PROFILED = 2  # steps
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # how the names of these calls begin
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
PARTS: tuple[tuple[type, str, str], ...] = (  # (class, method that the loop calls, name of the part)
    (Precision, "backward", "backward"),
    (Precision, "unscale_", "clip"),
    (Precision, "clip_", "clip"),
    (Precision, "step", "optimizer"),
    (Penalties, "add_gradients_", "penalties"),
    (Ema, "update_", "average"),
)


class LoopTimer:
    """Observe a run by wrapping the functions that the loop calls."""

    def __init__(self, device: torch.device, steps: int, split: bool, launches: bool = False):
        self.timed = range(WARM_UP, WARM_UP + steps)
        self.split = range(self.timed.stop, self.timed.stop + WARM_UP * split)
        self.profiled = range(self.split.stop, self.split.stop + PROFILED * launches)
        self.profile: Any = None  # while it runs
        self.calls: Counter[str] = Counter()  # of LAUNCHES and WAITS, in all profiled steps
        self.ends: list[float] = []  # of each step of the loop, on the host's clock
        self.micro_batches: list[list[Sizes]] = []  # per step of the loop; fp16 may skip the optimizer step
        self.optimizer_steps: list[int] = []  # the number of optimizer steps after each of them
        self.model: Any = None
        self.optimizer: Any = None
        self.now = flops.clock(device)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.splitting, self.split_started = False, 0.0

    @property
    def end(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        return max(self.timed.stop, self.split.stop, self.profiled.stop)

    @property
    def step(self) -> int:
        """Return the number of optimizer steps so far."""
        return self.optimizer_steps[-1] if self.optimizer_steps else 0

    def micro_batches_until(self, step: int) -> list[list[Sizes]]:
        """Return the micro-batches that the line of metrics.jsonl at `step` covers."""
        first, last = (self.optimizer_steps.index(s) + 1 for s in (step - WARM_UP, step))
        return self.micro_batches[first:last]

    def installed(self) -> ExitStack:
        """Wrap all observed functions until the returned stack is closed."""
        stack = ExitStack()
        for owner, name, part in PARTS:
            stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(RunLog, "count_step", self._count(RunLog.count_step)))
        stack.enter_context(patch.object(train, "training_steps", self._steps(train.training_steps)))
        stack.enter_context(patch.object(train, "build_model", self._build(train.build_model)))
        stack.enter_context(patch.object(train, "build_optimizer", self._keep_optimizer(train.build_optimizer)))
        stack.enter_context(patch.object(distributed, "wrap", self._wrap(distributed.wrap)))
        stack.enter_context(patch.object(checkpoint, "save", lambda *args: 0.0))
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
        """Wrap training_steps: record the sizes of every step. The loop may fetch a step during the one before it."""

        def steps(*args: Any, **kwargs: Any) -> Iterator[list[Batch]]:
            loader = function(*args, **kwargs)
            fetch = self._timed("data", lambda: next(loader))
            while True:
                micro_batches = fetch()
                self.micro_batches.append([Sizes.from_batch(batch) for batch in micro_batches])
                yield micro_batches

        return steps

    def _begin_or_end_split(self) -> None:
        """Start the clock of the split at the end of the step before it, and stop it at the end of its last step."""
        if self.split and self.step == self.split.start and not self.splitting:
            self.splitting, self.split_started = True, self.now()
        elif self.step == self.split.stop and self.splitting:
            self.splitting = False
            self.seconds["whole"] = self.now() - self.split_started

    def _begin_or_end_profile(self) -> None:
        """Start the profiler at the end of the step before the profiled ones, and read it after the last."""
        if self.profiled and self.step == self.profiled.start and self.profile is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.start()
        elif self.profile is not None and self.step == self.profiled.stop:
            self.profile.stop()
            self.calls.update(event.name for event in self.profile.events())
            self.profile = None

    def calls_per_step(self, names: tuple[str, ...]) -> float | None:
        """Return how many calls of the CUDA runtime begin with one of `names`; None where none were counted."""
        count = sum(times for name, times in self.calls.items() if name.startswith(names))
        return count / len(self.profiled) if any(name.startswith("cu") for name in self.calls) else None

    def step_milliseconds(self) -> list[float]:
        """Return the time of each timed step, from the end of the step before."""
        ends = dict(zip(self.optimizer_steps, self.ends, strict=True))
        return [1000 * (ends[step + 1] - ends[step]) for step in self.timed if step in ends and step + 1 in ends]

    def _count(self, function: Callable[..., None]) -> Callable[..., None]:
        def count(log: RunLog, step: int, *args: Any) -> None:
            self.optimizer_steps.append(step)
            self.ends.append(time.perf_counter())
            self._begin_or_end_split()
            self._begin_or_end_profile()
            function(log, step, *args)

        return count

    def _build(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            built = function(*args, **kwargs)
            self.model = self.model or built[0]  # keep the first; L2-SP builds a second one
            return built

        return build

    def _keep_optimizer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            self.optimizer = function(*args, **kwargs)
            return self.optimizer

        return build

    def state_bytes(self) -> int:
        """Return the bytes of the weights and the optimizer's states that this rank keeps."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *(value for value in states if isinstance(value, Tensor))]
        return sum(local(tensor).nbytes for tensor in tensors)

    def _wrap(self, function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """Time the forward of the module that the loop calls: DDP, compiled code, or an objective of several passes."""
        known: set[int] = set()

        def wrap(*args: Any, **kwargs: Any) -> nn.Module:
            parallel = function(*args, **kwargs)
            if self.split and id(parallel) not in known:  # gradual unfreezing wraps the same model again
                known.add(id(parallel))
                if compiled := getattr(parallel, "_compiled_call_impl", None):  # hooks would be compiled as well
                    parallel._compiled_call_impl = self._timed("forward", compiled)
                else:
                    started: list[float] = []
                    parallel.register_forward_pre_hook(
                        lambda *_: started.append(self.now()) if self.splitting else None
                    )
                    parallel.register_forward_hook(lambda *_: self._forward(started))
            return parallel

        return wrap

    def _forward(self, started: list[float]) -> None:
        if started:
            self.seconds["forward"] += self.now() - started.pop()

    def parts(self) -> dict[str, float]:
        """Return {part: its share of the split steps}; "other" is the time between the parts."""
        whole = self.seconds.pop("whole", 0.0)
        if not whole:
            return {}
        shares = {part: seconds / whole for part, seconds in self.seconds.items()}
        return shares | {"other": 1 - sum(shares.values())}


class StopAtEnd(StopRequest):
    """Stop the loop after the last timed step, or at a signal as usual."""

    def __init__(self, timer: LoopTimer):
        super().__init__()
        self.timer = timer

    def __bool__(self) -> bool:
        return self.timer.step >= self.timer.end or super().__bool__()


def time_training(
    cfg: Config, ranks: Ranks, steps: int, split: bool = False, launches: bool = False
) -> dict[str, Any] | None:
    """Train and return the measurements; None on ranks other than the main one, and after a signal.

    steps: timed optimizer steps, a multiple of WARM_UP. launches: count kernels in further steps.
    Raises what engine.train raises.
    """
    timer = LoopTimer(ranks.device, steps, split, launches)
    settings = {"train.max_steps": timer.end + 1, "log.every_steps": WARM_UP, "eval.every_steps": timer.end + 2}
    cfg = config.override(cfg, settings)
    stop = StopAtEnd(timer)
    with timer.installed(), checkpoint.claim(cfg, ranks) as resumed:
        train.train(cfg, ranks, stop, resumed)
    stop.restore_handlers()
    return None if stop.signal else summarize(timer, cfg, ranks, "tf32" if cfg.train.tf32 else cfg.train.precision)


def summarize(timer: LoopTimer, cfg: Config, ranks: Ranks, precision: str) -> dict[str, Any] | None:
    """Return the measurements of the timed steps over all ranks; None on ranks other than the main one."""
    lines = [timer.micro_batches_until(step + WARM_UP) for step in timer.timed[::WARM_UP]]
    steps = [micro_batches for line in lines for micro_batches in line]
    needed = [sum(flops.model_flops(timer.model, sizes) for sizes in micro_batches) for micro_batches in steps]
    tokens = distributed.all_sum(*(sum(sizes.tokens for step in line for sizes in step) for line in lines))
    total, examples = distributed.all_sum(sum(needed), sum(sizes.examples for step in steps for sizes in step))
    typical = steps[sorted(range(len(steps)), key=needed.__getitem__)[len(steps) // 2]]
    largest = max(typical, key=lambda sizes: sizes.tokens)
    peak = flops.gemm_peak(timer.model, largest, DTYPES[cfg.train.precision], ranks.device) * ranks.world_size
    stated = flops.datasheet(ranks.device, precision)
    if not ranks.is_main:
        return None
    rows = [json.loads(line) for line in (Path(cfg.run.folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] - 1 in timer.timed]
    # From the logged tokens/s, which has more digits than samples/s.
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
        "state_bytes": timer.state_bytes(),
        "step_ms_p50": statistics.median(times) if (times := timer.step_milliseconds()) else None,
        "step_ms_p99": sorted(times)[math.ceil(0.99 * len(times)) - 1] if times else None,
        "launches": timer.calls_per_step(LAUNCHES),
        "waits": timer.calls_per_step(WAITS),
        "loss": rows[-1]["loss"],
        "threads": torch.get_num_threads(),
        "split": {part: round(share, 4) for part, share in timer.parts().items()},
    }


def main(argv: Sequence[str]) -> int:
    """Run one timed training and write its measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--split", action="store_true", help="time the parts of the loop too, in further steps")
    parser.add_argument("--launches", action="store_true", help="count kernels and waits, in further steps")
    parser.add_argument(
        "--cudnn-attention", choices=("on", "off"), help="allow cuDNN's attention; default: as the engine chooses"
    )
    parser.add_argument(
        "--all-tokens", action="store_true", help="the last layer computes tokens that no head reads too"
    )
    parser.add_argument("--without", choices=switches.NAMES, help="a piece of the engine that is left out")
    arguments, others = parser.parse_known_args(argv)
    for name in {arguments.without, "skipped-tokens" if arguments.all_tokens else None} - {None}:
        switches.without(name).__enter__()  # until the process ends
    if arguments.cudnn_attention:
        torch.backends.cuda.enable_cudnn_sdp(arguments.cudnn_attention == "on")
        torch.backends.cuda.enable_cudnn_sdp = lambda enabled: None  # the engine would choose by itself
    cfg = config.parse(others, parser.format_usage())
    ranks = distributed.setup(cfg.run.device)
    result = time_training(cfg, ranks, arguments.steps, arguments.split, arguments.launches)
    if result is not None:
        arguments.result.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
