"""Where a NaN or an infinity came from: runs only once it has happened, so it may be slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from engine.config import Config
from engine.distributed import Ranks, TrainingError, gather
from engine.precision import Precision
from engine.regularize import seed_dropout
from engine.state import TrainState
from models import TaskModel


def left_out(
    config: Config, state: TrainState, model: TaskModel, group: Sequence[Batch], amp: Precision, ranks: Ranks
) -> str:
    """A sentence on the step just left out, called on all ranks; TrainingError unless steps may be left out.

    In fp16 an overflow is part of finding the loss scale, so there a step is left out under either policy; in all cases
    at most train.max_skipped in a row.
    """
    allowed = config.train.nan_policy == "skip" or amp.name == "fp16"
    where = f"step {state.step} (position {state.position - 1})"
    if allowed and state.skipped_in_a_row <= config.train.max_skipped:
        scale = f", loss scale now {amp.scaler.get_scale():g}" if amp.name == "fp16" else ""
        return f"{where}: the gradient is not finite, step left out{scale}"
    mine = first_cause(config.run.seed, state.position - 1, model, group, amp, ranks)
    causes = [f"rank {rank}: {cause}" for rank, cause in enumerate(gather(mine)) if cause]
    advice = (
        f"{state.skipped_in_a_row} steps in a row were left out (train.max_skipped = {config.train.max_skipped})"
        if allowed
        else "train.nan_policy = raise; skip would leave the step out"
    )
    raise TrainingError(f"{where}: the gradient is not finite; {'; '.join(causes)}. {advice}")


@torch.no_grad()
def first_cause(
    seed: int, position: int, model: TaskModel, group: Sequence[Batch], amp: Precision, ranks: Ranks
) -> str:
    """The first thing on this rank that is not finite: a weight, a module's output, or only a gradient."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name} is not finite"
    for i, batch in enumerate(group):
        bad: list[str] = []
        hooks = [
            module.register_forward_hook(_note_non_finite(name, bad)) for name, module in model.named_modules() if name
        ]
        seed_dropout(seed, position, i, ranks.rank)  # the same dropout as when it happened
        with amp.autocast():
            out = model(batch.to(ranks.device))
        for hook in hooks:
            hook.remove()
        if bad or not out.loss_sum.isfinite():
            blamed = ", ".join(_ids_to_blame(batch, out.logits)[:8])
            return f"first not finite: {bad[0] if bad else 'the loss'}, example ids {blamed}"
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
