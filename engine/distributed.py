"""Ranks (the processes that torchrun starts), DDP, and collectives for host values; all work in one process too.

Host values (counts, flags, metrics) are sent by gloo, also on GPUs, so that summing them never waits for a device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import Batch
from data.notes import list_some
from engine import heartbeat, machines, mps
from engine.allocator import keep_freed_memory
from engine.config import ConfigError
from engine.dtensors import is_sharded, sharded_modules
from engine.errors import USER_ERRORS, LostRankError, TrainingError
from engine.objective import check_loss
from engine.optim import names_without_gradient
from engine.precision import Precision

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

    device: run.device; "auto": "cuda" where there is a GPU. timeout_seconds: how long to wait for another rank.
    Raises ConfigError for more processes than GPUs, LostRankError where a rank does not join.
    """
    world_size = read_variable("WORLD_SIZE", 1)
    rank, local_rank = read_variable("RANK", 0), read_variable("LOCAL_RANK", 0)
    if rank >= world_size:
        raise ConfigError(f"RANK = {rank} and WORLD_SIZE = {world_size}: start the ranks with torchrun")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == mps.DEVICE:
        mps.check_available(world_size)
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
        _join(rank, world_size, timeout_seconds, "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    else:
        heartbeat.start(None, rank, world_size, timeout_seconds)
    return Ranks(rank, world_size, chosen)


def _join(rank: int, world_size: int, timeout_seconds: float, backend: str) -> None:
    """Join the process group; LostRankError where a rank does not, ConfigError where a machine has other software."""
    shared = connect(rank, world_size, timeout_seconds)
    network = machines.choose_interface(os.environ["MASTER_ADDR"]) if machines.are_several() else ""
    attempt = heartbeat.join(shared, rank, world_size, timeout_seconds)
    # Two connections, since a request waits for the one before it. Both see only the part of this attempt: torch would
    # find the addresses of ranks that have died.
    store, own = (
        dist.PrefixStore(attempt, connection)  # type: ignore[attr-defined]
        for connection in (connect(1, world_size, timeout_seconds), shared)
    )
    heartbeat.start(store, rank, world_size, timeout_seconds, address())
    own.set(f"network/{rank}", network)
    if machines.is_loopback(network):
        others = (own.get(f"network/{other}").decode() for other in range(world_size))
        machines.check_reachable(heartbeat.name_of(rank), network, others)
    try:
        dist.init_process_group(
            backend,
            store=own,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds + SLACK_SECONDS),
        )
    except RuntimeError as error:
        heartbeat.explain_lost_connection(error)  # ends this process where another rank has failed
        raise LostRankError(
            f"{heartbeat.name_of(rank)} has reached {address()} (MASTER_ADDR, MASTER_PORT), and then not all other "
            "ranks: all machines must reach each other on every port, by "
            f"the network {os.environ.get(machines.INTERFACE, 'of their host names')} ({machines.INTERFACE}): "
            f"{str(error).splitlines()[0]:.200}"
        ) from None
    check_agreement(machines.read_software())


def read_variable(name: str, default: int) -> int:
    """Return a whole number from 0 from an environment variable of torchrun; ConfigError where it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise ConfigError(f"the environment variable {name} = {text!r:.80} should be a whole number: use torchrun")
    return int(text)


def address() -> str:
    """Return where the store of the run is."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def connect(rank: int, world_size: int, timeout_seconds: float) -> Any:
    """Return a connection of its own to the store of the run, which all attempts of torchrun share.

    The store is torchrun's, or that of rank 0 where another launcher started the ranks.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ConfigError(
            f"WORLD_SIZE = {world_size} needs MASTER_ADDR and MASTER_PORT, which are {host!r} and {port!r}: start "
            "the ranks with torchrun"
        )
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            int(port),
            world_size,
            is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise LostRankError(
            f"rank {rank} ({heartbeat.own_who()}) has not reached {address()} (MASTER_ADDR, MASTER_PORT) within "
            f"{timeout_seconds:g} s (distributed.timeout_seconds){machines.explain_unreachable(host)}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def announce_failure(sentence: str) -> None:
    """Tell the other ranks that this one has failed by itself, whether it has joined them or not."""
    world_size = read_variable("WORLD_SIZE", 1)
    if heartbeat.has_joined() or world_size == 1:
        heartbeat.announce_failure(sentence)
        return
    with suppress(dist.DistError, *USER_ERRORS):  # there is nobody to tell
        store = connect(1, world_size, timeout_seconds=2)  # as a client of the store
        heartbeat.announce_failure_before_joining(store, read_variable("RANK", 0), sentence)


def wrap(model: nn.Module, ranks: Ranks, empty_batch: Batch, amp: Precision) -> nn.Module:
    """Return the model in DDP, or the model itself where it is sharded or there is a single rank.

    empty_batch: a batch without examples, whose backward reaches the same parameters as that of any batch. It runs
    here once, for two reasons:

    - It finds trained parameters that are never used, for whose gradients DDP would wait forever.
    - DDP reorders its buckets after the first backward, and with three or more ranks that order decides how a sum is
      rounded. The first step after a resume then has the same order as in an uninterrupted run.

    Call it again when other parameters are trained, since DDP reduces those that were trained when it was created. The
    old wrapper does no harm: without a forward of its own it reduces nothing. A sharded model (engine/sharding.py)
    reduces its own gradients and needs no wrapper.
    Raises TrainingError with the names of trained parameters that no gradient reaches, or that are beside a sharded
    model.
    """
    parallel = model
    if ranks.world_size > 1 and not _is_whole_sharded(model):
        with warnings.catch_warnings():  # torch 2.14 deprecates it; its successor synchronises the buffers once
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    with unchanged_buffers(model):
        try:
            loss_sum = amp.forward(parallel, empty_batch.to(ranks.device)).loss_sum
        except Exception as error:  # the user's own code fails with errors of every kind
            error.add_note("in the first forward, of a micro-batch without examples, as a rank may get in any step")
            raise
        _check_empty(loss_sum)
        loss_sum.backward()
    if unused := names_without_gradient(model):
        raise TrainingError(f"parameters that no gradient reaches: {', '.join(unused)}")
    model.zero_grad()
    return parallel


def _is_whole_sharded(model: nn.Module) -> bool:
    """Return whether the parameters are sharded; TrainingError where trained ones beside them are not."""
    if not sharded_modules(model):
        return False
    if beside := [name for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]:
        raise TrainingError(
            f"{list_some(beside)}: trained beside a sharded model, so nothing sums the gradients over the ranks; use "
            "distributed.strategy = ddp, or make them a part of the model (of its head, say)"
        )
    return True


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
    """Make DDP reduce the gradients in the next backward if `last`, else only accumulate them on this rank.

    Sharded gradients are reduced in every backward, since a rank has no room for whole ones; those of hsdp only within
    a machine, and between machines if `last`.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif dist.is_initialized():
        for module in sharded_modules(model):
            module.set_requires_all_reduce(last, recurse=False)


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


def gather_rows(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the rows of all ranks, in rank order, on all ranks. counts: the number of rows of each rank."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    heartbeat.count_collective()
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def check_agreement(values: Mapping[str, Any]) -> None:
    """Raise ConfigError, on all ranks, where a rank has another value than rank 0.

    Ranks that train with different settings or data would not fail: their sums would mean nothing.
    """
    first, *others = all_gather(values)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise ConfigError(
                    f"{heartbeat.name_of(rank)} has {name} = {other[name]!r:.200}, and {heartbeat.name_of(0)} "
                    f"{value!r:.200}: start all ranks with the same recipe, data, checkpoint and software"
                )


def check_shared_folder(name: str, folder: str, ranks: Ranks) -> None:
    """Raise ConfigError, on all ranks, where a machine does not see rank 0's folder. name: the setting, for the error.

    After a restart rank 0 may be on another machine, which would find no checkpoint there and start anew.
    """
    if not machines.are_several():
        return
    token = on_main(ranks, machines.write_token, folder)
    seen = all_gather((Path(folder) / token).is_file())
    if ranks.is_main:
        (Path(folder) / token).unlink(missing_ok=True)
    for rank, sees_it in enumerate(seen):
        if not sees_it:
            raise ConfigError(
                f"{name} of {heartbeat.name_of(rank)} is not the folder of {heartbeat.name_of(0)}, {folder!r}: all "
                "machines need the same folder, on a file system that they share (such as NFS), since any of them may "
                "have rank 0 after a restart"
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
