"""Attention within a window (Beltagy et al. 2020, "Longformer"), over packed sequences.

A token attends to the tokens of its sequence that are at most `window` places before or behind it. Each sequence is cut
into blocks of at least `window` tokens, so the keys of a block are in itself and in its two neighbours. All blocks of a
micro-batch are one call, on every device: time and memory grow with the number of tokens, not with its square.

Shapes: models/ops/packing.py, and: N blocks, M tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.attention import Bias, to_packed, to_padded
from models.ops.packing import KEY_ALIGNMENT, Packing, aligned


@dataclass(eq=False)
class Blocks:
    """The blocks of a micro-batch, the same for all layers with one window.

    packing: the blocks as sequences.
    mask: (N, 1, M, 3 M) bool, whether a token of a block attends to one of the three blocks around it.
    """

    packing: Packing
    mask: Tensor


def split_into_blocks(packing: Packing, window: int) -> Blocks | None:
    """Return the blocks of all sequences; None where the window hides nothing, since every sequence is shorter."""
    if packing.max_length <= window + 1:
        return None
    size = aligned(max(window, KEY_ALIGNMENT))
    lengths = [min(size, length - start) for length in packing.lengths for start in range(0, length, size)]
    device = packing.cu_seqlens.device
    blocks = Packing.from_lengths(lengths, device)
    return Blocks(blocks, _mask(packing, blocks, window))


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Return softmax(q k^T * scale) v over the tokens of each window, (T, H * K); see packed_attention.

    query, key, value: (T, H, K).
    """
    packing = blocks.packing
    q, k, v = (to_padded(x, packing) for x in (query, key, value))  # (N, M, H, K)
    k, v = _with_neighbours(k), _with_neighbours(v)  # (N, 3 M, H, K)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=blocks.mask, dropout_p=dropout, scale=scale)
    return to_packed(out.transpose(1, 2).flatten(0, 1), packing).flatten(1)


def window_bias(window: int) -> Bias:
    """Return the window as a term of the scores, for an exported graph, whose lengths are not known."""

    def bias(length: int, key_length: int) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(key_length)
        return torch.zeros_like(distance, dtype=torch.float32).masked_fill(distance.abs() > window, float("-inf"))

    return bias


def _with_neighbours(x: Tensor) -> Tensor:
    """(N, M, ...) -> (N, 3 M, ...): each block between the one before and the one behind it, whatever its sequence."""
    outside = torch.zeros_like(x[:1])
    return torch.cat([torch.cat([outside, x[:-1]]), x, torch.cat([x[1:], outside])], 1)


def _mask(packing: Packing, blocks: Packing, window: int) -> Tensor:
    """Return (N, 1, M, 3 M), the mask of Blocks.

    The padding of a block attends to itself, since a softmax over no keys would be NaN; nothing reads the result.
    """
    size, device = blocks.max_length, blocks.cu_seqlens.device
    sequences = packing.rows[blocks.cu_seqlens[:-1].long()]  # (N,), of each block
    places = torch.arange(size, device=device)
    is_token = places < blocks.cu_seqlens.diff()[:, None]  # (N, M)
    # The padding of the mask has no sequence, and neither have the blocks outside of the micro-batch.
    owners = torch.where(is_token, sequences[:, None], -1)  # (N, M)
    outside = torch.full_like(owners[:1], -1)
    owners = torch.cat([torch.cat([outside, owners[:-1]]), owners, torch.cat([owners[1:], outside])], 1)  # (N, 3 M)
    distance = torch.arange(3 * size, device=device) - size - places[:, None]  # (M, 3 M)
    same_sequence = owners[:, None] == sequences[:, None, None]  # (N, 1, 3 M)
    return ((distance.abs() <= window) & same_sequence | (distance == 0)).unsqueeze(1)
