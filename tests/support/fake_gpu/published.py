"""Estimate a training step of published shapes on a GPU that is not there:

PYTHONPATH=tests python -m support.fake_gpu.published [WORKLOAD ...] [--without PIECE] [--set KEY=VALUE] [--ops]

The steps are those of engine.train in bf16, on the fake GPU (device.py); workloads are those of
benchmarks/workloads.py, with few examples. --ops prints the device's time by op too. Of a step after the first are
printed: the FLOPs that the mathematics requires (benchmarks/flops.py), the kernels, the waits of the host, the bytes
that the kernels read and write, and two estimates:
- host: HOST_MICROSECONDS a kernel;
- device: the sum over the ops of the longest of three times: FLOPs at the measured rate of an H200, bytes at its
  bandwidth, KERNEL_MICROSECONDS a kernel. Most kernels are slower; what stays in the cache may be faster.
MFU is that of the slower of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import flops, switches, workloads
from engine import train
from support.fake_gpu.device import FakeGpu
from support.fake_gpu.rehearsal import rehearse
from support.fake_gpu.report import BACKWARD, FORWARD, LOOP, STEP, WITHOUT_KERNEL

SHAPES = ("bert-base-128", "bert-base-ragged", "vit-b16-224", "gpt2-1024", "t5-base-512-128")
PHASES = (FORWARD, BACKWARD, STEP, LOOP)
STEPS = 3  # the first one makes the states of the optimizer; the last one is logged and evaluated, which is not counted
PRODUCTS, ATTENTION, BANDWIDTH = 790e12, 400e12, 4.2e12  # FLOP/s of an H200 in bf16, in products and attention; bytes/s
READS_ROWS = ("gather", "index_select", "index", "embedding")  # not the whole tensor
HOST_MICROSECONDS, KERNEL_MICROSECONDS = 5.0, 2.0


@dataclass
class Steps:
    """What every step did; its number is the key."""

    kernels: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)
    seconds: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))  # of the device
    by_op: defaultdict[tuple[int, str, str], float] = field(default_factory=lambda: defaultdict(float))
    sizes: list[list[flops.Sizes]] = field(default_factory=list)
    model: Any = None


def main(argv: Sequence[str]) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description="python -m support.fake_gpu.published")
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help=f"from {', '.join(SHAPES)}")
    parser.add_argument("--without", action="append", default=[], choices=switches.NAMES, help="a piece to leave out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--ops", action="store_true", help="print the device's time by op too")
    parser.add_argument("--shrink", action="store_true", help="tiny models, to try the command")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    further = dict(text.split("=", 1) for text in arguments.set)
    print("| work | TFLOP | kernels | waits | GB | host ms | device ms | MFU |\n|---|---|---|---|---|---|---|---|")
    for name in arguments.names or SHAPES:
        with ExitStack() as stack:
            for piece in arguments.without:
                stack.enter_context(switches.without(piece))
            print(estimate(name, further, arguments.ops, arguments.shrink), flush=True)


def estimate(name: str, further: dict[str, Any], ops: bool, shrink: bool) -> str:
    """Return the row of a workload, and below it, with `ops`, the milliseconds and kernels of the longest ops."""
    workload = workloads.WORKLOADS[name]
    workload = workloads.shrunk(workload) if shrink else workload
    few = replace(workload, pool=STEPS * workload.global_batch_size * (20 if name.startswith("gpt2") else 1))
    with tempfile.TemporaryDirectory() as folder, patch.dict(workloads.WORKLOADS, {name: few}):
        home = Path(folder) / name
        workloads.prepare(name, Path(folder))
        settings = workloads._settings(few, home) | {"data.num_workers": 0, "run.folder": str(Path(folder) / "run")}
        settings |= {"train.precision": "bf16", "train.max_steps": STEPS, "log.every_steps": STEPS}
        with observed() as steps, contextlib.redirect_stdout(io.StringIO()):
            report = rehearse(settings | further)
    last = STEPS - 2
    required = sum(flops.model_flops(steps.model, sizes) for sizes in steps.sizes[last])
    waits = sum(wait.step == last for wait in report.waits(*PHASES))
    kernels, device = steps.kernels[last], 1000 * steps.seconds[last]
    host = kernels * HOST_MICROSECONDS / 1000
    mfu = required / PRODUCTS / max(host, device) * 1000
    numbers = f"{required / 1e12:.2f} | {kernels:,} | {waits} | {steps.bytes[last] / 1e9:.1f}"
    by_op = sorted(((1000 * t, *key) for (step, *key), t in steps.by_op.items() if step == last), reverse=True)
    lines = [f"  {phase} {op}: {time:.2f} ms" for time, phase, op in by_op[: 25 * ops]]
    return "\n".join([f"| {name} | {numbers} | {host:.1f} | {device:.1f} | {mfu:.0%} |", *lines])


@contextmanager
def observed() -> Iterator[Steps]:
    """Record every op of a rehearsal by the step it belongs to."""
    steps = Steps()
    launch, training_steps, build_model = FakeGpu._launch, train.training_steps, train.build_model

    def launched(gpu: FakeGpu, func: Any, name: str, args: Any, kwargs: Any, on_gpu: list[Any]) -> Any:
        before = sum(gpu.report.kernels.values())
        out = launch(gpu, func, name, args, kwargs, on_gpu)
        if gpu.phase in PHASES and name not in WITHOUT_KERNEL:
            kernels, step = sum(gpu.report.kernels.values()) - before, gpu.report.steps
            moved = bytes_moved(name, args, kwargs, out)
            steps.kernels[step] += kernels
            steps.bytes[step] += moved
            products = seconds_of_products(gpu, func, name, args, kwargs, out)
            time = max(products, moved / BANDWIDTH, kernels * KERNEL_MICROSECONDS / 1e6)
            steps.seconds[step] += time
            steps.by_op[step, gpu.phase, name] += time
        return out

    def recorded(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for micro_batches in training_steps(*args, **kwargs):
            steps.sizes.append([flops.Sizes.from_batch(batch) for batch in micro_batches])
            yield micro_batches

    def built(*args: Any, **kwargs: Any) -> Any:
        found = build_model(*args, **kwargs)
        steps.model = found[0]
        return found

    with ExitStack() as stack:
        stack.enter_context(patch.object(FakeGpu, "_launch", launched))
        stack.enter_context(patch.object(train, "training_steps", recorded))
        stack.enter_context(patch.object(train, "build_model", built))
        yield steps


def bytes_moved(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Return the bytes that an op reads and writes, each tensor once; what an op in place returns is written."""
    written = sum(map(size_of, tree_leaves(out)))
    if name.startswith("new_") or name.endswith("_like"):
        return written
    if name in READS_ROWS:
        return 2 * written
    if name == "scatter_add_":  # at the indices alone
        return 3 * sum(map(size_of, args[2:]))
    read = sum(map(size_of, tree_leaves((args, kwargs))))
    return read + (written or read)


def size_of(x: Any) -> int:
    """Return the bytes of a tensor of the device; of an expanded one those that exist."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) if isinstance(x, FakeTensor) else 0


def seconds_of_products(gpu: FakeGpu, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
    """Return the time of the products of an op; 0 for others."""
    if name.startswith("_flash_attention_"):  # of packed sequences, whose borders the host knows
        query, borders = (args[0], args[3]) if name.endswith("forward") else (args[1], args[6])
        lengths: Tensor = gpu.known[borders].diff().double()
        heads, width = query.shape[1:]
        products = 2 if name.endswith("forward") else 5
        return float(products * 2 * heads * width * lengths.square().sum()) / ATTENTION
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0.0
    return float(count(*args, **kwargs, out_val=out)) / (ATTENTION if "attention" in name else PRODUCTS)


if __name__ == "__main__":
    main(sys.argv[1:])
