"""Find the source of a NaN or an infinity. This runs only after one has occurred, so it may be slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from data.notes import list_some
from engine.checkpoint import Contents
from engine.distributed import Ranks, all_gather
from engine.dtensors import local
from engine.errors import TrainingError
from engine.precision import Precision
from engine.regularize import seed_dropout
from engine.sharding import gathered
from engine.state import TrainState
from models import TaskModel

MAX_IDS = 8  # examples that a message names


def explain_skipped_step(
    contents: Contents, state: TrainState, micro_batches: Sequence[Batch], loss_sums: Sequence[Tensor], ranks: Ranks
) -> str:
    """Return a sentence on the step just skipped; call it on all ranks, before the gradients are zeroed.

    loss_sums: of the micro-batches, from the objective.
    Raises TrainingError

    - where train.nan_policy = "raise", except in fp16, where overflows are how the loss scale is found;
    - after more than train.max_skipped skipped steps in a row.
    """
    train, amp, position = contents.config.train, contents.amp, state.position - 1
    message = f"step {state.step + 1} (position {position}): the gradient is not finite"
    allowed = train.nan_policy == "skip" or amp.name == "fp16"
    too_many = state.skipped_in_a_row > train.max_skipped
    if amp.name == "fp16" and not too_many:
        return f"{message}, step skipped, loss scale now {amp.scaler.get_scale():g}"
    message += "; " + _find_causes(contents, position, micro_batches, loss_sums, ranks)
    if not allowed:
        raise TrainingError(f"{message}. train.nan_policy = raise stops the run; skip would leave out the step")
    if too_many:
        raise TrainingError(
            f"{message}. {state.skipped_in_a_row} steps in a row were skipped (train.max_skipped = {train.max_skipped})"
        )
    return f"{message}. The step is skipped"


@torch.no_grad()
def _find_causes(
    contents: Contents, position: int, micro_batches: Sequence[Batch], loss_sums: Sequence[Tensor], ranks: Ranks
) -> str:
    """Return what is not finite, and on which ranks.

    A gradient is named only when the forward is finite on every rank: the sum over the ranks spreads a NaN to all.
    """
    seed, objective, amp = contents.config.run.seed, contents.objective, contents.amp  # the seed repeats the dropout
    with gathered(objective):
        found = all_gather(_find_in_forward(seed, position, contents.model, micro_batches, amp, ranks))
        if not any(found):
            found = all_gather(_find_in_losses(micro_batches, loss_sums))
        if not any(found):
            found = all_gather(_find_in_backward(seed, position, objective, micro_batches, amp, ranks))
    if not any(found):
        found = all_gather(_find_in_gradient(objective, micro_batches))
    return "; ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(found) if cause) or "its norm overflows"


def _find_in_forward(
    seed: int, position: int, model: TaskModel, micro_batches: Sequence[Batch], amp: Precision, ranks: Ranks
) -> str:
    """Return the first weight, input or module's output on this rank that is not finite; "" if there is none."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name} is not finite"
    for batch in micro_batches:
        if batch.pixel_values is not None and not batch.pixel_values.isfinite().all():
            return f"the pixels of the input are not finite, {_name_ids(_non_finite_ids(batch, batch.pixel_values))}"
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
            what = f"the output of {bad[0]}" if bad else "the loss"
            return f"first not finite: {what}, {_name_ids(_non_finite_ids(batch, output.logits))}"
    return ""


def _find_in_losses(micro_batches: Sequence[Batch], loss_sums: Sequence[Tensor]) -> str:
    """Return the first training loss that is not finite though the model's own is; "" if there is none."""
    for batch, loss_sum in zip(micro_batches, loss_sums, strict=True):
        if not loss_sum.isfinite():
            return (
                "the model's output is finite, the training objective (train.loss, [regularize]) is not, "
                f"{_name_ids(batch.ids)}"
            )
    return ""


def _find_in_backward(
    seed: int, position: int, objective: nn.Module, micro_batches: Sequence[Batch], amp: Precision, ranks: Ranks
) -> str:
    """Return the first module's output on this rank, from the loss on, whose gradient is not finite; "" if none is.

    Forward and backward run again; the gradients of the step are kept.
    """
    trained = [p for p in objective.parameters() if p.requires_grad]
    num_targets = max(1, sum(batch.num_targets for batch in micro_batches))
    for i, batch in enumerate(micro_batches):
        bad: list[tuple[str, Tensor]] = []
        hooks = [
            module.register_forward_hook(_note_gradient(name, bad))
            for name, module in objective.named_modules()
            if name
        ]
        seed_dropout(seed, position, i, ranks.rank, ranks.device)
        with torch.enable_grad():
            loss = amp.forward(objective, batch.to(ranks.device)).loss_sum / num_targets
            torch.autograd.grad(amp.scaler.scale(loss), trained, allow_unused=True)
        for hook in hooks:
            hook.remove()
        if bad:
            name, gradient = bad[0]
            what = f"the gradient of the output of {name.removeprefix('model.')}"
            ids = _name_ids(_non_finite_ids(batch, gradient))
            return f"the forward is finite; first not finite in the backward: {what}, {ids}"
    return ""


def _find_in_gradient(objective: nn.Module, micro_batches: Sequence[Batch]) -> str:
    """Return the last parameter, the one nearest to the loss, whose gradient is not finite; "" if there is none."""
    for name, parameter in reversed([*objective.named_parameters()]):
        if parameter.grad is not None and not local(parameter.grad).isfinite().all():
            ids = _name_ids([example_id for batch in micro_batches for example_id in batch.ids])
            return f"the forward is finite, the gradient of {name.removeprefix('model.')} is not, {ids}"
    return ""


def _name_ids(ids: Sequence[str]) -> str:
    return f"example ids {list_some(ids, MAX_IDS)}"


def _non_finite_ids(batch: Batch, values: Tensor) -> Sequence[str]:
    """Return the ids of the examples where `values` is not finite; all ids where its rows are no examples or tokens."""
    if not values.numel() or not values.ndim:
        return batch.ids
    finite = values.isfinite().reshape(len(values), -1).all(1).cpu()
    if len(finite) == sum(batch.lengths) > len(batch.ids) == len(batch.lengths):
        finite = torch.stack([tokens.all() for tokens in torch.split(finite, list(batch.lengths))])
    if len(finite) != len(batch.ids):
        return batch.ids
    return [example_id for example_id, ok in zip(batch.ids, finite.tolist(), strict=True) if not ok] or batch.ids


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]


def _note_non_finite(name: str, bad: list[str]) -> Any:
    """Return a forward hook that adds the module `name` to `bad` when its output is not finite."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not all(x.isfinite().all() for x in _tensors(output)):
            bad.append(name)

    return hook


def _note_gradient(name: str, bad: list[tuple[str, Tensor]]) -> Any:
    """Return a forward hook that adds `name` and the gradient of the module's output to `bad` when it is not finite."""

    def note(gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            bad.append((name, gradient))

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        for x in _tensors(output):
            if x.requires_grad:
                x.register_hook(note)  # type: ignore[no-untyped-call]

    return hook
