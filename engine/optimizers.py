"""The optimizers by name (optim.name): how each is built, which settings it reads, and which learning rate it wants."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from data.notes import join
from engine.config import ConfigError, OptimSettings
from engine.dtensors import is_sharded, local_parts
from engine.offload import OffloadedAdamW
from engine.undecorated import SGD, Adafactor, AdamW, Undecorated

Groups = list[dict[str, Any]]
Betas = tuple[float, float]

NO_BITSANDBYTES = "optim.name = 'adamw8bit' needs bitsandbytes: pip install bitsandbytes, or set it to adamw"
NO_GPU = "optim.name = 'adamw8bit' has 8-bit states on an NVIDIA GPU only, and {}: set it to adamw"


class Lion(Undecorated):
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms"): the sign of an interpolated momentum.

    torch has none. The libraries that have it bring dozens of other optimizers, for these six lines.
    """

    def __init__(self, groups: Groups, lr: float, betas: Betas):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; of sharded ones each rank updates its part."""
        for group in self.param_groups:
            reached = [p for p in group["params"] if p.grad is not None]
            for p in reached:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            if reached:
                gradients = local_parts(p.grad for p in reached)
                averages = local_parts(self.state[p]["exp_avg"] for p in reached)
                _take_lion_step(local_parts(reached), gradients, averages, group)


def _take_lion_step(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], averages: list[torch.Tensor], group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    signs = torch._foreach_lerp(averages, gradients, 1 - beta1)
    torch._foreach_sign_(signs)
    torch._foreach_add_(weights, signs, alpha=-group["lr"])
    torch._foreach_lerp_(averages, gradients, 1 - beta2)


class Muon(Undecorated):
    """torch's Muon for the groups with "use_muon", and AdamW for the others, as one optimizer (Jordan et al. 2024).

    An update of Muon has the size of one of AdamW: 0.2 * sqrt(max(rows, columns)) times an orthogonal matrix (Liu et
    al. 2025, "Muon is scalable for LLM training"), so that both take optim.lr and optim.weight_decay as they are.
    """

    def __init__(self, groups: Groups, lr: float, momentum: float, betas: Betas, eps: float):
        of_matrices = [group for group in groups if group["use_muon"]]
        others = [group for group in groups if not group["use_muon"]]
        kind: Any = type("MuonOfMatrices", (Undecorated, torch.optim.Muon), {})  # torch has it since 2.9
        self.parts: dict[bool, torch.optim.Optimizer] = {}
        if of_matrices:
            self.parts[True] = kind(of_matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        if others:
            self.parts[False] = AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Let each of the two update its groups, which may have been replaced by those of a checkpoint."""
        for use_muon, part in self.parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            part.step()


def _betas(optim: OptimSettings) -> Betas:
    return optim.beta1, optim.beta2 or 0.0  # never None here, after fill_in


def _adamw(groups: Groups, optim: OptimSettings) -> AdamW:
    chosen = OffloadedAdamW if optim.offload else AdamW
    return chosen(groups, lr=optim.lr, betas=_betas(optim), eps=optim.eps, fused=True)


def _adamw8bit(groups: Groups, optim: OptimSettings) -> torch.optim.Optimizer:
    parameters = _refuse_sharded(groups, optim)
    if any(p.device.type != "cuda" for p in parameters):
        raise ConfigError(NO_GPU.format("run.device is the CPU"))
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    built: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=optim.lr, betas=_betas(optim), eps=optim.eps)
    return built


def _sgd(groups: Groups, optim: OptimSettings) -> SGD:
    momentum = optim.momentum or 0.0
    return SGD(groups, lr=optim.lr, momentum=momentum, nesterov=momentum > 0)


def _adafactor(groups: Groups, optim: OptimSettings) -> Adafactor:
    _refuse_sharded(groups, optim)
    return Adafactor(groups, lr=optim.lr)


def _lion(groups: Groups, optim: OptimSettings) -> Lion:
    return Lion(groups, optim.lr, _betas(optim))


def _muon(groups: Groups, optim: OptimSettings) -> Muon:
    _refuse_sharded(groups, optim)
    if not any(group["use_muon"] for group in groups):
        raise ConfigError("optim.name = 'muon' trains matrices of the layers, and all are frozen: set it to adamw")
    return Muon(groups, optim.lr, optim.momentum or 0.0, _betas(optim), optim.eps)


def _refuse_sharded(groups: Groups, optim: OptimSettings) -> list[torch.Tensor]:
    """Return the parameters; ConfigError if they are sharded, for optimizers that need a matrix as a whole."""
    parameters = [p for group in groups for p in group["params"]]
    if parameters and is_sharded(parameters[0]):
        raise ConfigError(
            f"optim.name = {optim.name!r} needs each weight as a whole, and a rank has a part of it: set "
            "distributed.strategy to ddp, or optim.name to adamw, sgd or lion"
        )
    return parameters


# {optim.name: function(parameter groups, [optim]) -> optimizer}. A group has "params", "weight_decay" and "lr_scale",
# by which set_learning_rate multiplies its learning rate; of muon also "use_muon".
OPTIMIZERS: dict[str, Callable[[Groups, OptimSettings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}

# {optim.name: those settings of the update that it reads}. An optimizer of a plugin may read all of them.
SETTINGS = {
    "adamw": ("beta1", "beta2", "eps"),
    "adamw8bit": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
    "adafactor": (),
    "lion": ("beta1", "beta2"),
    "muon": ("beta1", "beta2", "eps", "momentum"),
}

# {optim.name: which learning rate it wants, in place of AdamW's}.
USUAL_RATES = {
    "sgd": 'usually takes 1e-3 to 6e-2 (Dosovitskiy et al. 2021, "An image is worth 16x16 words", table 4)',
    "adafactor": "multiplies it by the root mean square of each weight, and usually takes 1e-3 (Raffel et al. 2020, "
    '"Exploring the limits of transfer learning", section 3.1.2)',
    "lion": "usually takes 3 to 10 times less than adamw, and as many times more weight decay (Chen et al. 2023, "
    '"Symbolic discovery of optimization algorithms", section 5)',
}


def check_optimizer(optim: OptimSettings) -> None:
    """Raise ConfigError for settings that the chosen optimizer does not read, and where it cannot run at all."""
    default = OptimSettings()
    read = SETTINGS.get(optim.name)
    for setting in ("beta1", "beta2", "eps", "momentum"):
        value = getattr(optim, setting)
        if read is not None and setting not in read and value != getattr(default, setting):
            readers = join([name for name, settings in SETTINGS.items() if setting in settings])
            raise ConfigError(
                f"optim.{setting} = {value} has no effect on {optim.name}, only on {readers}: leave it out"
            )
    if optim.offload and optim.name != "adamw":
        raise ConfigError(f"optim.offload moves the states of adamw, and optim.name = {optim.name!r}: leave it out")
    if optim.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optim.name = 'muon' needs torch 2.9 or newer, and this is torch {torch.__version__}")
    if optim.name == "adamw8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(NO_BITSANDBYTES)
        if not torch.cuda.is_available():
            raise ConfigError(NO_GPU.format("this machine has none"))


def fill_in(optim: OptimSettings) -> OptimSettings:
    """Return the settings with the numbers that stand for none, which differ between the optimizers."""
    beta2 = (0.99 if optim.name == "lion" else 0.999) if optim.beta2 is None else optim.beta2
    momentum = (0.95 if optim.name == "muon" else 0.9) if optim.momentum is None else optim.momentum
    return replace(optim, beta2=beta2, momentum=momentum)


def describe_optimizer(optim: OptimSettings) -> list[str]:
    """Return a note where optim.lr is at its default, which is made for adamw, and the optimizer wants another."""
    if optim.lr != OptimSettings().lr or optim.name not in USUAL_RATES:
        return []
    return [f"optim.lr = {optim.lr:g} is a learning rate of adamw; {optim.name} {USUAL_RATES[optim.name]}"]
