"""F11: NaN and infinity in the loss, a gradient, an input or a weight, under each policy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import models
from engine import train
from faults.runs import Bench, Ended, Result, Run

SETTINGS: dict[str, object] = {"train.max_steps": 14, "eval.every_steps": 7}
POLICIES = ("raise", "skip")
VALUES = (math.nan, math.inf, -math.inf)


def run(count: int, seed: int, folder: Path) -> Result:
    """Put each value to each place under each policy, `count` times at random examples and steps."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    for place in PLACES:
        for policy in POLICIES:
            for value in VALUES:
                for _ in range(count):
                    result.add(put(bench, place, policy, value, rng), f"{place}, {policy}")
    return result


def put(bench: Bench, place: str, policy: str, value: float, rng: random.Random) -> str:
    """Run once with the value; return what went wrong."""
    # The examples of the training are also those of the validation, so each id is a training example.
    settings = SETTINGS | {"train.nan_policy": policy, "data.validation": str(bench.reviews)}
    run, example = bench.run(settings), f"r{rng.randrange(100, 120)}"
    step = rng.randrange(2, 10)
    ended = run.finish(in_child=lambda: PLACES[place](example, step, value))
    problem = check(ended, place, policy, example) or check_finite(run)
    run.remove()
    return problem


def check(ended: Ended, place: str, policy: str, example: str) -> str:
    """Return what was wrong with the end of a run with a number that is not finite."""
    if policy == "raise" or place == "weight":  # a weight stays so, and the run ends once too many steps were skipped
        if not ended.has_sentence():
            return f"ended otherwise: {ended.tail()}"
        named = {"weight": "the weight ", "gradient": "the gradient of "}.get(place, f"example ids {example}")
        unsaved = place == "weight" and "NaN or infinite values at step" in ended.err  # it was to be saved first
        return "" if unsaved or (named in ended.err and "step " in ended.err) else f"was not named: {ended.tail()}"
    if ended.code != 0:
        return f"ended: {ended.tail()}"
    return "" if "The step is skipped" in ended.out else "no step was skipped"


def check_finite(run: Run) -> str:
    """Return which tensor of a checkpoint is not finite; "" if none is."""
    for file in sorted(run.folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if not tensor.isfinite().all():
                return f"{file.parent.name}/{file.name} has {name}"
    return ""


def with_model(change: Callable[[Any], None]) -> None:
    original = models.from_pretrained

    def changed(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        change(model)
        return model

    models.from_pretrained = changed


def is_example(batch: Any, example: str) -> torch.Tensor:
    return torch.tensor([name == example for name in batch.ids], dtype=torch.bool)


def in_loss(example: str, step: int, value: float) -> None:
    """Replace the logits of an example, in training."""

    def change(model: Any) -> None:
        model.register_forward_pre_hook(lambda module, args: setattr(module, "bad", is_example(args[0], example)))

        def replace(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out.masked_fill(model.bad[:, None], value) if model.training else out

        model.head.classifier.register_forward_hook(replace)

    with_model(change)


def in_input(example: str, step: int, value: float) -> None:
    """Replace the embeddings of the tokens of an example, in training."""

    def change(model: Any) -> None:
        def note(module: Any, args: Any) -> None:
            batch = args[0]
            lengths = torch.tensor(batch.lengths, dtype=torch.int64)
            model.bad_tokens = is_example(batch, example).repeat_interleave(lengths)

        model.register_forward_pre_hook(note)

        def replace(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out.masked_fill(model.bad_tokens[:, None], value) if model.training else out

        table = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
        table.register_forward_hook(replace)

    with_model(change)


def before_clipping(step: int, change: Callable[[Any], None]) -> None:
    """Call change(weight of the classifier) in one step, between its backward and the clipping."""
    kept: list[Any] = []
    with_model(kept.append)
    calls: list[int] = []
    original = train.Penalties.add_gradients_

    def spoiled(penalties: Any) -> None:
        calls.append(1)
        if len(calls) == step:
            change(kept[0].head.classifier.weight)
        original(penalties)

    train.Penalties.add_gradients_ = spoiled  # type: ignore[method-assign]


def in_gradient(example: str, step: int, value: float) -> None:
    """Put the value into the gradient of a weight, in one step."""
    before_clipping(step, lambda weight: weight.grad[0, 0].fill_(value))


def in_weight(example: str, step: int, value: float) -> None:
    """Put the value into a weight, in one step."""
    before_clipping(step, lambda weight: weight.data[0, 0].fill_(value))


PLACES: dict[str, Callable[[str, int, float], None]] = {
    "loss": in_loss,
    "input": in_input,
    "gradient": in_gradient,
    "weight": in_weight,
}
