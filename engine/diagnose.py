"""Find the source of a NaN or an infinity. This runs only after one has occurred, so it may be slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from engine.config import TrainSettings
from engine.distributed import Ranks, all_gather
from engine.errors import TrainingError
from engine.precision import Precision
from engine.regularize import seed_dropout
from engine.state import TrainState
from models import TaskModel


def explain_skipped_step(
    train: TrainSettings,
    seed: int,
    state: TrainState,
    model: TaskModel,
    micro_batches: Sequence[Batch],
    loss_sums: Sequence[Tensor],
    amp: Precision,
    ranks: Ranks,
) -> str:
    """Return a sentence on the step just skipped; call it on all ranks, before the gradients are zeroed.

    seed: run.seed, to repeat the dropout of the step. loss_sums: of the micro-batches, from the training objective.
    Raises TrainingError

    - where train.nan_policy = "raise", except in fp16, where overflows are how the loss scale is found;
    - after more than train.max_skipped skipped steps in a row.
    """
    message = f"step {state.step + 1} (position {state.position - 1}): the gradient is not finite"
    allowed = train.nan_policy == "skip" or amp.name == "fp16"
    too_many = state.skipped_in_a_row > train.max_skipped
    if amp.name == "fp16" and not too_many:
        return f"{message}, step skipped, loss scale now {amp.scaler.get_scale():g}"
    message += "; " + _find_causes(seed, state.position - 1, model, micro_batches, loss_sums, amp, ranks)
    if not allowed:
        raise TrainingError(f"{message}. train.nan_policy = raise stops the run; skip would leave out the step")
    if too_many:
        raise TrainingError(
            f"{message}. {state.skipped_in_a_row} steps in a row were skipped (train.max_skipped = {train.max_skipped})"
        )
    return f"{message}. The step is skipped"


@torch.no_grad()
def _find_causes(
    seed: int,
    position: int,
    model: TaskModel,
    micro_batches: Sequence[Batch],
    loss_sums: Sequence[Tensor],
    amp: Precision,
    ranks: Ranks,
) -> str:
    """Return what is not finite, and on which ranks.

    A gradient is named only when the forward is finite on every rank: the sum over the ranks spreads a NaN to all.
    """
    found = all_gather(_find_in_forward(seed, position, model, micro_batches, amp, ranks))
    if not any(found):
        found = all_gather(_find_in_losses(micro_batches, loss_sums))
    if not any(found):
        found = all_gather(_find_in_gradient(model, micro_batches))
    return "; ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(found) if cause) or "its norm overflows"


def _find_in_forward(
    seed: int, position: int, model: TaskModel, micro_batches: Sequence[Batch], amp: Precision, ranks: Ranks
) -> str:
    """Return the first weight or module's output on this rank that is not finite; "" if there is none."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name} is not finite"
    for i, batch in enumerate(micro_batches):
        bad: list[str] = []
        hooks = [
            module.register_forward_hook(_note_non_finite(name, bad)) for name, module in model.named_modules() if name
        ]
        seed_dropout(seed, position, i, ranks.rank, ranks.device)  # the same dropout as in the step
        output = amp.forward(model, batch.to(ranks.device))
        for hook in hooks:
            hook.remove()
        if bad or not output.loss_sum.isfinite():
            ids = ", ".join(_non_finite_ids(batch, output.logits)[:8])
            return f"first not finite: {bad[0] if bad else 'the loss'}, example ids {ids}"
    return ""


def _find_in_losses(micro_batches: Sequence[Batch], loss_sums: Sequence[Tensor]) -> str:
    """Return the first training loss that is not finite though the model's own is; "" if there is none."""
    for batch, loss_sum in zip(micro_batches, loss_sums, strict=True):
        if not loss_sum.isfinite():
            ids = ", ".join(batch.ids[:8])
            return f"the model's output is finite, the training objective (train.loss, [regularize]) is not, ids {ids}"
    return ""


def _find_in_gradient(model: TaskModel, micro_batches: Sequence[Batch]) -> str:
    """Return the first parameter whose gradient is not finite; "" if there is none."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            ids = [example_id for batch in micro_batches for example_id in batch.ids]
            return f"the forward is finite, the gradient of {name} is not, example ids {', '.join(ids[:8])}"
    return ""


def _non_finite_ids(batch: Batch, logits: Tensor) -> Sequence[str]:
    """Return the ids of examples whose logits are not finite; all ids where logits are not per example."""
    if len(logits) != len(batch.ids):
        return batch.ids
    finite = logits.isfinite().flatten(1).all(1).tolist()
    return [example_id for example_id, ok in zip(batch.ids, finite, strict=True) if not ok] or batch.ids


def _note_non_finite(name: str, bad: list[str]) -> Any:
    """Return a forward hook that adds the module `name` to `bad` when its output is not finite."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]
        if not all(x.isfinite().all() for x in tensors):
            bad.append(f"the output of {name}")

    return hook
