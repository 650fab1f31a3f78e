"""Building blocks shared by the architectures.

Legend of shapes, used in every comment of this package:

    B  sequences in a micro-batch          D  hidden_size
    T  tokens in a micro-batch             H  attention heads
    L  length of one sequence              K  D // H, the width of one head

Text is *packed*: the sequences of a micro-batch lie one after another in a flat (T,) tensor, T = sum of the lengths.
No pad token exists, so none is computed, and none can leak into a result. Only attention and pooling need to know where
a sequence begins; `Packing` tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(K)) v inside each sequence (Vaswani et al. 2017, eq. 1).

    query, key, value: (T, H, K). Returns (T, H * K). `dropout` applies to the attention weights.
    """
    outputs = []
    for tokens, count, length in packing.runs:
        q, k, v = (x[tokens].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))  # (B, H, L, K)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        outputs.append(out.transpose(1, 2).reshape(count * length, -1))
    return torch.cat(outputs) if outputs else query.flatten(1)


def mean_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """(T, D) -> (B, D): the mean of each sequence's token vectors."""
    means = [hidden[tokens].unflatten(0, (count, length)).mean(1) for tokens, count, length in packing.runs]
    return torch.cat(means) if means else hidden[:0]


def first_pool(hidden: Tensor, packing: Packing) -> Tensor:
    """(T, D) -> (B, D): each sequence's first token ([CLS])."""
    return hidden[packing.cu_seqlens[:-1].long()]


POOLINGS: dict[str, Callable[[Tensor, Packing], Tensor]] = {"cls": first_pool, "mean": mean_pool}


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases on all four projections."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.query, self.key, self.value))
        return self.output(packed_attention(q, k, v, packing, self.dropout if self.training else 0.0))


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
