"""Part 6: micro-batches found by the memory, a run that meets the end of the memory, resume, determinism, and DDP.

Each is compared with an undisturbed run of the same recipe without dropout. On a GPU the order of additions is not
fixed, so losses are compared with a tolerance.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_check.check import Check, first_line, relative_difference, run_training
from engine import checkpoint, distributed, memory
from engine.precision import Precision

STEPS = 6
TOLERANCE = 1e-3  # relative, of losses
LEFT_BYTES = 3 * 2**30  # of the GPU's memory while it is short
FITTING_TOKENS = 40  # of a micro-batch on a CPU, whose memory is not filled


def run(check: Check) -> None:
    """Run the checks."""
    for name, function in {
        "out of memory": check_memory,
        "resume": check_resume,
        "run.deterministic": check_deterministic,
        "one rank of DDP": check_ddp,
    }.items():
        if not check.has_time_for(5, name):
            return
        try:
            function(check)
        except (RuntimeError, OSError) as error:
            check.add(name, ok=False, where=first_line(error))


def train_once(
    check: Check, name: str, settings: dict[str, Any], *, steps: int = 1_000_000, shrink: bool | None = None
) -> list[float]:
    """Train a BERT for a few steps in the folder `name`; return its losses."""
    values = {"run.folder": str(check.scratch / name), "train.max_steps": STEPS, "log.every_steps": 1}
    values |= {"model.dropout.all": 0.0, "optim.lr": 1e-3}
    return run_training(check, check.recipe("bert-base-ragged", shrink=shrink, **values | settings), steps)


def check_memory(check: Check) -> None:
    """Train with little memory: with micro-batches of automatic size, and with the whole batch at once."""
    halve = memory.halve_micro_batches
    with patch.object(checkpoint, "save", lambda *args: 0.0):
        expected = train_once(check, "whole", {})
        for name, size in {"micro-batch auto": "auto", "out of memory": 0}.items():
            halvings: list[int] = []

            def counted(*args: Any, halvings: list[int] = halvings) -> Any:
                limits = halve(*args)
                halvings.append(limits.max_tokens)
                return limits

            with short_memory(check.device), patch("engine.train.halve_micro_batches", counted):
                found = train_once(check, name, {"train.micro_batch_size": size})
            error = relative_difference(found, expected)
            as_planned = bool(halvings) == (size == 0)
            check.add(name, ok=error <= TOLERANCE and as_planned, where=f"halved to {halvings}", loss_error=error)


@contextmanager
def short_memory(device: torch.device) -> Iterator[None]:
    """Fill the memory of a GPU but for LEFT_BYTES; on a CPU, make a forward of more than FITTING_TOKENS fail."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        filling = torch.empty(max(0, free - LEFT_BYTES), dtype=torch.uint8, device=device)
        try:
            yield
        finally:
            del filling
            torch.cuda.empty_cache()
        return
    forward = Precision.forward

    def limited(amp: Precision, model: Callable[[Any], Any], batch: Any) -> Any:
        if batch.num_tokens > FITTING_TOKENS:
            raise RuntimeError("can't allocate memory")
        return forward(amp, model, batch)

    with patch.object(Precision, "forward", limited):
        yield


def check_resume(check: Check) -> None:
    """Stop a tiny run with dropout and micro-batches in the middle, resume it, and compare with an undisturbed one."""
    settings = {"model.dropout.all": 0.1, "train.micro_batch_size": 3}
    expected = train_once(check, "undisturbed", settings, shrink=True)
    stopped = train_once(check, "stopped", settings, steps=STEPS // 2, shrink=True)
    resumed = train_once(check, "stopped", settings | {"run.resume": "yes"}, shrink=True)
    error = relative_difference(resumed, expected)
    where = f"stopped after {len(stopped)} of {STEPS} steps"
    check.add("resume", ok=error <= TOLERANCE and len(stopped) == STEPS // 2, where=where, loss_error=error)


def check_deterministic(check: Check) -> None:
    """Train the same tiny run twice with run.deterministic; the losses should be equal bit for bit."""
    settings = {"model.dropout.all": 0.1, "run.deterministic": True}
    try:
        first, second = (train_once(check, name, settings, shrink=True) for name in ("first", "second"))
    finally:
        torch.use_deterministic_algorithms(False)
    check.add("run.deterministic", ok=first == second, loss_error=relative_difference(second, first))


def check_ddp(check: Check) -> None:
    """Train a tiny run in DDP on one rank: NCCL on a GPU, gloo on a CPU."""
    expected = train_once(check, "no DDP", {}, shrink=True)
    backend = "cpu:gloo,cuda:nccl" if check.device.type == "cuda" else "gloo"
    wrap = distributed.wrap

    def wrapped(model: Any, *args: Any) -> Any:
        wrap(model, *args)
        return DistributedDataParallel(model, gradient_as_bucket_view=True).train()

    dist.init_process_group(backend, init_method=f"file://{check.scratch / 'store'}", rank=0, world_size=1)
    try:
        with patch.object(distributed, "wrap", wrapped):
            found = train_once(check, "DDP", {"train.micro_batch_size": 3}, shrink=True)
    finally:
        dist.destroy_process_group()
    error = relative_difference(found, expected)
    check.add("one rank of DDP", backend, ok=error <= TOLERANCE, loss_error=error)
