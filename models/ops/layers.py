"""Building blocks shared by the architectures.

Legend of shapes, used in every comment of this package:

    B  sequences in a micro-batch          D  hidden_size
    T  tokens in a micro-batch             H  attention heads
    L  length of one sequence              K  D // H, the width of one head

Text is *packed*: the sequences of a micro-batch lie one after another in a flat (T,) tensor, T = sum of the lengths.
No pad token exists, so none is computed, and none can leak into a result. Only attention and pooling need to know where
a sequence begins; `Packing` tells them. The patches of an image are a sequence like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.ops.dropped_attention import Runs, dropped_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed micro-batch begin and end.

    lengths: the length of each sequence, on the host, so that no kernel launch waits for the device.
    cu_seqlens: (B + 1,) int32, cumulative lengths from 0 to T, on the model's device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Packing:
        cu_seqlens = F.pad(torch.tensor(list(lengths), dtype=torch.int64).cumsum(0), (1, 0)).to(torch.int32)
        return cls(tuple(lengths), cu_seqlens.to(device))

    @cached_property
    def rows(self) -> Tensor:
        """(T,) the sequence that each token is in, counted from 0."""
        sequences = torch.arange(len(self.lengths), device=self.cu_seqlens.device)
        return torch.repeat_interleave(sequences, self.cu_seqlens.diff().long(), output_size=sum(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """(T,) the place of each token within its own sequence, counted from 0."""
        total = sum(self.lengths)
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        of_token = torch.repeat_interleave(starts, lengths, output_size=total)
        return torch.arange(total, device=starts.device) - of_token

    @cached_property
    def runs(self) -> list[tuple[slice, int, int]]:
        """(tokens, count, length) for each run of neighbouring sequences of equal length.

        The loader sorts a micro-batch by length, so runs are long; a run is a (count, length, ...) view, no copy.
        """
        runs: list[tuple[slice, int, int]] = []
        start = first = 0
        for i, length in enumerate(self.lengths):
            if i + 1 == len(self.lengths) or self.lengths[i + 1] != length:
                count = i + 1 - first
                runs.append((slice(start, start + count * length), count, length))
                start, first = start + count * length, i + 1
        return runs


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    key_packing: Packing | None = None,
    causal: bool = False,
    bias: Callable[[int, int], Tensor] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale + bias) v inside each sequence (Vaswani et al. 2017, eq. 1).

    query: (T, H, K); key, value: (T, H, K), or (S, H, K) in cross-attention, where `key_packing` cuts them. causal: a
    token sees none after it. bias(query length, key length): (H, L, S), added to the scores of every sequence (T5's
    relative positions). scale: 1 / sqrt(K) unless given. `dropout` applies to the attention weights.
    Returns (T, H * K).
    """
    runs = _attention_runs(packing, key_packing or packing)
    if not runs:
        # All of it stays in the graph, so that a rank without examples has gradients: zeros.
        nothing = query + key.sum(0) + value.sum(0)
        return (nothing if bias is None else nothing + bias(1, 1).sum()).flatten(1)
    in_full = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    if 0 < dropout < 1 and in_full and not torch.compiler.is_compiling():
        biases = [] if bias is None else [bias(length, source) for _, length, source in runs]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return dropped_attention(query, key, value, runs, biases, causal, scale, dropout).flatten(1)
    if len(runs) > 1 and query.device.type != "cpu":
        return padded_attention(query, key, value, packing, key_packing or packing, causal, bias, scale, dropout)
    outputs = []
    tokens, keys = [count * length for count, length, _ in runs], [count * source for count, _, source in runs]
    # Split once: a slice's backward would write a whole tensor of zeros for each run.
    for run, *qkv in zip(runs, query.split(tokens), key.split(keys), value.split(keys), strict=True):
        q, k, v = (x.unflatten(0, (run[0], -1)).transpose(1, 2) for x in qkv)  # (B, H, L, K)
        mask = None
        if bias is not None:
            mask = bias(q.shape[2], k.shape[2])
            if causal:
                mask = mask.masked_fill(~torch.ones_like(mask, dtype=torch.bool).tril(), float("-inf"))
        hides = causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=hides, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    key_packing: Packing,
    causal: bool,
    bias: Callable[[int, int], Tensor] | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """packed_attention in one call, all sequences padded to the longest: for a GPU, where many calls cost more.

    Only this is padded. What is behind the end of a sequence comes after all of its tokens, so a causal mask hides it.
    """
    q, k, v = (
        padded(x, cut, 0.0).transpose(1, 2) for x, cut in ((query, packing), (key, key_packing), (value, key_packing))
    )
    mask = None if bias is None else bias(q.shape[2], k.shape[2])  # (H, L, S)
    if causal and mask is not None:
        mask = mask.masked_fill(~torch.ones_like(mask, dtype=torch.bool).tril(), float("-inf"))
    elif not causal:
        ends = key_packing.cu_seqlens.diff()[:, None, None, None]
        there = torch.arange(k.shape[2], device=k.device) < ends  # (B, 1, 1, S)
        mask = there if mask is None else mask.masked_fill(~there, float("-inf"))
    hides = causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=hides, scale=scale)
    return out.transpose(1, 2)[packing.rows, packing.positions].flatten(1)


def padded(x: Tensor, packing: Packing, fill: float) -> Tensor:
    """(T, ...) -> (B, L, ...), L the longest sequence, with `fill` behind each sequence's end."""
    out = x.new_full((len(packing.lengths), max(packing.lengths, default=0), *x.shape[1:]), fill)
    return out.index_put((packing.rows, packing.positions), x)


def _attention_runs(queries: Packing, keys: Packing) -> Runs:
    """(count, query length, key length) of runs of neighbouring sequences that are alike in both lengths."""
    pairs = groupby(zip(queries.lengths, keys.lengths, strict=True))
    return tuple((len(list(same)), length, source) for (length, source), same in pairs)


def drop_path(x: Tensor, packing: Packing, rate: float) -> Tensor:
    """Zero the branch `x`, (T, D), for a random share of the sequences, others scaled up (Huang et al. 2016)."""
    if not rate:
        return x
    kept = torch.empty(len(packing.lengths), device=x.device, dtype=x.dtype).bernoulli_(1 - rate) / (1 - rate)
    return x * torch.repeat_interleave(kept, packing.cu_seqlens.diff(), output_size=len(x)).unsqueeze(1)


def checkpoint_activations(model: Any) -> None:
    """Keep of each layer of a TaskModel only its input, and run it again in the backward (Chen et al. 2016).

    For about a third more work the memory of a step no longer grows with what is inside the layers. The second run
    draws the same dropout, so the gradients are the same. Names of parameters and checkpoints stay as they are.
    """
    for layer in model.backbone.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class DropoutRates(NamedTuple):
    """The sites where a backbone drops, as every architecture's Config has them under `rates`."""

    embedding: float = 0.0
    attention: float = 0.0  # the attention weights
    hidden: float = 0.0  # each branch before it joins the residual
    drop_path: float = 0.0  # whole branches of a sequence, rising linearly to this rate in the last layer

    def path_of(self, layer: int, num_layers: int) -> float:
        """The drop-path rate of one layer: 0 in the first, `drop_path` in the last."""
        return self.drop_path * layer / max(1, num_layers - 1)


NO_DROPOUT = DropoutRates()


def mean_pool(hidden: Tensor, packing: Packing, skip: int = 0) -> Tensor:
    """(T, D) -> (B, D): the mean of each sequence's token vectors but the first `skip`."""
    means = [hidden[tokens].unflatten(0, (count, length))[:, skip:].mean(1) for tokens, count, length in packing.runs]
    return torch.cat(means) if means else hidden[:0]


def first_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """(T, D) -> (B, D): each sequence's first token ([CLS])."""
    return hidden[packing.cu_seqlens[:-1].long()]


def last_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """(T, D) -> (B, D): each sequence's last token, the only one that has seen all of a causal model's text."""
    return hidden[packing.cu_seqlens[1:].long() - 1]


POOLINGS: dict[str, Callable[[Tensor, Packing], Tensor]] = {"cls": first_pool, "mean": mean_pool, "last": last_pool}


class SelfAttention(nn.Module):
    """Multi-head self-attention; `bias` is that of the query, key and value projections."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.query, self.key, self.value))
        return self.output(packed_attention(q, k, v, packing, dropout=self.dropout if self.training else 0.0))


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
