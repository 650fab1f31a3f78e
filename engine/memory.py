"""How much of a step fits into memory at a time. Nothing here is part of the recipe: limits change the speed alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch, Examples, MicroBatching
from engine.config import TrainSettings
from engine.distributed import Ranks, all_gather
from engine.errors import TrainingError
from engine.precision import Precision

USED = 0.8  # share of the free memory that is used; fragments, kernels' buffers and other programs need the rest
PROBES = 4  # examples whose forward tells how many bytes a token needs
STATES = 3  # tensors of its size that a trained parameter may still get: two of AdamW, one average of the weights


class OutOfMemory:
    """Falsy; truthy once `catch_out_of_memory` has caught an error, which is then `error`."""

    error: RuntimeError

    def __bool__(self) -> bool:
        return hasattr(self, "error")


@contextmanager
def catch_out_of_memory() -> Iterator[OutOfMemory]:
    """Suppress an out-of-memory error, of a GPU or of the host, and note it. Any other error passes.

    The traceback of the error is dropped, because its frames keep tensors alive.
    """
    caught = OutOfMemory()
    try:
        yield caught
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        error.__context__ = None
        caught.error = error.with_traceback(None)


def micro_batch_limits(
    settings: TrainSettings, objective: nn.Module, examples: Examples, amp: Precision, ranks: Ranks
) -> MicroBatching:
    """Return the limits of a micro-batch: as [train] fixes them, or with "auto" the largest that fit into memory."""
    fixed = settings.micro_batch_size if isinstance(settings.micro_batch_size, int) else 0
    limits = MicroBatching(fixed, settings.micro_batch_tokens, ranks.rank, ranks.world_size)
    if settings.micro_batch_size != "auto":
        return limits
    return largest_micro_batches(limits, objective, examples, settings.global_batch_size, amp, ranks)


def largest_micro_batches(
    limits: MicroBatching,
    objective: nn.Module,
    examples: Examples,
    global_batch_size: int,
    amp: Precision,
    ranks: Ranks,
) -> MicroBatching:
    """Return `limits` with the largest number of tokens that fits; 0, no limit, where the longest step fits whole.

    1. A model of memory gives a first limit: gradients, the states of the optimizer, and what autograd keeps of a
       forward, which grows with the tokens.
    2. A trial runs forward and backward of the longest examples within the limit. The limit is halved until it works.
    3. All ranks take the smallest limit of any rank.

    objective: what the loop calls. Raises TrainingError where the longest example alone does not fit.
    """
    share = -(-min(global_batch_size, len(examples)) // ranks.world_size)
    longest = np.argsort(examples.lengths, kind="stable")[::-1][:share]
    everything = int(examples.lengths[longest].sum())
    objective.train()
    limit = min(everything, _estimate(objective, examples, longest, amp, ranks.device))
    while not _fits(objective, examples, longest, limit, amp, ranks.device):
        if limit <= examples.lengths[longest[0]]:
            raise TrainingError(_too_long(int(examples.lengths[longest[0]])))
        limit //= 2
    limit = min(all_gather(limit))
    return replace(limits, max_examples=0, max_tokens=limit if limit < everything else 0)


def halve_micro_batches(
    limits: MicroBatching, micro_batches: Sequence[Batch], error: RuntimeError, step: int, ranks: Ranks
) -> MicroBatching:
    """Return limits to run the same step again after `error`: half the tokens of its largest micro-batch.

    Raises TrainingError
    - where the largest micro-batch is a single example;
    - on several ranks: the others wait for gradients of this one, and a second try would send them too late.
    """
    largest = max(micro_batches, key=lambda batch: batch.num_tokens)
    if len(largest.ids) < 2:
        raise TrainingError(f"step {step + 1}: {_too_long(largest.num_tokens)}") from error
    half = largest.num_tokens // 2
    if ranks.world_size > 1:
        raise TrainingError(
            f"step {step + 1}: a micro-batch of {largest.num_tokens:,} tokens does not fit into the memory of rank "
            f"{ranks.rank}; resume from the last checkpoint with --resume --train.micro_batch_size=0 "
            f"--train.micro_batch_tokens={half}"
        ) from error
    return replace(limits, max_examples=0, max_tokens=half)


def _too_long(tokens: int) -> str:
    return (
        f"one example of {tokens:,} tokens does not fit into memory; train.activation_checkpointing = true needs less, "
        "and so does a lower data.max_length"
    )


def _estimate(
    objective: nn.Module, examples: Examples, longest: np.ndarray, amp: Precision, device: torch.device
) -> int:
    """Return the number of tokens that fit, by what a forward of some of the longest examples keeps.

    2^62 where the free memory is unknown; the longest example's length where even these examples do not fit.
    """
    probes = examples.batch(longest[:PROBES])
    with catch_out_of_memory() as out_of_memory:
        kept = kept_bytes(objective, probes.to(device), amp)
    if out_of_memory:
        return int(examples.lengths[longest[0]])
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    room = USED * free_bytes(device) - (1 + STATES) * trained
    return 2**62 if room == float("inf") else max(1, int(room * probes.num_tokens / max(1, kept)))


def kept_bytes(objective: nn.Module, batch: Batch, amp: Precision) -> int:
    """Return the bytes autograd keeps of one forward until the backward: each storage once, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = amp.forward(objective, batch)
    total = sum(kept.values())
    del output  # it lives until everything is counted, so that no address is used twice
    return total


def _fits(
    objective: nn.Module, examples: Examples, longest: np.ndarray, limit: int, amp: Precision, device: torch.device
) -> bool:
    """Try forward and backward of the largest micro-batch within `limit`, beside the optimizer's states to come."""
    count = max(1, int(np.searchsorted(examples.lengths[longest].cumsum(), limit, side="right")))
    trained = [p for p in objective.parameters() if p.requires_grad]
    try:
        with catch_out_of_memory() as out_of_memory:
            states = [torch.empty(STATES * p.numel(), dtype=p.dtype, device=device) for p in trained]
            output = amp.forward(objective, examples.batch(longest[:count]).to(device))
            output.loss_sum.backward()
            del states  # allocated until here, as they will be in training
    finally:
        objective.zero_grad()
    return not out_of_memory


def free_bytes(device: torch.device) -> float:
    """Return the free memory in bytes; infinity where it is unknown.

    GPU: what torch and other programs leave. Host: this process's share of what the machine or its container leaves.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = [_available(Path("/proc/meminfo")), _left_in_cgroup(Path("/sys/fs/cgroup"))]
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _available(meminfo: Path) -> float:
    """Return MemAvailable of Linux, in bytes."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _left_in_cgroup(cgroup: Path) -> float:
    """Return what the limit of a container (cgroup v2) leaves, in bytes."""
    try:
        most, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(used)
