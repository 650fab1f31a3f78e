"""Ranks (the processes that torchrun starts), DDP, and collectives for host values; all work in one process too.

Host values (counts, flags, metrics) are sent by gloo, also on GPUs, so that summing them never waits for a device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import Batch
from engine import heartbeat
from engine.allocator import keep_freed_memory
from engine.config import ConfigError
from engine.errors import USER_ERRORS, LostRankError, TrainingError
from engine.objective import check_loss
from engine.optim import names_without_gradient

MAX_DIGITS, MAX_PORT = 9, 65_535
SLACK_SECONDS = 10.0  # after distributed.timeout_seconds, so that a rank that is missed is named before torch gives up


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of ranks, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str, timeout_seconds: float = 300.0) -> Ranks:
    """Join the process group that torchrun describes in the environment; a single process needs none.

    device: "auto" (a GPU where there is one), "cuda" or "cpu". timeout_seconds: how long to wait for another rank.
    Raises ConfigError for more processes than GPUs, LostRankError where a rank does not join.
    """
    world_size = read_variable("WORLD_SIZE", 1)
    rank, local_rank = read_variable("RANK", 0), read_variable("LOCAL_RANK", 0)
    if rank >= world_size:
        raise ConfigError(f"RANK = {rank} and WORLD_SIZE = {world_size}: start the ranks with torchrun")
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
    store = None
    if world_size > 1:
        store = connect(rank, world_size, timeout_seconds)
        heartbeat.join(store, rank, world_size, timeout_seconds)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=connect(rank, world_size, timeout_seconds),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds + SLACK_SECONDS),
        )
    heartbeat.start(store, rank, world_size, timeout_seconds)
    return Ranks(rank, world_size, chosen)


def read_variable(name: str, default: int) -> int:
    """Return a whole number from 0 from an environment variable of torchrun; ConfigError where it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise ConfigError(f"the environment variable {name} = {text!r:.80} should be a whole number: use torchrun")
    return int(text)


def connect(rank: int, world_size: int, timeout_seconds: float) -> Any:
    """Return a connection of its own to the store of the run, of which each attempt of torchrun has its own part.

    torchrun --max-restarts starts all ranks again with the same store, in which torch would find the addresses of ranks
    that have died. The store is torchrun's, or that of rank 0 where another launcher started the ranks.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or int(port) > MAX_PORT:
        raise ConfigError(
            f"WORLD_SIZE = {world_size} needs MASTER_ADDR and MASTER_PORT, which are {address!r} and {port!r}: start "
            "the ranks with torchrun"
        )
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            int(port),
            world_size,
            is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise LostRankError(
            f"rank {rank} has not reached {address}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout_seconds:g} s "
            f"(distributed.timeout_seconds): {error}"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]


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
    heartbeat.count_collective()
    dist.all_reduce(total)
    return total.tolist()


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the ranks, on all ranks: a copy in fp64 on the CPU."""
    total = tensor.to("cpu", torch.float64, copy=True)
    if dist.is_initialized():
        heartbeat.count_collective()
        dist.all_reduce(total)
    return total


def all_gather(value: Any) -> list[Any]:
    """Return a (small, picklable) value of every rank, in rank order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    heartbeat.count_collective()
    dist.all_gather_object(values, value)
    return values


def check_agreement(values: Mapping[str, Any]) -> None:
    """Raise ConfigError, on all ranks, where a rank has another value than rank 0.

    Ranks that train with different settings or data would not fail: their sums would mean nothing.
    """
    first, *others = all_gather(values)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise ConfigError(
                    f"rank {rank} has {name} = {other[name]!r:.200}, and rank 0 {value!r:.200}: start all ranks with "
                    "the same recipe, data and checkpoint"
                )


def gather_on_main(value: Any) -> list[Any]:
    """Return a (picklable) value of every rank, in rank order, on rank 0, and [] on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    heartbeat.count_collective()
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
        heartbeat.count_collective()
        dist.broadcast_object_list(results, src=0)
        result = results[0]
    if isinstance(result, BaseException):
        raise result
    return result
