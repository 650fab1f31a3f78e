"""The size of a micro-batch that fits into memory. It changes only the speed, so it is not part of the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch, Examples, MicroBatching
from data.lengths import longest_examples
from engine.config import TrainSettings
from engine.distributed import Ranks, all_gather, all_sum, set_gradient_sync, unchanged_buffers
from engine.dtensors import local, sharded_modules
from engine.errors import TrainingError
from engine.kept_limit import KeptLimit
from engine.precision import Precision

USABLE_SHARE = 0.8  # of the free memory; fragmentation, buffers of kernels and other programs need the rest
# Parts of messages, in lower case: CUDA and HIP, hosts of two kinds, cuBLAS, cuDNN and their like, NCCL.
OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "not enough memory"),
    *("_alloc_failed", "calling `cublascreate(", "failed to cuda calloc"),
)
NUM_PROBES = 4  # examples whose forward measures the bytes of a token


@dataclass
class OutOfMemory:
    """The result of catch_out_of_memory: true once it has caught an error."""

    error: RuntimeError | None = None

    def __bool__(self) -> bool:
        return self.error is not None


@contextmanager
def catch_out_of_memory() -> Iterator[OutOfMemory]:
    """Catch an out-of-memory error, of a GPU or of the host, and store it. Other errors are raised.

    The traceback of the error is removed, because its frames keep tensors alive.
    """
    caught = OutOfMemory()
    try:
        yield caught
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        error.__context__ = None
        caught.error = error.with_traceback(None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that memory is short: torch's own, a library's of the GPU, or the host's."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(message in said for message in OUT_OF_MEMORY)


def check_can_repeat(
    caught: OutOfMemory,
    parallel: nn.Module,
    micro_batches: Sequence[Batch],
    has_begun: bool,
    kept_limit: KeptLimit,
    step: int,
    ranks: Ranks,
) -> None:
    """Raise TrainingError where this rank ran out of memory while the others wait for more than its gradients.

    has_begun: whether the last backward of the step had begun on this rank. Then it has perhaps sent some gradients.
    The ranks of a sharded model wait for its part of the next layer. In both cases it cannot join them again. The error
    has the command that resumes the run, which then takes smaller micro-batches (kept_limit).
    """
    if not caught or ranks.world_size == 1 or not (has_begun or sharded_modules(parallel)):
        return
    largest = max(micro_batches, key=lambda batch: batch.num_tokens)
    if len(largest.ids) < 2:
        raise TrainingError(f"step {step + 1}: {_too_long_message(largest.num_tokens)}") from caught.error
    raise TrainingError(
        f"step {step + 1}: rank {ranks.rank} ran out of memory while the ranks exchanged their layers or gradients; "
        "resume from the last checkpoint with --resume, or let torchrun --max-restarts with --run.resume auto do so. "
        f"The run then goes on with {kept_limit.keep(largest.num_tokens // 2):,} tokens at a time"
    ) from caught.error


def any_out_of_memory(caught: OutOfMemory, parallel: nn.Module, empty_batch: Batch, ranks: Ranks) -> bool:
    """Return whether a rank ran out of memory in this step, on all ranks; call it after check_can_repeat.

    The other ranks wait in the last backward of the step for the gradients of this one. So it gives them those of a
    micro-batch without examples, which nobody uses: all ranks run the step again.
    """
    if caught and ranks.world_size > 1:
        set_gradient_sync(parallel, last=True)
        parallel(empty_batch.to(ranks.device)).loss_sum.backward()
    (failed,) = all_sum(bool(caught))
    return bool(failed)


def micro_batch_limits(
    settings: TrainSettings,
    objective: nn.Module,
    states: Sequence[int],
    examples: Examples,
    amp: Precision,
    kept_limit: KeptLimit,
    ranks: Ranks,
) -> MicroBatching:
    """Return the limits of a micro-batch: those of [train], or for "auto" the largest that fit into memory.

    states: bytes of what the optimizer will keep on this rank (optimizer_state.state_bytes).
    kept_limit: of an earlier attempt of this run, which ran out of memory.
    """
    fixed = settings.micro_batch_size if isinstance(settings.micro_batch_size, int) else 0
    limits = MicroBatching(fixed, settings.micro_batch_tokens, ranks.rank, ranks.world_size)
    if settings.micro_batch_size == "auto":
        with unchanged_buffers(objective):
            batch_size = settings.global_batch_size
            limits = largest_micro_batches(limits, objective, states, examples, batch_size, amp, ranks)
    return kept_limit.apply(limits, ranks)


def largest_micro_batches(
    limits: MicroBatching,
    objective: nn.Module,
    states: Sequence[int],
    examples: Examples,
    global_batch_size: int,
    amp: Precision,
    ranks: Ranks,
) -> MicroBatching:
    """Return `limits` with the largest number of tokens that fits, or 0 (no limit) if the longest step fits at once.

    1. Estimate a first limit. The gradients and the states of the optimizer need a fixed memory; what autograd keeps of
       a forward grows with the tokens.
    2. Try forward and backward on the longest examples within the limit; halve the limit until they fit. A sharded
       model is not tried, since a rank that ran out of memory could not join the others again.
    3. Take the smallest limit of all ranks.

    objective: what the loop calls. states: bytes, as for micro_batch_limits.
    Raises TrainingError where the longest example alone does not fit.
    """
    share = -(-min(global_batch_size, len(examples)) // ranks.world_size)
    longest = longest_examples(examples.lengths, share)
    lengths = examples.lengths[longest]
    all_tokens, most = int(lengths.sum()), int(lengths.max())
    objective.train()
    limit = min(all_tokens, _estimate(objective, sum(states), examples, longest, amp, ranks.device))
    gathered = sharded_modules(objective)
    for module in gathered:
        module.reshard()  # which a backward would have done
    while not gathered and not _fits(objective, states, examples, longest, limit, amp, ranks.device):
        if limit <= most:
            raise TrainingError(_too_long_message(most))
        limit //= 2
    limit = min(all_gather(limit))
    return replace(limits, max_examples=0, max_tokens=limit if limit < all_tokens else 0)


def halve_micro_batches(
    limits: MicroBatching, micro_batches: Sequence[Batch], caught: OutOfMemory, step: int, ranks: Ranks
) -> MicroBatching:
    """Return limits for running the same step again: half the tokens of its largest micro-batch that did not fit.

    Call it on all ranks after any_out_of_memory; all get the smallest limit.
    Raises TrainingError where the largest micro-batch of a rank is a single example and does not fit.
    """
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # libraries such as cuBLAS allocate what torch does not hold
    largest = max(micro_batches, key=lambda batch: batch.num_tokens)
    problem = _too_long_message(largest.num_tokens) if caught and len(largest.ids) < 2 else ""
    found = all_gather((problem, largest.num_tokens // 2 if caught else 2**62))
    if problems := [text for text, _ in found if text]:
        raise TrainingError(f"step {step + 1}: {problems[0]}") from caught.error
    return replace(limits, max_examples=0, max_tokens=min(half for _, half in found))


def _too_long_message(tokens: int) -> str:
    return (
        f"one example of {tokens:,} tokens does not fit into memory; train.activation_checkpointing = true or a lower "
        "data.max_length needs less"
    )


def _estimate(
    objective: nn.Module, states: int, examples: Examples, longest: np.ndarray, amp: Precision, device: torch.device
) -> int:
    """Return an estimate of the number of tokens that fit, from the bytes that autograd keeps of some long examples.

    It is 2^62 where the free memory is unknown, and the longest example's length where even these do not fit.
    """
    probes = examples.batch(longest[:NUM_PROBES])
    with catch_out_of_memory() as out_of_memory:
        kept = kept_bytes(objective, probes.to(device), amp)
    if out_of_memory:
        return int(examples.lengths[longest].max())
    trained = sum(local(p).nbytes for p in objective.parameters() if p.requires_grad)
    usable = USABLE_SHARE * free_bytes(device) - trained - states
    return 2**62 if usable == float("inf") else max(1, int(usable * probes.num_tokens / max(1, kept)))


def kept_bytes(objective: nn.Module, batch: Batch, amp: Precision) -> int:
    """Return the bytes that autograd keeps of a forward for the backward: each storage once, without parameters.

    What a sharded model has gathered is freed after each layer, and then has no bytes.
    """
    parameters = {local(p).untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = amp.forward(objective, batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del output  # not earlier, so that what it keeps is counted
    return total


def _fits(
    objective: nn.Module,
    states: Sequence[int],
    examples: Examples,
    longest: np.ndarray,
    limit: int,
    amp: Precision,
    device: torch.device,
) -> bool:
    """Try forward and backward of the largest micro-batch within `limit`, with memory set aside for the optimizer."""
    count = max(1, int(np.searchsorted(examples.lengths[longest].cumsum(), limit, side="right")))
    try:
        with catch_out_of_memory() as out_of_memory:
            set_aside = [torch.empty(size, dtype=torch.uint8, device=device) for size in states]
            output = amp.forward(objective, examples.batch(longest[:count]).to(device))
            output.loss_sum.backward()
            del set_aside  # allocated until here, as in training
    finally:
        objective.zero_grad()
    return not out_of_memory


def free_bytes(device: torch.device) -> float:
    """Return the free memory in bytes; infinity where it is unknown.

    On a GPU: what torch and other programs leave. On the host: this process's share of the machine or its container.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = [_available_bytes(Path("/proc/meminfo")), _free_bytes_of_cgroup(Path("/sys/fs/cgroup"))]
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _available_bytes(meminfo: Path) -> float:
    """Return MemAvailable of Linux, in bytes."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _free_bytes_of_cgroup(cgroup: Path) -> float:
    """Return what the limit of a container (cgroup v2) leaves, in bytes."""
    try:
        most, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(used)
