"""Dropout (Srivastava et al. 2014) that draws a random number only for each dropped element.

On a CPU the random numbers take most of the time of a dropout. The distances between dropped elements are independent
and geometrically distributed with the rate p, like the waiting times of Bernoulli trials. So n * p numbers are drawn
instead of n, and the result has the same distribution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ELEMENTS = 8192  # with fewer elements, one random number for each of them is as fast
MAX_RATE = 0.5  # the same is true above this rate


class Dropout(nn.Dropout):
    """nn.Dropout, computed by `dropout` below."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)"""
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, rate: float) -> Tensor:
    """Set each element of x to zero with probability `rate`, independently; divide the others by 1 - rate.

    On a CPU the random numbers come from torch's default generator, fewer of them than F.dropout draws. On other
    devices and in compiled code it is F.dropout, which has its own kernel there.
    """
    sparse = (
        x.device.type == "cpu" and x.numel() >= MIN_ELEMENTS and rate <= MAX_RATE and not torch.compiler.is_compiling()
    )
    if not rate or not sparse:
        return F.dropout(x, rate)
    out: Tensor = _Dropped.apply(x, sample_dropped_positions(x.numel(), rate), 1 / (1 - rate))
    return out


def sample_dropped_positions(n: int, rate: float) -> Tensor:
    """Return ascending indices of the dropped among n elements; each is dropped with probability 0 < rate < 1.

    The distance to the next index is ceil(log(u) / log(1 - rate)), u uniform in [0, 1): it is at most g with
    probability 1 - (1 - rate)^g. It is computed in fp64, so that a rate of 1e-9 is as exact as one of 0.1.
    """
    expected = n * rate
    count = math.ceil(expected + 4 * math.sqrt(expected) + 8)  # enough but in one of thousands of cases
    found: list[Tensor] = []
    last = 0.0
    while last <= n:
        distance = torch.rand(count, dtype=torch.float64).log_().mul_(1 / math.log1p(-rate)).ceil_()
        found.append(distance.clamp_(max=n + 1).cumsum_(0).add_(last))  # log(0) is -inf
        last = found[-1][-1].item()
    positions = torch.cat(found) if len(found) > 1 else found[0]
    return positions[: int(torch.searchsorted(positions, n, right=True))].long() - 1


class _Dropped(torch.autograd.Function):
    """x * scale, zero at `positions` of the flat x; the backward does the same to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.scale = scale
        return scale_and_zero(x, positions, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return scale_and_zero(grad, positions, ctx.scale), None, None


def scale_and_zero(x: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Return x * scale, with 0 at `positions` of the flat x."""
    return x.contiguous().view(-1).mul(scale).index_fill_(0, positions, 0.0).view(x.shape)
