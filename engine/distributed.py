"""Ranks (the processes that torchrun starts), DDP, and collectives for host values; all work in one process too.

Host values (counts, flags, metrics) are sent by gloo, also on GPUs, so that summing them never waits for a device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from engine.objective import check_loss
from engine.optim import names_without_gradient


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of ranks, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str) -> Ranks:
    """Join the process group that torchrun describes in the environment; a single process needs none.

    device: "auto" (a GPU where there is one), "cuda" or "cpu". Raises ConfigError for more processes than GPUs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
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


def wrap(model: nn.Module, ranks: Ranks, empty_batch: Batch) -> nn.Module:
    """Return the model in DDP, or the model itself on a single rank.

    empty_batch: a batch without examples, whose backward reaches the same parameters as that of any batch. It runs
    here once, for two reasons:

    - It finds trained parameters that are never used, for whose gradients DDP would wait forever.
    - DDP reorders its buckets after the first backward, and with three or more ranks that order decides how a sum is
      rounded. The first step after a resume then has the same order as in an uninterrupted run.

    Call it again when other parameters are trained, since DDP reduces those that were trained when it was created. The
    old wrapper does no harm: without a forward of its own it reduces nothing.
    Raises TrainingError with the names of trained parameters that no gradient reaches.
    """
    parallel = model
    if ranks.world_size > 1:
        with warnings.catch_warnings():  # torch 2.14 deprecates it; its successor synchronises the buffers once
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    with unchanged_buffers(model):
        try:
            loss_sum = parallel(empty_batch.to(ranks.device)).loss_sum
        except Exception as error:  # the user's own code fails with errors of every kind
            error.add_note("in the first forward, of a micro-batch without examples, as a rank may get in any step")
            raise
        _check_empty(loss_sum)
        loss_sum.backward()
    if unused := names_without_gradient(model):
        raise TrainingError(f"parameters that no gradient reaches: {', '.join(unused)}")
    model.zero_grad()
    return parallel


def _check_empty(loss_sum: torch.Tensor) -> None:
    """Raise TrainingError unless this is a loss that can be trained on, and 0, as that of no examples is."""
    check_loss(loss_sum, "the loss")
    if loss_sum.item() != 0:
        raise TrainingError(
            f"the loss of a micro-batch without examples is {loss_sum.item():g}, and should be 0: a loss is a sum over "
            "the targets of a micro-batch, not their mean, and has no other terms"
        )


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers after a forward that is no training, such as the running statistics of a BatchNorm."""
    before = {name: buffer.clone() for name, buffer in _saved_buffers(model).items()}
    try:
        yield
    finally:
        for name, buffer in _saved_buffers(model).items():  # anew: a module may have assigned another tensor
            buffer.copy_(before[name])


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: in a forward, each rank updates its own with its own examples."""
    if dist.is_initialized():
        for buffer in _saved_buffers(model).values():
            dist.broadcast(buffer, src=0)


def _saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the persistent buffers; of others, which are computed anew, a rank may have none yet."""
    if next(model.buffers(), None) is None:
        return {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Make DDP reduce the gradients in the next backward if `last`, else only accumulate them on this rank."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


def all_sum(*values: float) -> list[float]:
    """Return each host value summed over the ranks, in fp64."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the ranks, on all ranks: a copy in fp64 on the CPU."""
    total = tensor.to("cpu", torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_gather(value: Any) -> list[Any]:
    """Return a (small, picklable) value of every rank, in rank order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any]:
    """Return a (picklable) value of every rank, in rank order, on rank 0, and [] on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def on_main(ranks: Ranks, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on rank 0 only; return its result, or raise its error (of USER_ERRORS), on all ranks."""
    result: Any = None
    if ranks.is_main:
        try:
            result = function(*args)
        except USER_ERRORS as error:
            result = error
    if dist.is_initialized():
        results = [result]
        dist.broadcast_object_list(results, src=0)
        result = results[0]
    if isinstance(result, BaseException):
        raise result
    return result
