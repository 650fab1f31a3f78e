"""How much of a step fits into memory at a time. Nothing here is part of the recipe: a cut changes the speed alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch, Examples, MicroBatching
from engine.distributed import Ranks, gather
from engine.errors import TrainingError
from engine.precision import Precision

USED = 0.8  # of what is free; the rest is for what is not foreseen: fragments, kernels' own buffers, other programs
PROBES = 4  # examples that tell what a token costs
STATES = 3  # tensors of the optimizer and of the average of the weights that a trained parameter may still come to have


def largest_micro_batching(
    cut: MicroBatching, objective: nn.Module, examples: Examples, batch_size: int, amp: Precision, ranks: Ranks
) -> MicroBatching:
    """`cut` with the largest limit in tokens that fits: none where the longest examples fit into one micro-batch.

    First by a model of memory: gradients, the states of the optimizer, and what autograd keeps of a forward, which
    grows with the tokens. Then by trial, forward and backward of the longest examples that the limit lets into one
    micro-batch, with half of it until it works. The smallest limit of all ranks is that of each. objective: what the
    loop calls. TrainingError where the longest example alone does not fit.
    """
    share = -(-min(batch_size, len(examples)) // ranks.world_size)
    longest = np.argsort(examples.lengths, kind="stable")[::-1][:share]
    everything = int(examples.lengths[longest].sum())
    objective.train()
    limit = min(everything, _estimate(objective, examples, longest, amp, ranks.device))
    while not _works(objective, examples, longest, limit, amp, ranks.device):
        if limit <= examples.lengths[longest[0]]:
            raise TrainingError(_too_long(int(examples.lengths[longest[0]])))
        limit //= 2
    limit = min(gather(limit))
    return replace(cut, examples=0, tokens=limit if limit < everything else 0)


def halve_micro_batches(
    cut: MicroBatching, group: Sequence[Batch], error: RuntimeError, step: int, ranks: Ranks
) -> MicroBatching:
    """The cut for the same step again after `error`: half the tokens of its largest micro-batch.

    Any other error than one of memory is raised again. So is that, as a TrainingError, where there is nothing to halve,
    or where other ranks wait for this one's gradients, which a second try would not send in time.
    """
    if not _is_of_memory(error):
        raise error
    batch = max(group, key=lambda batch: batch.num_tokens)
    if len(batch.ids) < 2:
        raise TrainingError(f"step {step + 1}: {_too_long(batch.num_tokens)}") from None
    half = batch.num_tokens // 2
    if ranks.world_size > 1:
        raise TrainingError(
            f"step {step + 1}: a micro-batch of {batch.num_tokens:,} tokens does not fit into the memory of rank "
            f"{ranks.rank}; go on from the last checkpoint with --resume --train.micro_batch_tokens={half}, "
            "in the place of any other limit of a micro-batch"
        ) from None
    return replace(cut, examples=0, tokens=half)


def _too_long(tokens: int) -> str:
    return (
        f"one example of {tokens:,} tokens does not fit into memory; train.activation_checkpointing = true needs less, "
        "and so does a lower data.max_length"
    )


def _estimate(
    objective: nn.Module, examples: Examples, longest: np.ndarray, amp: Precision, device: torch.device
) -> int:
    """The tokens that fit, by what some of the longest examples keep; 2^62 where nothing tells what is free."""
    few = examples.batch(longest[:PROBES])
    try:
        kept = kept_bytes(objective, few.to(device), amp)
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        return int(examples.lengths[longest[0]])
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    room = USED * free_bytes(device) - (1 + STATES) * trained
    return 2**62 if room == float("inf") else max(1, int(room * few.num_tokens / max(1, kept)))


def kept_bytes(objective: nn.Module, batch: Batch, amp: Precision) -> int:
    """What autograd keeps of one forward until the backward, in bytes: each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), amp.autocast():
        out = objective(batch)  # alive until all is counted, so that no address is given twice
    del out
    return sum(kept.values())


def _works(
    objective: nn.Module, examples: Examples, longest: np.ndarray, limit: int, amp: Precision, device: torch.device
) -> bool:
    """Do forward and backward of the largest micro-batch within `limit` fit, beside the states still to come?"""
    count = max(1, int(np.searchsorted(examples.lengths[longest].cumsum(), limit, side="right")))
    trained = [p for p in objective.parameters() if p.requires_grad]
    try:
        states = [torch.empty(STATES * p.numel(), dtype=p.dtype, device=device) for p in trained]
        with amp.autocast():
            out = objective(examples.batch(longest[:count]).to(device))
        out.loss_sum.backward()
        del states  # which were there all the time
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        return False
    finally:
        objective.zero_grad()
    return True


def _is_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_bytes(device: torch.device) -> float:
    """Of a GPU what torch and others leave free; of the host this process's share; infinite where nothing tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = [_available(Path("/proc/meminfo")), _left_in_group(Path("/sys/fs/cgroup"))]
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _available(meminfo: Path) -> float:
    """MemAvailable of Linux, in bytes."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _left_in_group(group: Path) -> float:
    """What the limit of a container (cgroup v2) leaves, in bytes."""
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(used)
