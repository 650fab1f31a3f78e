"""Where a NaN or an infinity came from: runs only once it has happened, so it may be slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from engine.config import TrainSettings
from engine.distributed import Ranks, gather
from engine.errors import TrainingError
from engine.precision import Precision
from engine.regularize import seed_dropout
from engine.state import TrainState
from models import TaskModel


def left_out(
    train: TrainSettings,
    seed: int,
    state: TrainState,
    model: TaskModel,
    group: Sequence[Batch],
    amp: Precision,
    ranks: Ranks,
) -> str:
    """A sentence on the step just left out, called on all ranks; TrainingError unless steps may be left out.

    seed: the run's, which its dropout came from. In fp16 an overflow is part of finding the loss scale, so there a step
    is left out under either policy; in all cases at most train.max_skipped in a row.
    """
    what = f"step {state.step + 1} (position {state.position - 1}): the gradient is not finite"
    allowed = train.nan_policy == "skip" or amp.name == "fp16"
    too_many = state.skipped_in_a_row > train.max_skipped
    if amp.name == "fp16" and not too_many:
        return f"{what}, step left out, loss scale now {amp.scaler.get_scale():g}"
    what += "; " + _causes(seed, state.position - 1, model, group, amp, ranks)
    if not allowed:
        raise TrainingError(f"{what}. train.nan_policy = raise; skip would leave the step out")
    if too_many:
        raise TrainingError(
            f"{what}. {state.skipped_in_a_row} steps in a row were left out (train.max_skipped = {train.max_skipped})"
        )
    return f"{what}. The step is left out"


@torch.no_grad()
def _causes(seed: int, position: int, model: TaskModel, group: Sequence[Batch], amp: Precision, ranks: Ranks) -> str:
    """What is not finite, and on which ranks. A gradient is blamed only when every rank's forward is finite: the sum
    over the ranks has carried it to all of them."""
    found = gather(_in_forward(seed, position, model, group, amp, ranks))
    if not any(found):
        found = gather(_in_gradient(model, group))
    return "; ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(found) if cause) or "its norm overflows"


def _in_forward(
    seed: int, position: int, model: TaskModel, group: Sequence[Batch], amp: Precision, ranks: Ranks
) -> str:
    """The first thing on this rank that is not finite, a weight or a module's output; "" if there is none."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name} is not finite"
    for i, batch in enumerate(group):
        bad: list[str] = []
        hooks = [
            module.register_forward_hook(_note_non_finite(name, bad)) for name, module in model.named_modules() if name
        ]
        seed_dropout(seed, position, i, ranks.rank, ranks.device)  # the same dropout as when it happened
        with amp.autocast():
            out = model(batch.to(ranks.device))
        for hook in hooks:
            hook.remove()
        if bad or not out.loss_sum.isfinite():
            blamed = ", ".join(_ids_to_blame(batch, out.logits)[:8])
            return f"first not finite: {bad[0] if bad else 'the loss'}, example ids {blamed}"
    return ""


def _in_gradient(model: TaskModel, group: Sequence[Batch]) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            ids = [x for batch in group for x in batch.ids]
            return f"the forward is finite, the gradient of {name} is not, example ids {', '.join(ids[:8])}"
    return ""


def _ids_to_blame(batch: Batch, logits: Tensor) -> Sequence[str]:
    """The examples whose own logits are not finite; all of the micro-batch where that cannot be told."""
    if len(logits) != len(batch.ids):
        return batch.ids
    finite = logits.isfinite().flatten(1).all(1).tolist()
    return [name for name, ok in zip(batch.ids, finite, strict=True) if not ok] or batch.ids


def _note_non_finite(name: str, bad: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]
        if not all(x.isfinite().all() for x in tensors):
            bad.append(f"the output of {name}")

    return hook
