"""Mixed precision as one object whose parts do nothing when off, so that the loop has no `if amp`.

Weights, gradients and the optimizer stay fp32; autocast runs the matrix products in bf16 or fp16. fp16 also needs the
loss scaled so that small gradients survive (Micikevicius et al. 2018): scale, backward, unscale, clip, step or skip.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """autocast, the loss scale, clipping and the step, for the precision `name` (a key of DTYPES) on `device`."""

    def __init__(self, name: str, device: torch.device):
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.name], enabled=self.name != "fp32")

    def backward(self, loss: Tensor) -> None:
        """A loss that is not finite makes its gradient so, and through their sum the gradient of every rank; to others
        the factor is exactly 1."""
        self.scaler.scale(loss * (1 + 0 * loss.detach())).backward()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def clip_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to `max_norm` (0: leave them); returns their norm before.

        The loop needs the norm on the host in any case, so gradients below `max_norm` are not written again. A norm
        that is not finite clips nothing: which gradient it came from can then still be told.
        """
        parameters = list(parameters)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        on_host = norm.item()
        if 0 < max_norm < on_host < float("inf"):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        return on_host

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: float) -> bool:
        """Step unless the gradient is NaN or infinite; says whether it did. A skipped step lowers fp16's loss scale."""
        finite = -float("inf") < grad_norm < float("inf")
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()
        return finite
