"""Mixed precision as one object whose methods do nothing in fp32, so that the loop needs no `if`.

Weights, gradients and the optimizer stay fp32; autocast runs the matrix products in bf16 or fp16. fp16 also needs a
scaled loss, so that small gradients survive (Micikevicius et al. 2018): scale, backward, unscale, clip, step or skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.dtensors import is_sharded, local_parts, sum_over_parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


class Precision:
    """Autocast, loss scale, clipping and step for the precision `name` (a key of DTYPES) on `device`."""

    def __init__(self, name: str, device: torch.device):
        self.name = name
        self.device = device
        self.reads_wait = device.type == "cuda"  # whether reading a value waits for what was launched before
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

    def clip_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to the norm `max_norm` (0: no clipping); return their norm before, a scalar.

        A GPU computes the factor itself, 1 within `max_norm`, so that the host need not wait for the norm. On a CPU
        gradients within `max_norm` are not rewritten. With a norm that is not finite nothing is clipped, so that its
        source can still be found. Of sharded gradients each rank scales its part, by the norm of the whole.
        """
        whole = [p.grad for p in parameters if p.grad is not None]
        gradients = local_parts(whole)
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if whole and is_sharded(whole[0]):
            norm = sum_over_parts(norm.square(), whole[0]).sqrt()
        if max_norm > 0 and (self.reads_wait or max_norm < norm.item() < math.inf):
            limited = norm.nan_to_num(nan=0.0, posinf=0.0)  # then the factor is 1
            torch._foreach_mul_(gradients, (max_norm / (limited + 1e-6)).clamp(max=1.0))  # 1e-6: as in torch
        return norm

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> tuple[bool, float]:
        """Take the optimizer step if the norm of the gradient is finite; return whether it is, and the norm.

        On a GPU a fused optimizer of torch is launched before the norm is read: the device updates the weights while
        the host waits. Where `found_inf` is 1, as GradScaler sets it, the optimizer skips the step itself: no weight,
        moment or counter changes. Other optimizers are called after the norm is read. A skip lowers fp16's loss scale.
        """
        skips_itself = self.reads_wait and getattr(optimizer, "_step_supports_amp_scaling", False)
        skips_itself = skips_itself and not is_sharded(
            optimizer.param_groups[0]["params"][0]
        )  # its kernel takes one kind
        if skips_itself:
            optimizer.found_inf = (norm * 0 != 0).float()  # type: ignore[attr-defined]  # NaN and infinity: 1
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        norm_on_host = norm.item()
        is_finite = math.isfinite(norm_on_host)
        if is_finite and not skips_itself:
            optimizer.step()  # the scaler's step would ask the device again whether the gradients are finite
        self.scaler.update()
        return is_finite, norm_on_host


def load_scale(scaler: torch.amp.GradScaler, saved: dict[str, Any]) -> None:
    """Load the state of a loss scale; ValueError where it is not one."""
    own = scaler.state_dict()
    for name, value in own.items():
        if type(saved.get(name)) is not type(value) or not 0 <= saved[name] < math.inf:
            raise ValueError(f"{name} of the loss scale is {saved.get(name)!r:.80}")
    scaler.load_state_dict({name: saved[name] for name in own})
