"""Regularisation that the loop calls: penalties, schedules of dropout and freezing; seeds."""

from __future__ import annotations

import difflib
import random
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import ConfigError, DropoutSettings, RegularizeSettings
from engine.dtensors import local, sum_over_parts
from engine.optim import decayed, depths, to_steps
from models import TaskModel, drop_graphs


class Penalties:
    """A penalty that is added to the loss of every optimizer step:

        l1 * sum |w| + l2 / 2 * sum w^2 + l2_sp / 2 * sum (w - w0)^2

    w: the trained parameters with weight decay (engine.optim.decayed: matrices and embeddings) whose names match
    regularize.penalized_parameters (all without a pattern) and that a gradient reaches.
    w0: the value of a weight in the recipe's checkpoint (L2-SP: Li et al. 2018, "Explicit inductive bias for transfer
    learning"). A new head has none, so l2_sp does not apply to it.
    pretrained: the model as in the recipe's checkpoint, before any training; needed for l2_sp only.
    Raises ConfigError for a pattern that matches no parameter, and for l2_sp if no penalised weight is pretrained.
    """

    def __init__(self, model: nn.Module, settings: RegularizeSettings, pretrained: TaskModel | None = None):
        self.settings = settings
        self.value: Tensor | float = 0.0  # of the last step; a tensor until it is logged, so that the step never waits
        names = {name: p for name, p in decayed(dict(model.named_parameters())).items() if p.requires_grad}
        for pattern in settings.penalized_parameters:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
                raise ConfigError(
                    f"regularize.penalized_parameters = {pattern!r} matches no trained matrix or embedding; "
                    f"one is {near[0]!r}"
                )
        patterns = settings.penalized_parameters or ("*",)
        self.weights = {n: p for n, p in names.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
        self.start: dict[str, Tensor] = {}
        if settings.l2_sp and pretrained is not None:
            parameters, new = dict(pretrained.named_parameters()), set(pretrained.report.initialised)
            known = [name for name in self.weights if name in parameters and name not in new]
            self.start = {name: local(parameters[name].detach().to(self.weights[name].device)) for name in known}
        if settings.l2_sp and not self.start:
            raise ConfigError(
                f"regularize.l2_sp = {settings.l2_sp} has no effect: no weight that is trained and penalised is "
                "pretrained (model.init, model.lora.rank, regularize.penalized_parameters)"
            )

    @torch.no_grad()
    def add_gradients_(self) -> None:
        """Add the gradient of the penalties. Call it once an optimizer step, on unscaled gradients summed over ranks.

        A penalty then counts once, whatever the number of micro-batches and ranks.
        """
        l1, l2, l2_sp = self.settings.l1, self.settings.l2, self.settings.l2_sp
        if not (l1 or l2 or l2_sp):
            return
        reached = {name: p for name, p in self.weights.items() if p.grad is not None}
        weights = {name: local(p) for name, p in reached.items()}
        gradients = {name: local(p.grad) for name, p in reached.items() if p.grad is not None}
        terms: list[Tensor] = []
        if l1 and weights:
            torch._foreach_add_([*gradients.values()], torch._foreach_sign([*weights.values()]), alpha=l1)
            terms += [l1 * norm for norm in torch._foreach_norm([*weights.values()], 1)]
        if l2 and weights:
            torch._foreach_add_([*gradients.values()], [*weights.values()], alpha=l2)
            terms += [l2 / 2 * norm.square() for norm in torch._foreach_norm([*weights.values()], 2)]
        pretrained = [name for name in reached if name in self.start]
        if l2_sp and pretrained:
            change = torch._foreach_sub([weights[name] for name in pretrained], [self.start[n] for n in pretrained])
            torch._foreach_add_([gradients[name] for name in pretrained], change, alpha=l2_sp)
            terms += [l2_sp / 2 * norm.square() for norm in torch._foreach_norm(change, 2)]
        self.value = 0.0
        if terms:
            self.value = sum_over_parts(torch.stack(terms).sum(), next(iter(reached.values())))

    def log(self, value: float) -> dict[str, float]:
        """Return {"penalty": its value in the last step, read from `self.value`} for metrics.jsonl; {} without one."""
        on = self.settings.l1 or self.settings.l2 or self.settings.l2_sp
        return {"penalty": value} if on else {}


class DropoutSchedule:
    """A schedule of the model's dropout rates, including drop path: each is multiplied by a function of the step.

    p: the share of the run that is done. s: model.dropout.switch_step, as a share of the run. The factor is

    - constant: 1;
    - linear: p (after Morerio et al. 2017, "Curriculum dropout");
    - early: max(0, 1 - p / s), against underfitting (Liu et al. 2023, "Dropout reduces underfitting");
    - late: 0 until s, then 1, against overfitting (the same paper).
    """

    def __init__(self, model: nn.Module, settings: DropoutSettings, total: int):
        self.settings, self.total = settings, total
        self.rates: list[tuple[Any, str, float]] = [
            (module, name, float(getattr(module, name)))
            for module in model.modules()
            for name in (("p",) if isinstance(module, nn.Dropout) else ("dropout", "drop_path_rate"))
            if isinstance(getattr(module, name, None), float)
        ]

    def set_(self, step: int) -> None:
        """Set the rates of optimizer step `step`, from 0."""
        if self.settings.schedule == "constant":
            return
        factor = self.factor(step)
        for module, name, rate in self.rates:
            setattr(module, name, rate * factor)

    def factor(self, step: int) -> float:
        """Return the factor of the rates in optimizer step `step`, from 0."""
        switch = to_steps(self.settings.switch_step, self.total)
        if self.settings.schedule == "linear":
            return step / max(1, self.total - 1)
        if self.settings.schedule == "early":
            return max(0.0, 1.0 - step / switch) if switch else 0.0
        return 1.0 if self.settings.schedule == "constant" or step >= switch else 0.0


class GradualUnfreezing:
    """Gradual unfreezing (Howard & Ruder 2018, "ULMFiT"): the head is trained first, then one more layer at a time.

    Every model.gradual_unfreezing steps the next layer is added, from the last one down, and the embeddings at the end.
    Parameters that model.freeze or LoRA freezes stay frozen, and a layer that has no other is passed over. Which
    parameters are trained is a pure function of the step.
    Raises ConfigError where the run ends before all layers are trained.
    """

    def __init__(self, model: nn.Module, every: float, total: int):
        self.every = max(1, to_steps(every, total)) if every else 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        depth = depths(name for name, _ in model.named_parameters())
        turns = sorted({depth[name] for name in trained})
        self.turns = [(p, turns.index(depth[name])) for name, p in trained.items()]
        if self.every and self.every * (len(turns) - 1) >= total > 0:
            most = (total - 1) // (len(turns) - 1)
            remedy = f"set it to {most:,} or less" if most else f"train for {len(turns)} steps or more"
            raise ConfigError(
                f"model.gradual_unfreezing = {every:g}: unfreezing {len(turns)} groups of layers, one every "
                f"{self.every} steps, takes more than {total:,} steps; {remedy}, or name the parameters that stay "
                "frozen in model.freeze"
            )

    def set_(self, step: int) -> bool:
        """Set which parameters are trained in optimizer step `step`, from 0; return whether they changed."""
        if not self.every:
            return False
        last_turn = step // self.every
        changed = False
        for p, turn in self.turns:
            changed |= p.requires_grad != (turn <= last_turn)
            p.requires_grad_(turn <= last_turn)
        if changed:
            drop_graphs()
        return changed


def seed_dropout(seed: int, position: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Seed the dropout of one micro-batch by four numbers, so that no generator state has to be saved.

    Only the generator of `device` is seeded. torch.manual_seed seeds all devices, which is much slower.
    """
    entropy = np.random.SeedSequence([seed, position, micro_batch, rank])
    if device.type == "mps":
        torch.mps.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) % 2**63)
        return
    generators = torch.cuda.default_generators if device.type == "cuda" else [torch.default_generator]
    generators[device.index or 0].manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on the CPU and the GPUs, for the user's own code.

    The engine does not depend on them: it has its own random streams, and `seed_dropout` seeds each micro-batch.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's legacy generator, which user code often uses
    torch.manual_seed(seed)
