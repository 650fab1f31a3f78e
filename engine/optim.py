"""The optimizers with their parameter groups, and the learning rate as a pure function of the step.

OPTIMIZERS and SCHEDULES are plain tables: an entry that is added to one is a name that optim.name or
optim.lr_schedule may have.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from engine.config import ConfigError, OptimSettings, TrainSettings, choose_from
from engine.errors import TrainingError

LAYER = re.compile(r"(.*?layers)\.(\d+)\.")
TOP = re.compile(r"head\.|(.*\.)?norm\.[a-z]+$")  # the head, and the norm after the last layer
MOST_STEPS = 2**53  # beyond it a float no longer counts one by one
MOST_NAMES = 8  # parameters that an error names


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019) without the decorators that keep its methods out of torch.compile.

    The first call of a decorated method imports the compiler (torch._dynamo), which takes 1 s at the start of a run.
    Nothing here compiles an optimizer, so the undecorated methods are used. tests/engine/test_optim.py checks that they
    do not import the compiler and that a step equals torch's, bit for bit.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def _adamw(groups: list[dict[str, Any]], optim: OptimSettings) -> AdamW:
    return AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


# optim.name: the function that builds the optimizer of these parameter groups. A group has "params", "weight_decay" and
# "lr_scale", the multiple of the learning rate that set_learning_rate gives it.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimSettings], torch.optim.Optimizer]] = {"adamw": _adamw}


def build_optimizer(named_parameters: Mapping[str, nn.Parameter], optim: OptimSettings) -> torch.optim.Optimizer:
    """Return the optimizer `optim.name` of the parameters that require a gradient.

    named_parameters: {name as in model.named_parameters(): parameter}. Matrices and embeddings have weight decay,
    biases and norms (one dimension) have none. Parameters with another multiple of the learning rate are groups of
    their own. Raises ConfigError as `lr_scales` and `check_names` do.
    """
    check_names(optim)
    scales = lr_scales(named_parameters, optim)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, p in named_parameters.items():
        if p.requires_grad:
            decays = p.ndim >= 2
            new = {"params": [], "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": scales[name]}
            groups.setdefault((scales[name], decays), new)["params"].append(p)
    in_order = [group for _, group in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
    return OPTIMIZERS[optim.name](in_order, optim)


def check_parameters(objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise TrainingError unless the optimizer has exactly the parameters of the objective that require a gradient.

    A parameter in no group would never be trained; one that is not in the objective would be trained but not saved.
    Parameters that gradual unfreezing trains later are in the groups from the start.
    """
    named = dict(objective.named_parameters())
    optimized = [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
    known, reached = set(named.values()), {p for _, p in optimized}
    if missing := [name for name, p in named.items() if p.requires_grad and p not in reached]:
        raise TrainingError(
            f"parameters that require a gradient but are in no group of the optimizer: {_listed(missing)}; add them to "
            "a group, or freeze them (requires_grad = False)"
        )
    if strangers := [f"one of shape {tuple(p.shape)} in group {i}" for i, p in optimized if p not in known]:
        raise TrainingError(
            f"parameters of the optimizer that are not in the objective, so they would be trained but not saved: "
            f"{_listed(strangers)}; make their module an attribute of the objective"
        )


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - MOST_NAMES:,} more"] if len(names) > MOST_NAMES else []
    return ", ".join(names[:MOST_NAMES] + more)


def lr_scales(names: Iterable[str], optim: OptimSettings) -> dict[str, float]:
    """Return {parameter's name: the multiple of the learning rate it is trained with}. The last rule that applies wins:

    1. layer_decay d with L layers: d ** (L + 1 - i) for layer i from 1, d ** (L + 1) for the embeddings, 1 for the
       last norm and the head (Clark et al. 2020, "ELECTRA"; in this form Bao et al. 2022, "BEiT"). Each stack of an
       encoder-decoder counts its own layers.
    2. head_lr, for the head.
    3. The patterns of optim.lr_scales, in their order.

    Raises ConfigError for a pattern that matches nothing, and for a factor that is not a number >= 0.
    """
    names = list(names)
    scales = {name: optim.layer_decay**depth for name, depth in depths(names).items()}
    if optim.head_lr is not None:
        if not optim.lr:
            raise ConfigError(f"optim.head_lr = {optim.head_lr} is a multiple of optim.lr = 0: give that a rate too")
        scales |= {name: optim.head_lr / optim.lr for name in names if name.startswith("head.")}
    for text in optim.lr_scales:
        pattern, _, factor = text.rpartition("=")
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", factor) is None:
            raise ConfigError(f"optim.lr_scales = {text!r} should be PATTERN=FACTOR, as backbone.layers.0.*=0.5")
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(f"optim.lr_scales = {text!r} matches no parameter; one is called {close[0]!r}")
        scales |= dict.fromkeys(matched, float(factor))
    return scales


def depths(names: Iterable[str]) -> dict[str, int]:
    """Return {parameter's name: its distance from the top}.

    0: the head and the norm after the last layer; 1: the last layer; and so on; the embeddings are below all layers.
    Each stack of an encoder-decoder counts its own layers.
    """
    places = {name: LAYER.match(name) for name in names}
    stacks: dict[str, int] = {}
    for found in places.values():
        if found:
            stacks[found[1]] = max(stacks.get(found[1], 0), int(found[2]) + 1)
    bottom = max(stacks.values(), default=0) + 1
    return {
        name: stacks[found[1]] - int(found[2]) if found else 0 if TOP.match(name) else bottom
        for name, found in places.items()
    }


def count_steps(train: TrainSettings, epoch_steps: int) -> int:
    """Return the optimizer steps of a run: train.max_steps, or those of train.epochs, where a begun step is whole.

    A product that is whole within rounding is that number: 1.1 epochs of 50 steps are 55, though 1.1 * 50 > 55.
    Raises ConfigError for more than 2^53 steps.
    """
    setting, value = ("max_steps", train.max_steps) if train.max_steps else ("epochs", train.epochs)
    steps = train.max_steps or train.epochs * epoch_steps
    if steps > MOST_STEPS:
        raise ConfigError(f"train.{setting} = {value} is more than {MOST_STEPS:.0e} steps: lower it")
    return round(steps) if math.isclose(steps, round(steps), rel_tol=1e-12) else math.ceil(steps)


def steps_of(share_or_steps: float, total_steps: int) -> int:
    """Return a number of steps: below 1 the value is a share of all steps, else it is the number itself."""
    return round(share_or_steps * total_steps) if share_or_steps < 1 else round(share_or_steps)


def check_names(optim: OptimSettings) -> None:
    """Raise ConfigError for an optim.name or optim.lr_schedule that is in no table. It needs no data."""
    tables: dict[str, tuple[str, Iterable[str]]] = {
        "name": (optim.name, OPTIMIZERS),
        "lr_schedule": (optim.lr_schedule, SCHEDULES),
    }
    for setting, (name, choices) in tables.items():
        if name not in choices:
            raise ConfigError(f"optim.{setting} = {name!r}: {choose_from(name, choices)}")


def check_schedule(optim: OptimSettings, total_steps: int) -> None:
    """Raise ConfigError as `check_names` does, and for a wsd schedule whose decay begins before its warm-up ends.

    Such a learning rate would jump.
    """
    check_names(optim)
    wanted = sum(value * total_steps if value < 1 else value for value in (optim.warmup_steps, optim.decay_steps))
    if optim.lr_schedule == "wsd" and wanted > total_steps * (1 + 1e-12):
        raise ConfigError(
            f"optim.warmup_steps = {optim.warmup_steps} and optim.decay_steps = {optim.decay_steps} ask for more than "
            f"the {total_steps:,} steps of this run: lower one of them, or train for more steps"
        )


def _progress(step: int, total_steps: int, optim: OptimSettings) -> float:
    """Return the share of the steps after the warm-up that are done, in [0, 1)."""
    warmup = steps_of(optim.warmup_steps, total_steps)
    return (step - warmup) / max(1, total_steps - warmup)


def _constant(step: int, total_steps: int, optim: OptimSettings) -> float:
    return 1.0


def _linear(step: int, total_steps: int, optim: OptimSettings) -> float:
    return 1.0 - (1.0 - optim.min_lr_ratio) * _progress(step, total_steps, optim)


def _cosine(step: int, total_steps: int, optim: OptimSettings) -> float:
    """Half a cosine, from 1 to min_lr_ratio (Loshchilov & Hutter 2017)."""
    progress = _progress(step, total_steps, optim)
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _inverse_sqrt(step: int, total_steps: int, optim: OptimSettings) -> float:
    """sqrt(warm-up steps / steps so far), at least min_lr_ratio (Vaswani et al. 2017)."""
    return max(optim.min_lr_ratio, math.sqrt(max(1, steps_of(optim.warmup_steps, total_steps)) / (step + 1)))


def _warmup_stable_decay(step: int, total_steps: int, optim: OptimSettings) -> float:
    """1 until the last decay_steps steps, which fall linearly to min_lr_ratio (Hu et al. 2024)."""
    after_warmup = total_steps - steps_of(optim.warmup_steps, total_steps)
    decay = max(1, min(steps_of(optim.decay_steps, total_steps), after_warmup))  # both may have been rounded up
    return 1.0 - (1.0 - optim.min_lr_ratio) * max(0.0, (step - (total_steps - decay)) / decay)


# optim.lr_schedule: the factor of optim.lr in a step (from 0) after the warm-up, a pure function of its arguments.
SCHEDULES: dict[str, Callable[[int, int, OptimSettings], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
    "inverse_sqrt": _inverse_sqrt,
}


def learning_rate(step: int, total_steps: int, optim: OptimSettings) -> float:
    """Return the learning rate of optimizer step `step`, from 0: a linear warm-up to optim.lr, then the schedule."""
    warmup = steps_of(optim.warmup_steps, total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    return optim.lr * SCHEDULES[optim.lr_schedule](step, total_steps, optim)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group for the next step; a group with an "lr_scale" gets that multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def without_gradient(model: nn.Module) -> list[str]:
    """Return the names of trained parameters that a backward did not reach, as of a layer that is never called."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
