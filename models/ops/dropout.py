"""Dropout (Srivastava et al. 2014) that draws only what it drops, since on a CPU the random numbers are what is dear.

The places dropped from n are found by their distances: independent, and geometrically distributed with the rate p, as
the waiting times of Bernoulli trials are. So n * p numbers are drawn in the place of n, from the same distribution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST = 8192  # elements; below it a draw for each of them is as fast
MOST_DROPPED = 0.5  # and so it is above this rate


class Dropout(nn.Dropout):
    """torch's Dropout by `dropout` below."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, rate: float) -> Tensor:
    """Each element of x zero with probability `rate`, else divided by 1 - rate; independent of all others.

    On a CPU the draws are from torch's default generator, and fewer than torch's own; elsewhere, or compiled, it is
    F.dropout, which has a kernel of its own there.
    """
    own = x.device.type == "cpu" and x.numel() >= FEWEST and rate <= MOST_DROPPED and not torch.compiler.is_compiling()
    if not rate or not own:
        return F.dropout(x, rate)
    return _Dropped.apply(x, dropped_places(x.numel(), rate), 1 / (1 - rate))


def dropped_places(n: int, rate: float) -> Tensor:
    """The indices, ascending, of those among n that are dropped, each with probability `rate`; 0 < rate < 1.

    The distance to the next one is ceil(log(u) / log(1 - rate)), u uniform in [0, 1): it is at most g with probability
    1 - (1 - rate)^g. In fp64, so that a rate of 1e-9 is as true as one of 0.1.
    """
    expected = n * rate
    count = math.ceil(expected + 4 * math.sqrt(expected) + 8)  # enough but for one case in thousands
    found: list[Tensor] = []
    last = 0.0
    while last <= n:
        distance = torch.rand(count, dtype=torch.float64).log_().mul_(1 / math.log1p(-rate)).ceil_()
        found.append(distance.clamp_(max=n + 1).cumsum_(0).add_(last))  # log(0) is -inf
        last = found[-1][-1].item()
    places = torch.cat(found) if len(found) > 1 else found[0]
    return places[: int(torch.searchsorted(places, n, right=True))].long() - 1


class _Dropped(torch.autograd.Function):
    """x * scale, zero at `places` of the flat x; its gradient is the same of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(places)
        ctx.scale = scale
        return scaled_but_zero_at(x, places, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return scaled_but_zero_at(grad, places, ctx.scale), None, None


def scaled_but_zero_at(x: Tensor, places: Tensor, scale: float) -> Tensor:
    """x * scale, with 0 at `places` of the flat x."""
    return x.contiguous().view(-1).mul(scale).index_fill_(0, places, 0.0).view(x.shape)
