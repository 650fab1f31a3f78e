"""AdamW with its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config import ConfigError, Optim, Train

MOST_STEPS = 2**53  # beyond it a float no longer counts one by one


def count_steps(train: Train, epoch_steps: int) -> int:
    """The optimizer steps of a run: train.max_steps, else those of train.epochs with a begun step counted whole.

    Within rounding a product is the whole number that is meant: 1.1 epochs of 50 steps are 55, though 1.1 * 50 > 55.
    """
    setting, value = ("max_steps", train.max_steps) if train.max_steps else ("epochs", train.epochs)
    steps = train.max_steps or train.epochs * epoch_steps
    if steps > MOST_STEPS:
        raise ConfigError(f"train.{setting} = {value} is more than {MOST_STEPS:.0e} steps: lower it")
    return round(steps) if math.isclose(steps, round(steps), rel_tol=1e-12) else math.ceil(steps)


def check_schedule(optim: Optim, total: int) -> None:
    """ConfigError for a wsd schedule whose decay begins before its warm-up is done, so that the rate would jump."""
    wanted = sum(value * total if value < 1 else value for value in (optim.warmup, optim.decay))
    if optim.schedule == "wsd" and wanted > total * (1 + 1e-12):
        raise ConfigError(
            f"optim.warmup = {optim.warmup} and optim.decay = {optim.decay} ask for more than the {total:,} steps of "
            "this run: lower one of them, or train for more steps"
        )


def build_optimizer(model: nn.Module, optim: Optim, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices and embeddings decay, biases and norms (one dimension) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    Linear warm-up to optim.lr, then, with p in [0, 1) the share of the remaining steps done and m = optim.min_lr:
    constant: 1; linear: 1 - (1 - m) p; cosine: m + (1 - m) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017);
    wsd (Hu et al. 2024): 1 until the last `optim.decay` steps, which fall linearly to m.
    """
    warmup = steps_of(optim.warmup, total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if optim.schedule == "constant":
        factor = 1.0
    elif optim.schedule == "linear":
        factor = 1.0 - (1.0 - optim.min_lr) * progress
    elif optim.schedule == "cosine":
        factor = optim.min_lr + (1.0 - optim.min_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
    else:  # wsd
        decay = max(1, min(steps_of(optim.decay, total), total - warmup))  # both may have been rounded up
        factor = 1.0 - (1.0 - optim.min_lr) * max(0.0, (step - (total - decay)) / decay)
    return optim.lr * factor


def steps_of(share_or_steps: float, total: int) -> int:
    """Below 1 a share of all steps, else a number of steps."""
    return round(share_or_steps * total) if share_or_steps < 1 else round(share_or_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of every parameter group, for the next step; a group with an "lr_scale" of its own, as a new head's, at that
    multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def without_gradient(model: nn.Module) -> list[str]:
    """Trained parameters that a backward did not reach: a head or a layer that is built but not used."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
