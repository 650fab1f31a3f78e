"""What keeps a fine-tuned model from overfitting, each a function called from the loop."""

from __future__ import annotations

import difflib
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import ConfigError, DropoutSettings, RegularizeSettings
from engine.optim import depths, steps_of
from models import TaskModel


class Penalties:
    """l1 * sum |w| + l2 / 2 * sum w^2 + l2_sp / 2 * sum (w - w0)^2, a part of the loss of every optimizer step.

    w: the trained matrices and embeddings whose names match regularize.penalized_parameters (all for no pattern); never biases and
    norms (one dimension), and no parameter that no gradient reaches. w0: what a weight was in the checkpoint the recipe
    names (L2-SP: Li et al. 2018, "Explicit inductive bias for transfer learning"); a new head has none, so l2_sp does
    not hold it. ConfigError for a pattern that matches nothing, and for l2_sp where nothing is pretrained.

    pretrained: the model as the recipe's checkpoint has it, before any training; needed for l2_sp only.
    """

    def __init__(self, model: nn.Module, settings: RegularizeSettings, pretrained: TaskModel | None = None):
        self.settings = settings
        self.value: Tensor | float = 0.0  # of the last step, a tensor once there was one: read it where it is logged
        names = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim >= 2}
        for pattern in settings.penalized_parameters:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
                raise ConfigError(
                    f"regularize.penalized_parameters = {pattern!r} matches no trained matrix or embedding; one is {near[0]!r}"
                )
        patterns = settings.penalized_parameters or ("*",)
        self.weights = {n: p for n, p in names.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
        self.start: dict[str, Tensor] = {}
        if settings.l2_sp and pretrained is not None:
            theirs, new = dict(pretrained.named_parameters()), set(pretrained.report.initialised)
            known = [name for name in self.weights if name in theirs and name not in new]
            self.start = {name: theirs[name].detach().to(self.weights[name].device) for name in known}
        if settings.l2_sp and not self.start:
            raise ConfigError(
                f"regularize.l2_sp = {settings.l2_sp} has no effect: no weight that is trained and penalised is "
                "pretrained (model.init, model.lora.rank, regularize.penalized_parameters)"
            )

    @torch.no_grad()
    def add_gradients_(self) -> None:
        """Once per optimizer step, after unscaling and after the ranks have summed their gradients, so that it counts
        once however the step was cut."""
        l1, l2, l2_sp = self.settings.l1, self.settings.l2, self.settings.l2_sp
        if not (l1 or l2 or l2_sp):
            return
        reached = {name: p for name, p in self.weights.items() if p.grad is not None}
        weights: list[Tensor] = [*reached.values()]
        gradients = {name: p.grad for name, p in reached.items() if p.grad is not None}
        parts: list[Tensor] = []
        if l1:
            torch._foreach_add_([*gradients.values()], torch._foreach_sign(weights), alpha=l1)
            parts += [l1 * norm for norm in torch._foreach_norm(weights, 1)]
        if l2:
            torch._foreach_add_([*gradients.values()], weights, alpha=l2)
            parts += [l2 / 2 * norm.square() for norm in torch._foreach_norm(weights, 2)]
        if l2_sp:
            held = [name for name in reached if name in self.start]
            moved = torch._foreach_sub([reached[name] for name in held], [self.start[name] for name in held])
            torch._foreach_add_([gradients[name] for name in held], moved, alpha=l2_sp)
            parts += [l2_sp / 2 * norm.square() for norm in torch._foreach_norm(moved, 2)]
        self.value = torch.stack(parts).sum() if parts else 0.0

    def log(self) -> dict[str, float]:
        """{"penalty": its value in the last step}, for metrics.jsonl; nothing where there is none."""
        on = self.settings.l1 or self.settings.l2 or self.settings.l2_sp
        return {"penalty": float(self.value)} if on else {}


def weigh_classes_(model: TaskModel, settings: RegularizeSettings, counts: np.ndarray | None) -> None:
    """Give the head regularize.class_weights. counts: the training targets of each class, None where there are none.

    balanced: N / (C * counts), so that every class has the same weight in all and the mean over the targets is 1 (King
    & Zeng 2001; scikit-learn's formula); a class without a target has 0. ConfigError where the weights are not one
    number above 0 for each class, or there are no classes.
    """
    given = settings.class_weights
    if not given:
        return
    if counts is None or model.head.shape.problem != "single-label":
        raise ConfigError(f"regularize.class_weights = {list(given)} has no effect where no single class is learned")
    if given == ("balanced",):
        present = np.count_nonzero(counts)
        weights = [float(counts.sum() / (present * count)) if count else 0.0 for count in counts]
    else:
        try:
            weights = [float(text) for text in given]
        except ValueError:
            weights = []
        if len(weights) != len(model.labels) or not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(
                f"regularize.class_weights = {list(given)} should be balanced, or {len(model.labels)} numbers above 0, "
                f"for {', '.join(map(repr, model.labels))}"
            )
    model.head.shape = replace(model.head.shape, class_weights=tuple(weights))


class DropoutSchedule:
    """Every dropout of the model, drop path too, times a factor that is a pure function of the step.

    With p the share of the run that is done and s that of model.dropout.switch_step: constant: 1; linear: p (after Morerio
    et al. 2017, "Curriculum dropout"); early: max(0, 1 - p / s), against underfitting; late: 0 until s, then 1, against
    overfitting (both Liu et al. 2023, "Dropout reduces underfitting").
    """

    def __init__(self, model: nn.Module, settings: DropoutSettings, total: int):
        self.settings, self.total = settings, total
        self.rates: list[tuple[Any, str, float]] = [
            (module, name, float(getattr(module, name)))
            for module in model.modules()
            for name in (("p",) if isinstance(module, nn.Dropout) else ("dropout", "path"))
            if isinstance(getattr(module, name, None), float)
        ]

    def set_(self, step: int) -> None:
        """The rates of optimizer step `step`, from 0."""
        if self.settings.schedule == "constant":
            return
        factor = self.factor(step)
        for module, name, rate in self.rates:
            setattr(module, name, rate * factor)

    def factor(self, step: int) -> float:
        """By what the rates are multiplied in optimizer step `step`, from 0."""
        switch = steps_of(self.settings.switch_step, self.total)
        if self.settings.schedule == "linear":
            return step / max(1, self.total - 1)
        if self.settings.schedule == "early":
            return max(0.0, 1.0 - step / switch) if switch else 0.0
        return 1.0 if self.settings.schedule == "constant" or step >= switch else 0.0


class Unfreezing:
    """Gradual unfreezing (Howard & Ruder 2018, "ULMFiT"): the head is trained first, then one layer more at a time.

    Every `model.gradual_unfreezing` steps the next layer joins, from the last down; the embeddings come at the end. What
    model.freeze or LoRA leaves untrained stays so, and where nothing of a layer is trained, its turn falls out. A pure
    function of the step. ConfigError where the run ends before the last of them is trained.
    """

    def __init__(self, model: nn.Module, every: float, total: int):
        self.every = max(1, steps_of(every, total)) if every else 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        depth = depths(name for name, _ in model.named_parameters())
        turns = sorted({depth[name] for name in trained})
        self.turns = [(p, turns.index(depth[name])) for name, p in trained.items()]
        if self.every and self.every * (len(turns) - 1) >= total > 0:
            raise ConfigError(
                f"model.gradual_unfreezing = {every:g}: {len(turns)} parts of this model, one every {self.every} steps, are more "
                f"than {total:,} steps reach; lower it below {total / (len(turns) - 1):.4g} steps, or name what stays "
                "frozen in model.freeze"
            )

    def set_(self, step: int) -> bool:
        """What is trained in optimizer step `step`, from 0; True where that is not what was before."""
        if not self.every:
            return False
        joined = step // self.every
        changed = False
        for p, turn in self.turns:
            changed |= p.requires_grad != (turn <= joined)
            p.requires_grad_(turn <= joined)
        return changed


def seed_dropout(seed: int, position: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Make the dropout of one micro-batch a pure function of these four numbers: no state to save, no ranks alike.

    Only the generator of `device` is seeded: torch.manual_seed goes through all devices, much slower than this.
    """
    entropy = np.random.SeedSequence([seed, position, micro_batch, rank])
    generators = torch.cuda.default_generators if device.type == "cuda" else [torch.default_generator]
    generators[device.index or 0].manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
