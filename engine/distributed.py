"""Ranks started by torchrun, their collectives, and how a command ends. On one process everything here is a no-op.

Host values (counts, flags, metrics) travel over gloo, also on GPUs, so that summing them never waits for a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import Batch
from engine.allocator import keep_freed_memory
from engine.config import ConfigError
from engine.errors import USER_ERRORS, TrainingError
from engine.optim import without_gradient


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str) -> Ranks:
    """Join the process group that torchrun describes in the environment; one process needs none."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device = cuda: process {local_rank} of this machine has no GPU of its own "
            f"({torch.cuda.device_count()} found); use as many processes as GPUs, or --run.device cpu"
        )
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    keep_freed_memory(chosen)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return Ranks(int(os.environ.get("RANK", 0)), world_size, chosen)


def wrap(model: nn.Module, ranks: Ranks, nothing: Batch, instead_of: nn.Module | None = None) -> nn.Module:
    """DDP over several ranks, the model itself on one; TrainingError for trained parameters that no gradient reaches.

    nothing: a batch without examples, whose backward reaches what that of any batch does. It finds a parameter that is
    built but not used, which DDP would wait for forever. And DDP orders its buckets anew after the first backward, and
    from three ranks on the order decides how a sum is rounded; with one before the first step, the first step after a
    resume has the order of the run that was not interrupted.
    instead_of: the wrapper from before other parameters were trained, of no use from now on.
    """
    if isinstance(instead_of, DistributedDataParallel):
        instead_of.reducer._remove_autograd_hooks()  # at once, not when the garbage is collected
    parallel = model
    if ranks.world_size > 1:
        parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    parallel(nothing.to(ranks.device)).loss_sum.backward()
    if unused := without_gradient(model):
        raise TrainingError(f"parameters that no gradient reaches: {', '.join(unused)}")
    model.zero_grad()
    return parallel


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Let DDP reduce gradients in the backward of the last micro-batch only."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


def all_sum(*values: float) -> list[float]:
    """Each host value summed over the ranks, in fp64."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor summed over the ranks, in fp64 on the CPU, on all of them."""
    total = tensor.to("cpu", torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def gather(value: Any) -> list[Any]:
    """One (small, picklable) value of every rank, in rank order, on all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any]:
    """One (picklable) value of every rank, in rank order, on rank 0; nothing on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def on_main(ranks: Ranks, function: Callable[..., Any], *args: Any) -> Any:
    """Call on rank 0 only and hand its result, or its error for the user, to all ranks."""
    result: Any = None
    if ranks.is_main:
        try:
            result = function(*args)
        except USER_ERRORS as error:
            result = error
    if dist.is_initialized():
        box = [result]
        dist.broadcast_object_list(box, src=0)
        result = box[0]
    if isinstance(result, BaseException):
        raise result
    return result
