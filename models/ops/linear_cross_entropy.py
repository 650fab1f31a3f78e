"""Cross entropy of a language model in training, without the logits of all tokens in memory.

With a vocabulary of 50,000, the (T, V) logits in fp32 and their gradient take most of the memory of a step. Here they
exist for one chunk of tokens at a time. The forward also computes the gradients of hidden states, weight and bias, and
the backward only scales them. So no product is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.layers import product_dtype

CHUNK_BYTES = 2**25  # of fp32 logits: small beside the activations of a step, large enough for its products
LARGEST_CHUNK_BYTES = 2**30  # on a GPU, where few large kernels are faster than many small ones
VOCABULARY_MULTIPLE = 64  # to which a GPU's copy of the weight is padded with rows of zeros


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the sum of F.cross_entropy(F.linear(hidden, weight, bias), labels), a scalar in fp32 or wider.

    hidden: (T, D). weight: (V, D). bias: (V,). labels: (T,) classes, each of them a target.
    Under autocast the products are in its precision and their sums in fp32. fp16 is not supported: its gradients need
    the loss scale before they are rounded, and the forward does not know it.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing, product_dtype(hidden))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward and backward of linear_cross_entropy, with d loss / d logits = softmax - target."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needs_bias else None
        loss = hidden.new_zeros((), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            num_rows = _padded_vocabulary(weight, dtype)
            w = _copy_padded(weight, dtype, 0, num_rows)
            b = None if bias is None else _copy_padded(bias, dtype, 0, num_rows)
            size = max(1, _chunk_bytes(hidden.device) // (4 * len(weight)))
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                h, label = hidden[rows].to(dtype), labels[rows, None]
                log_p = F.log_softmax(F.linear(h, w, b)[:, : len(weight)].to(wide), -1)
                loss -= (1 - smoothing) * log_p.gather(1, label).sum()
                if smoothing:
                    loss -= smoothing * log_p.mean(-1).sum()
                grad = log_p.exp_()
                if smoothing:
                    grad -= smoothing / len(weight)
                grad.scatter_add_(1, label, grad.new_full((), smoothing - 1).expand(label.shape))
                if d_bias is not None:
                    d_bias += grad.sum(0)
                grad = _copy_padded(grad, dtype, 1, num_rows)
                if d_hidden is not None:
                    d_hidden[rows] = grad @ w
                if d_weight is not None:
                    _add_product(d_weight, grad.T[: len(weight)], h)
        ctx.save_for_backward(*(None if d is None else d for d in (d_hidden, d_weight, d_bias)))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if d is None else d.mul(grad).to(t) for d, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None


def _padded_vocabulary(weight: Tensor, dtype: torch.dtype) -> int:
    """Return the number of rows, at least V, that the copy of the weight in the precision of the products has.

    A GPU multiplies matrices fast where their rows begin at multiples of 16 bytes, which 50,257 or 30,522 logits in
    bf16 do not. The weight is copied in any case, so the rows of zeros cost one small kernel. Without a copy (fp32)
    nothing is padded: copying GPT-2's weight moves 309 MB, 74 us on an H200, which a few hundred tokens do not earn.
    """
    if weight.device.type != "cuda" or weight.dtype == dtype:
        return len(weight)
    return -(-len(weight) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _copy_padded(x: Tensor, dtype: torch.dtype, dim: int, size: int) -> Tensor:
    """Return x in `dtype`, with zeros behind it so that dimension `dim` has `size` elements."""
    missing = size - x.shape[dim]
    if not missing:
        return x.to(dtype)
    out = x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]), dtype=dtype)
    out.narrow(dim, 0, x.shape[dim]).copy_(x)
    out.narrow(dim, x.shape[dim], missing).zero_()
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in the precision of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunk_bytes(device: torch.device) -> int:
    """Return the bytes of fp32 logits at a time: on a GPU 1/128 of its memory, within limits."""
    if device.type != "cuda":
        return CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return int(min(max(CHUNK_BYTES, memory // 128), LARGEST_CHUNK_BYTES))
