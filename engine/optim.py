"""The parameter groups of the optimizer, and the learning rate as a pure function of the step.

OPTIMIZERS (engine/optimizers.py) and SCHEDULES are plain tables. An entry added to one becomes a value of optim.name or
optim.lr_schedule.
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

from data.notes import list_some
from engine.config import ConfigError, OptimSettings, TrainSettings, choose_from
from engine.config.schema import LARGEST
from engine.errors import TrainingError
from engine.optimizers import OPTIMIZERS, check_optimizer, fill_in
from models import ARCHITECTURES

LAYER = re.compile(r"(.*?layers)\.(\d+)\.")
TOP = re.compile(r"head\.|(.*\.)?norm\.[a-z]+$")  # the head, and the norm after the last layer
MAX_STEPS = 2**53  # above it a float does not represent every integer
MAX_NAMES_SHOWN = 8  # parameters in an error message


def build_optimizer(named_parameters: Mapping[str, nn.Parameter], optim: OptimSettings) -> torch.optim.Optimizer:
    """Return the optimizer `optim.name` of the parameters that require a gradient.

    named_parameters: {name as in model.named_parameters(): parameter}. Those of `decayed` have weight decay. There is
    one group for each weight decay and multiple of the learning rate; muon's say whether it trains them: the matrices
    of the layers, but no embedding, head, bias or norm. Raises ConfigError as `lr_scales` and `check_names` do, and
    where the optimizer cannot train these parameters.
    """
    check_names(optim)
    scales = lr_scales(named_parameters, optim)
    with_decay = decayed(named_parameters)
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p in named_parameters.items():
        if p.requires_grad:
            decays = name in with_decay
            use_muon = optim.name == "muon" and decays and p.ndim == 2 and bool(LAYER.match(name))
            new = {"params": [], "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": scales[name]}
            new |= {"use_muon": use_muon} if optim.name == "muon" else {}
            groups.setdefault((scales[name], decays, use_muon), new)["params"].append(p)
    in_order = [group for _, group in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
    optimizer = OPTIMIZERS[optim.name](in_order, fill_in(optim))
    _check_optimizer(optimizer, {p: scales[name] for name, p in named_parameters.items()}, optim.name)
    return optimizer


def decayed(named_parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters to which weight decay and the penalties apply, by name: matrices and embeddings.

    They do not apply to biases and norms (one dimension), nor where an architecture says so (a ViT: its class token and
    positions; models.Architecture.no_weight_decay).
    """
    excluded = {name for architecture in ARCHITECTURES.values() for name in architecture.no_weight_decay}
    generic = {name: re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in named_parameters}
    return {name: p for name, p in named_parameters.items() if p.ndim >= 2 and generic[name] not in excluded}


def _check_optimizer(optimizer: torch.optim.Optimizer, scales: Mapping[nn.Parameter, float], name: str) -> None:
    """Raise ConfigError for an optimizer of the user's own that the loop would not use as it was meant."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optim.name = {name!r}: its function should return an optimizer, not {optimizer!r:.80}")
    arguments = inspect.signature(optimizer.step).parameters.values()
    if any(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments):
        raise ConfigError(
            f"optim.name = {name!r}: {type(optimizer).__name__}.step needs a closure that computes the loss again, and "
            "the loop has one gradient a step: choose an optimizer that steps without one"
        )
    if len({group["lr"] for group in optimizer.param_groups if "lr" in group}) > 1:
        raise ConfigError(
            f"optim.name = {name!r}: its groups differ in lr, which optim.lr_schedule sets in every step: give them an "
            "lr_scale, a multiple of optim.lr"
        )
    for group in optimizer.param_groups:
        if "lr_scale" not in group and any(scales.get(p, 1.0) != 1.0 for p in group["params"]):
            raise ConfigError(
                f"optim.name = {name!r}: its groups lack lr_scale, so optim.layer_decay, optim.head_lr and "
                "optim.lr_scales would have no effect: build it from the groups that its function is given"
            )


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
            "parameters that require a gradient but are in no group of the optimizer: "
            f"{list_some(missing, MAX_NAMES_SHOWN)}; add them to a group, or freeze them (requires_grad = False)"
        )
    if unsaved := [f"one of shape {tuple(p.shape)} in group {i}" for i, p in optimized if p not in known]:
        raise TrainingError(
            "parameters of the optimizer that are not in the objective would be trained but not saved: "
            f"{list_some(unsaved, MAX_NAMES_SHOWN)}; make their module an attribute of the objective"
        )


def lr_scales(names: Iterable[str], optim: OptimSettings) -> dict[str, float]:
    """Return {parameter's name: its multiple of the learning rate}. The last rule that applies wins:

    1. layer_decay d with L layers: d ** (L + 1 - i) for layer i from 1, d ** (L + 1) for the embeddings, and 1 for the
       last norm and the head. Each stack of an encoder-decoder counts its own layers. Clark et al. 2020, "ELECTRA"; in
       this form Bao et al. 2022, "BEiT".
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
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", factor) or float(factor) > LARGEST:
            raise ConfigError(f"optim.lr_scales = {text!r} should be PATTERN=FACTOR, as backbone.layers.0.*=0.5")
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(f"optim.lr_scales = {text!r} matches no parameter; one is called {close[0]!r}")
        scales |= dict.fromkeys(matched, float(factor))
    return scales


def depths(names: Iterable[str]) -> dict[str, int]:
    """Return {parameter's name: its distance from the output}.

    0: the head and the norm after the last layer; 1: the last layer; and so on. The embeddings come after all layers.
    Each stack of an encoder-decoder counts its own layers.
    """
    matches = {name: LAYER.match(name) for name in names}
    stacks: dict[str, int] = {}
    for match in matches.values():
        if match:
            stacks[match[1]] = max(stacks.get(match[1], 0), int(match[2]) + 1)
    bottom = max(stacks.values(), default=0) + 1
    return {
        name: stacks[match[1]] - int(match[2]) if match else 0 if TOP.match(name) else bottom
        for name, match in matches.items()
    }


def count_steps(train: TrainSettings, epoch_steps: int) -> int:
    """Return the optimizer steps of a run: train.max_steps, or those of train.epochs, rounded up.

    A product that differs from an integer only by rounding error is that integer. For example, 1.1 epochs of 50 steps
    are 55 steps, although 1.1 * 50 > 55 in floating point.
    Raises ConfigError for more than 2^53 steps.
    """
    setting, value = ("max_steps", train.max_steps) if train.max_steps else ("epochs", train.epochs)
    steps = train.max_steps or train.epochs * epoch_steps
    if steps > MAX_STEPS:
        raise ConfigError(f"train.{setting} = {value} is more than {MAX_STEPS:.0e} steps: lower it")
    return round(steps) if math.isclose(steps, round(steps), rel_tol=1e-12) else math.ceil(steps)


def to_steps(share_or_steps: float, total_steps: int) -> int:
    """Return a number of steps. A value below 1 is a share of all steps; any other is the number itself."""
    return round(share_or_steps * total_steps) if share_or_steps < 1 else round(share_or_steps)


def check_names(optim: OptimSettings) -> None:
    """Raise ConfigError for a name that is not in its table, and as `check_optimizer` does. It needs no data."""
    tables: dict[str, tuple[str, Iterable[str]]] = {
        "name": (optim.name, OPTIMIZERS),
        "lr_schedule": (optim.lr_schedule, SCHEDULES),
    }
    for setting, (name, choices) in tables.items():
        if name not in choices:
            raise ConfigError(f"optim.{setting} = {name!r}: {choose_from(name, choices)}")
    check_optimizer(optim)


def check_schedule(optim: OptimSettings, total_steps: int) -> None:
    """Raise ConfigError as `check_names` and `learning_rate` do, and for a wsd schedule that would jump.

    It jumps where its decay begins before its warm-up ends. Of the other steps, a few are computed here, so that most
    mistakes in a schedule of the user's own are found before the first step.
    """
    check_names(optim)
    wanted = sum(value * total_steps if value < 1 else value for value in (optim.warmup_steps, optim.decay_steps))
    if optim.lr_schedule == "wsd" and wanted > total_steps * (1 + 1e-12):
        raise ConfigError(
            f"optim.warmup_steps = {optim.warmup_steps} and optim.decay_steps = {optim.decay_steps} ask for more than "
            f"the {total_steps:,} steps of this run: lower one of them, or train for more steps"
        )
    for step in (0, total_steps // 4, total_steps // 2, total_steps - 1):
        learning_rate(step, total_steps, optim)


def _progress(step: int, total_steps: int, optim: OptimSettings) -> float:
    """Return the completed share of the steps after the warm-up, in [0, 1)."""
    warmup = to_steps(optim.warmup_steps, total_steps)
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
    """sqrt(warm-up steps / steps so far), but at least min_lr_ratio (Vaswani et al. 2017)."""
    return max(optim.min_lr_ratio, math.sqrt(max(1, to_steps(optim.warmup_steps, total_steps)) / (step + 1)))


def _warmup_stable_decay(step: int, total_steps: int, optim: OptimSettings) -> float:
    """1 until the last decay_steps steps, in which it falls linearly to min_lr_ratio (Hu et al. 2024)."""
    after_warmup = total_steps - to_steps(optim.warmup_steps, total_steps)
    decay = max(1, min(to_steps(optim.decay_steps, total_steps), after_warmup))  # both may have been rounded up
    return 1.0 - (1.0 - optim.min_lr_ratio) * max(0.0, (step - (total_steps - decay)) / decay)


# {optim.lr_schedule: function(step from 0, total steps, [optim]) -> factor of optim.lr after the warm-up}.
SCHEDULES: dict[str, Callable[[int, int, OptimSettings], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
    "inverse_sqrt": _inverse_sqrt,
}


def learning_rate(step: int, total_steps: int, optim: OptimSettings) -> float:
    """Return the learning rate of optimizer step `step`, from 0: a linear warm-up to optim.lr, then the schedule."""
    warmup = to_steps(optim.warmup_steps, total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    factor = SCHEDULES[optim.lr_schedule](step, total_steps, optim)
    try:
        number = float(factor)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(
            f"optim.lr_schedule = {optim.lr_schedule!r} gives {factor!r:.80} for step {step:,} of {total_steps:,}; a "
            "factor of optim.lr is a finite number from 0"
        )
    return optim.lr * number


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group for the next step: `lr`, times "lr_scale" where the group has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def names_without_gradient(model: nn.Module) -> list[str]:
    """Return the names of trained parameters that the backward did not reach, such as a layer that is never called."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def check_compiled_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, step: int) -> None:
    """Raise TrainingError for trained parameters to which the backward of compiled layers gave no gradient.

    distributed.wrap checks the same in a micro-batch without examples, which the compiled layers never see.
    """
    # The groups, because the names of all parameters would take ten times as long in every step.
    if any(p.requires_grad and p.grad is None for group in optimizer.param_groups for p in group["params"]):
        raise TrainingError(
            f"step {step + 1}: the compiled layers gave no gradient to "
            f"{list_some(names_without_gradient(model), MAX_NAMES_SHOWN)}, which should be trained; train with "
            f"train.compile = false, or with another PyTorch than {torch.__version__} (2.14 is known to be right)"
        )
