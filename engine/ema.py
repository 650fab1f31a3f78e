"""The average of the weights over the steps of a run, which often generalises better than the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """average = d * average + (1 - d) * weights after every step of the optimizer (Polyak & Juditsky 1992).

    d rises with the steps, min(decay, (1 + step) / (10 + step)), so that a short run does not average where it began
    (as TensorFlow's ExponentialMovingAverage with num_updates). The averages are part of the optimizer's state, under
    "average", and so of every checkpoint that a run goes on from. decay 0: there is none, and nothing is done.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        self.optimizer, self.decay = optimizer, decay

    @torch.no_grad()
    def update_(self, step: int) -> None:
        """Take in the weights after `step` steps of the optimizer, counted from 1."""
        if not self.decay:
            return
        weights = [p for group in self.optimizer.param_groups for p in group["params"] if self.optimizer.state[p]]
        for p in weights:
            if "average" not in self.optimizer.state[p]:  # a weight's first step, before which the optimizer has none
                self.optimizer.state[p]["average"] = p.detach().clone()
        averages = [self.optimizer.state[p]["average"] for p in weights]
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model is its average inside, to be evaluated and saved; after that it is as it was."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By value: DDP and the optimizer hold the parameters themselves."""
        averaged = {p: state["average"] for p, state in self.optimizer.state.items() if "average" in state}
        if averaged:
            weights: list[Tensor] = [*averaged]
            kept = [p.clone() for p in weights]
            torch._foreach_copy_(weights, [*averaged.values()])
            torch._foreach_copy_([*averaged.values()], kept)
