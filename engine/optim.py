"""AdamW with its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from engine.config import ConfigError, OptimSettings, TrainSettings

LAYER = re.compile(r"(.*?layers)\.(\d+)\.")
MOST_STEPS = 2**53  # beyond it a float no longer counts one by one


def count_steps(train: TrainSettings, epoch_steps: int) -> int:
    """The optimizer steps of a run: train.max_steps, else those of train.epochs with a begun step counted whole.

    Within rounding a product is the whole number that is meant: 1.1 epochs of 50 steps are 55, though 1.1 * 50 > 55.
    """
    setting, value = ("max_steps", train.max_steps) if train.max_steps else ("epochs", train.epochs)
    steps = train.max_steps or train.epochs * epoch_steps
    if steps > MOST_STEPS:
        raise ConfigError(f"train.{setting} = {value} is more than {MOST_STEPS:.0e} steps: lower it")
    return round(steps) if math.isclose(steps, round(steps), rel_tol=1e-12) else math.ceil(steps)


def check_schedule(optim: OptimSettings, total: int) -> None:
    """ConfigError for a wsd schedule whose decay begins before its warm-up is done, so that the rate would jump."""
    wanted = sum(value * total if value < 1 else value for value in (optim.warmup_steps, optim.decay_steps))
    if optim.lr_schedule == "wsd" and wanted > total * (1 + 1e-12):
        raise ConfigError(
            f"optim.warmup_steps = {optim.warmup_steps} and optim.decay_steps = {optim.decay_steps} ask for more than the {total:,} steps of "
            "this run: lower one of them, or train for more steps"
        )


class AdamW(torch.optim.AdamW):
    """torch's, which keeps these methods out of torch.compile; to do so their first call imports all of the compiler.

    That is a second of the start of a run, and nothing here compiles an optimizer: so they are taken as they are.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(model: nn.Module, optim: OptimSettings, weight_decay: float) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices and embeddings decay, biases and norms (one dimension) do not.

    Parameters that learn at another multiple of the learning rate are groups of their own.
    """
    scales = lr_scales(model, optim)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2
            new = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scales[name]}
            groups.setdefault((scales[name], decays), new)["params"].append(p)
    in_order = [group for _, group in sorted(groups.items(), key=lambda item: item[0], reverse=True)]
    return AdamW(in_order, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def lr_scales(model: nn.Module, optim: OptimSettings) -> dict[str, float]:
    """{name: the multiple of the learning rate that this parameter learns at}.

    With layer_decay d and L layers: d ** (L + 1 - i) for layer i from 1, d ** (L + 1) for the embeddings, 1 for the
    last norm and the head (Clark et al. 2020, "ELECTRA"; in this form Bao et al. 2022, "BEiT"); each stack of an
    encoder-decoder counts its own layers. A head_lr and then the patterns of optim.lr_scales, the last that matches,
    come before that. ConfigError for a pattern that matches nothing or a factor that is no number from 0.
    """
    names = [name for name, _ in model.named_parameters()]
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
    """{parameter: how far below the top}: 0 for the head and the norm after the last layer, 1 for the last layer, up to
    the embeddings, below them all. Each stack of an encoder-decoder counts its own layers."""
    places = {name: LAYER.match(name) for name in names}
    stacks: dict[str, int] = {}
    for found in places.values():
        if found:
            stacks[found[1]] = max(stacks.get(found[1], 0), int(found[2]) + 1)
    bottom = max(stacks.values(), default=0) + 1
    is_top = re.compile(r"head\.|(.*\.)?norm\.[a-z]+$")
    return {
        name: stacks[found[1]] - int(found[2]) if found else 0 if is_top.match(name) else bottom
        for name, found in places.items()
    }


def learning_rate(step: int, total: int, optim: OptimSettings) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    Linear warm-up to optim.lr, then, with p in [0, 1) the share of the remaining steps done and m = optim.min_lr_ratio:
    constant: 1; linear: 1 - (1 - m) p; cosine: m + (1 - m) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017);
    wsd (Hu et al. 2024): 1 until the last `optim.decay_steps` steps, which fall linearly to m;
    inverse_sqrt (Vaswani et al. 2017): sqrt(warm-up steps / steps so far), not below m.
    """
    warmup = steps_of(optim.warmup_steps, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if optim.lr_schedule == "constant":
        factor = 1.0
    elif optim.lr_schedule == "linear":
        factor = 1.0 - (1.0 - optim.min_lr_ratio) * progress
    elif optim.lr_schedule == "cosine":
        factor = optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0
    elif optim.lr_schedule == "inverse_sqrt":
        factor = max(optim.min_lr_ratio, math.sqrt(max(1, warmup) / (step + 1)))
    else:  # wsd
        decay = max(1, min(steps_of(optim.decay_steps, total), total - warmup))  # both may have been rounded up
        factor = 1.0 - (1.0 - optim.min_lr_ratio) * max(0.0, (step - (total - decay)) / decay)
    return optim.lr * factor


def steps_of(share_or_steps: float, total: int) -> int:
    """Below 1 a share of all steps, else a number of steps."""
    return round(share_or_steps * total) if share_or_steps < 1 else round(share_or_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of every parameter group, for the next step; one with an "lr_scale" at that multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def without_gradient(model: nn.Module) -> list[str]:
    """Trained parameters that a backward did not reach: a head or a layer that is built but not used."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
