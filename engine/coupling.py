"""Losses that couple the examples of an optimizer step, exact however the step is split into micro-batches and ranks.

A model that embeds texts learns from all of the step: each text of another example is a negative. No micro-batch knows
them, so the step is computed twice (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited
setup", GradCache):

1. The outputs of all micro-batches, which every rank gets. They are few numbers: a vector each.
2. The loss L of the whole step, and its gradient g = dL/de with respect to each output e.
3. The forward and backward of the loop, in which the loss of a micro-batch is <e, g>: its gradient is that of L.

Dropout is seeded alike in both passes, so e is the same. Where one micro-batch of one rank is the whole step, its loss
is computed directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from data import Batch
from engine import distributed
from engine.distributed import Ranks
from engine.dtensors import sharded_modules
from engine.memory import catch_out_of_memory
from engine.precision import Precision
from engine.regularize import seed_dropout
from engine.step_loss import CoupledObjective, Outputs, outputs_of


def couple_micro_batches(
    objective: nn.Module,
    parallel: nn.Module,
    micro_batches: list[Batch],
    amp: Precision,
    seed: int,
    position: int,
    ranks: Ranks,
) -> list[Batch]:
    """Return the micro-batches of a step with the gradients of its loss; unchanged where examples are independent.

    Call it on all ranks. Where this rank runs out of memory, it raises the error after the others have got what they
    wait for, so that all of them run the step again; but at once where the model is sharded.
    """
    if not isinstance(objective, CoupledObjective) or (len(micro_batches) == 1 and ranks.world_size == 1):
        return micro_batches
    own = list[Outputs]()
    with catch_out_of_memory() as out_of_memory, amp.autocast():
        for i, batch in enumerate(micro_batches):
            seed_dropout(seed, position, i, ranks.rank, ranks.device)
            on_device = batch.to(ranks.device)
            # Through the model alone: DDP has nothing to do without a backward, and a sharded model gathers itself.
            # Gradients are on, since without them compiled layers run uncompiled, and draw another dropout.
            vectors = objective.model(on_device).logits.detach()
            own.append(outputs_of(vectors, on_device))
    if out_of_memory.error is not None and (ranks.world_size == 1 or sharded_modules(parallel)):
        raise out_of_memory.error
    gathered = distributed.all_gather(None if out_of_memory else [(len(x.vectors), x.sequences) for x in own])
    if any(shapes is None for shapes in gathered):
        if out_of_memory.error is not None:
            raise out_of_memory.error
        return micro_batches  # whose step will be run again
    whole, first = _gather(own, gathered, ranks)
    leaf = whole.vectors.detach().requires_grad_()
    with torch.enable_grad():
        losses = objective.step_loss(replace(whole, vectors=leaf))
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
    return _split(micro_batches, own, gradients, losses.detach(), first)


def _gather(
    own: list[Outputs], gathered: list[list[tuple[int, tuple[int, ...]]]], ranks: Ranks
) -> tuple[Outputs, tuple[int, int]]:
    """Return the outputs of all ranks, in rank order, and where those of this rank begin: (its rows, its examples).

    gathered: of each rank, the rows and the sequences of each micro-batch.
    """
    rows = [sum(count for count, _ in shapes) for shapes in gathered]
    sequences = [tuple(n for _, counts in shapes for n in counts) for shapes in gathered]
    vectors, labels = (torch.cat([getattr(x, name) for x in own]) for name in ("vectors", "labels"))
    if ranks.world_size > 1:
        vectors, labels = distributed.gather_rows(vectors, rows), distributed.gather_rows(labels, rows)
    first = sum(rows[: ranks.rank]), sum(map(len, sequences[: ranks.rank]))
    return Outputs(vectors, labels, tuple(n for counts in sequences for n in counts)), first


def _split(
    micro_batches: Sequence[Batch], own: list[Outputs], gradients: Tensor, losses: Tensor, first: tuple[int, int]
) -> list[Batch]:
    """Return the micro-batches, each with the gradients of its rows and the sum of the losses of its examples."""
    row, example = first
    coupled = list[Batch]()
    for batch, outputs in zip(micro_batches, own, strict=True):
        end, last = row + len(outputs.vectors), example + len(outputs.sequences)
        loss = losses[example:last].sum()
        coupled.append(replace(batch, output_gradients=gradients[row:end], output_loss=loss))
        row, example = end, last
    return coupled
