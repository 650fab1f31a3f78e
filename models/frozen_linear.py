"""Frozen linear layers that keep their weight in fewer bits, as QLoRA does (Dettmers et al. 2023).

A weight W is rounded once, when the model is built: to bf16; to int8 with one scale for each output (its largest
magnitude / 127); or to nf4, 16 fixed levels with one scale for each 64 values, by bitsandbytes. Each product then uses
the rounded weight in the precision of its input. So a run equals one from a checkpoint with these rounded weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.task_model import TaskModel

STORAGES = ("fp32", "bf16", "int8", "nf4")
NF4_BLOCK = 64  # values with one scale


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is not trained. Weight and bias keep their names; the storage is one of STORAGES."""

    weight_scale: nn.Parameter | None

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.storage = "fp32"
        self.register_parameter("weight_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + b for the weight as it is stored. (..., in) -> (..., out)"""
        if self.storage == "fp32":
            return F.linear(x, self.weight, self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _StoredProduct.apply(x.to(dtype), self.weight, self.weight_scale, self.storage, self._shape)
        return out if self.bias is None else out + self.bias.to(dtype)

    def whole_weight(self) -> Tensor:
        """Return W in fp32, or in its own precision if it is stored as it was. (out, in)"""
        if self.storage == "fp32":
            return self.weight
        return _restore(self.weight, self.weight_scale, self.storage, self._shape, torch.float32)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @torch.no_grad()
    def store_as(self, storage: str) -> None:
        """Round the weight to `storage`, for good. The scales are no buffer, since the ranks exchange buffers."""
        weight = self.weight.detach().float()
        stored, scale = _store(weight, storage)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.storage = storage


class _StoredProduct(torch.autograd.Function):
    """x W^T for a stored W, which is restored in the forward and again in the backward, so that no copy is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, storage: str, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.storage, ctx.shape = storage, shape
        return F.linear(x, _restore(weight, scale, storage, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ _restore(weight, scale, ctx.storage, ctx.shape, grad.dtype), None, None, None, None


def store_frozen_weights(model: TaskModel, storage: str) -> str:
    """Round the weights of all frozen linear layers of the backbone to `storage`; return a line on what it saved.

    Embeddings, norms, biases and the head keep fp32. Raises ModelError where bitsandbytes is missing, for nf4.
    """
    if storage == "nf4":
        _bitsandbytes()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("backbone.")}
    frozen = {name: layer for name, layer in linear.items() if not layer.weight.requires_grad}
    before = after = 0
    error = squares = 0.0
    for name, layer in frozen.items():
        if not isinstance(layer, FrozenLinear):
            layer = FrozenLinear(layer)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
        exact = layer.weight.detach().double()
        before += layer.weight.nbytes
        layer.store_as(storage)
        after += layer.weight.nbytes + (0 if layer.weight_scale is None else layer.weight_scale.nbytes)
        error += (layer.whole_weight().double() - exact).square().sum().item()
        squares += exact.square().sum().item()
    change = (error / max(squares, 1e-30)) ** 0.5
    return (
        f"{len(frozen)} frozen linear layers are kept in {storage}: {after / 1e6:,.1f} MB instead of "
        f"{before / 1e6:,.1f} MB; their weights differ by {change:.2%} (root mean square) from those read, in "
        "best/ too. The adapter was trained with these: on the original weights it gives other values"
    )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, of stored weights those that they stand for, without their scales."""
    hidden = 0
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            stored = layer.weight.numel() + (0 if layer.weight_scale is None else layer.weight_scale.numel())
            hidden += layer.in_features * layer.out_features - stored
    return sum(p.numel() for p in model.parameters()) + hidden


def _store(weight: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """Return an fp32 weight as it is stored, and its scales. (out, in)"""
    if storage == "bf16":
        return weight.bfloat16(), None
    if storage == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale
    # As rows of one block each: for rows that end within a block, bitsandbytes 0.50 restores wrong values on a CPU.
    rows = F.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    packed, state = _bitsandbytes().quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _restore(weight: Tensor, scale: Tensor | None, storage: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return a stored weight of `shape` (out, in) in `dtype`."""
    if scale is None:
        return weight.to(dtype)
    if storage == "int8":
        return (weight * scale).to(dtype)  # in fp32, rounded once
    library = _bitsandbytes()
    wide = torch.float32 if dtype == torch.float64 else dtype  # it has no kernel for fp64
    rows = (len(scale), NF4_BLOCK)
    state = library.QuantState(absmax=scale, shape=rows, dtype=wide, blocksize=NF4_BLOCK, quant_type="nf4")
    restored: Tensor = library.dequantize_4bit(weight, state)
    return restored.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError:
        raise ModelError(
            'model.lora.frozen_weights = "nf4" needs bitsandbytes: pip install "bitsandbytes>=0.46"; bf16 and '
            "int8 need no package"
        ) from None
    return bitsandbytes.functional
