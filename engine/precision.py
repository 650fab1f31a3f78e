"""Mixed precision as one object whose methods do nothing in fp32, so that the loop needs no `if`.

Weights, gradients and the optimizer stay fp32; autocast runs the matrix products in bf16 or fp16. fp16 also needs a
scaled loss, so that small gradients survive (Micikevicius et al. 2018): scale, backward, unscale, clip, step or skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


class Precision:
    """Autocast, loss scale, clipping and step for the precision `name` (a key of DTYPES) on `device`."""

    def __init__(self, name: str, device: torch.device):
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """Return a context in which matrix products are computed in this precision."""
        return torch.autocast(self.device.type, DTYPES[self.name], enabled=self.name != "fp32")

    def forward(self, model: Callable[[InputT], OutputT], batch: InputT) -> OutputT:
        """Return model(batch), computed in this precision."""
        with self.autocast():
            return model(batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the (scaled) loss.

        The factor below makes every gradient NaN if the loss is not finite, and through the sum over the ranks the
        gradients of every rank. For a finite loss it is exactly 1.
        """
        torch.autograd.backward(self.scaler.scale(loss * (1 + 0 * loss.detach())))

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale."""
        self.scaler.unscale_(optimizer)

    def clip_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to the norm `max_norm` (0: no clipping); return their norm before, a host value.

        Gradients within `max_norm` are not rewritten: the loop needs the norm on the host anyway, so the comparison is
        free. With a norm that is not finite nothing is clipped, so that its source can still be found.
        """
        parameters = list(parameters)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        on_host = norm.item()
        if 0 < max_norm < on_host < float("inf"):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        return on_host

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: float) -> bool:
        """Take the optimizer step if the gradient is finite; return whether it is. A skip lowers fp16's loss scale."""
        finite = -float("inf") < grad_norm < float("inf")
        if finite:
            optimizer.step()  # the scaler's step would ask the device again whether the gradients are finite
        self.scaler.update()
        return finite
