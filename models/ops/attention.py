"""Attention over packed sequences, and the self-attention module of the encoders.

packed_attention chooses one of three equal computations:
- on a CPU with dropout, one node of the autograd graph (dropped_attention.py);
- on a GPU with sequences of several lengths, one call with padding (padded_attention);
- in all other cases, one call for each run of sequences of equal length.
Shapes: models/ops/packing.py; S is the number of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops.dropped_attention import Runs, dropped_attention
from models.ops.packing import Packing, Selection, pad_sequences

Bias = Callable[[int, int], Tensor]  # (query length, key length) -> (H, L, S), added to the scores


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    key_packing: Packing | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T * scale + bias) v inside each sequence (Vaswani et al. 2017, eq. 1), (T, H * K).

    query: (T, H, K).
    key, value: (T, H, K); in cross-attention (S, H, K), with the borders of `key_packing`.
    causal: a token attends to no later token.
    bias: added to the scores of every sequence (T5's relative positions).
    scale: 1 / sqrt(K) unless given.
    dropout: the rate at which attention weights are dropped.
    """
    runs = _attention_runs(packing, key_packing or packing)
    if not runs:
        # All inputs stay in the graph, so that a rank without examples has gradients, which are zero.
        empty = query + key.sum(0) + value.sum(0)
        return (empty if bias is None else empty + bias(1, 1).sum()).flatten(1)
    full_precision_on_cpu = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    if 0 < dropout < 1 and full_precision_on_cpu and not torch.compiler.is_compiling():
        biases = [] if bias is None else [bias(length, key_length) for _, length, key_length in runs]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return dropped_attention(query, key, value, runs, biases, causal, scale, dropout).flatten(1)
    if len(runs) > 1 and query.device.type != "cpu":
        return padded_attention(query, key, value, packing, key_packing or packing, causal, bias, scale, dropout)
    outputs = []
    tokens, keys = [count * length for count, length, _ in runs], [count * key_length for count, _, key_length in runs]
    # Split once: the backward of a slice would write a whole tensor of zeros for each run.
    pieces = zip(torch.split(query, tokens), torch.split(key, keys), torch.split(value, keys), strict=True)
    for (count, _, _), qkv in zip(runs, pieces, strict=True):
        q, k, v = (torch.unflatten(x, 0, (count, -1)).transpose(1, 2) for x in qkv)  # (B, H, L, K)
        mask = None if bias is None else _with_causal_mask(bias(q.shape[2], k.shape[2]), causal)
        is_causal = causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    key_packing: Packing,
    causal: bool,
    bias: Bias | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Return the result of packed_attention, computed in one call with all sequences padded to the longest.

    It is for a GPU, where many small calls cost more than the padding. No other operation of a model pads. The padding
    of a sequence comes after all of its tokens, so a causal mask hides it.
    """
    q = pad_sequences(query, packing, 0.0).transpose(1, 2)
    k, v = (pad_sequences(x, key_packing, 0.0).transpose(1, 2) for x in (key, value))
    mask = None if bias is None else _with_causal_mask(bias(q.shape[2], k.shape[2]), causal)  # (H, L, S)
    if not causal:
        ends = key_packing.cu_seqlens.diff()[:, None, None, None]
        real = torch.arange(k.shape[2], device=k.device) < ends  # (B, 1, 1, S)
        mask = real if mask is None else mask.masked_fill(~real, float("-inf"))
    is_causal = causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2)[packing.rows, packing.positions].flatten(1)


def _with_causal_mask(bias: Tensor, causal: bool) -> Tensor:
    """Return the bias, (H, L, S), with -inf above the diagonal if `causal`."""
    return bias.masked_fill(~torch.ones_like(bias, dtype=torch.bool).tril(), float("-inf")) if causal else bias


def _attention_runs(queries: Packing, keys: Packing) -> Runs:
    """Return (count, query length, key length) of each run of neighbouring sequences that agree in both lengths."""
    pairs = groupby(zip(queries.lengths, keys.lengths, strict=True))
    return tuple((len(list(same)), length, key_length) for (length, key_length), same in pairs)


class SelfAttention(nn.Module):
    """Multi-head self-attention. `bias`: whether the query, key and value projections have one."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, packing: Packing, selection: Selection | None = None) -> Tensor:
        """(T, D) -> (T, D), or with a selection (R, D): the selected tokens attend to all tokens."""
        by_sequence = selection is not None and bool(selection.lengths)
        queries, query_packing = (selection.take(x), selection) if selection and by_sequence else (x, packing)
        projections = ((self.query, queries), (self.key, x), (self.value, x))
        q, k, v = (projection(read).unflatten(-1, (self.num_heads, -1)) for projection, read in projections)
        dropout = self.dropout if self.training else 0.0
        attended = packed_attention(q, k, v, query_packing, key_packing=packing, dropout=dropout)
        if selection is not None and not by_sequence:
            attended = selection.take(attended)
        out: Tensor = self.output(attended)
        return out
