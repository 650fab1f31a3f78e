"""An exponential moving average of the weights, which often generalises better than the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.dtensors import local_parts


class Ema:
    """average = d * average + (1 - d) * weights after every step of the optimizer (Polyak & Juditsky 1992).

    d = min(decay, (1 + step) / (10 + step)) rises with the steps, so that the first weights soon lose their influence.
    TensorFlow's ExponentialMovingAverage does the same with num_updates. The averages are in the optimizer's state,
    under "average", and so in every checkpoint to resume from. With decay 0 there is no average.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float):
        self.optimizer, self.decay = optimizer, decay

    @torch.no_grad()
    def update_(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`, from 1."""
        if not self.decay:
            return
        state = self.optimizer.state  # of a plain SGD it has nothing but the averages
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        weights = [p for p in trained if p.grad is not None or "average" in state[p]]
        for p in weights:
            if "average" not in self.optimizer.state[p]:  # the first step of this weight
                self.optimizer.state[p]["average"] = p.detach().clone()
        averages = local_parts(self.optimizer.state[p]["average"] for p in weights)
        torch._foreach_lerp_(averages, local_parts(weights), 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Swap the weights with their average inside the block, for evaluation and saving."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap the values, not the tensors, since DDP and the optimizer refer to the parameters themselves."""
        averaged = {p: state["average"] for p, state in self.optimizer.state.items() if "average" in state}
        if self.decay and averaged:
            weights, averages = local_parts(averaged), local_parts(averaged.values())
            copies = [p.clone() for p in weights]
            torch._foreach_copy_(weights, averages)
            torch._foreach_copy_(averages, copies)
