"""Relative positions (Raffel et al. 2020, 2.1): a learnt bias on the attention scores for each head and distance."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from models.ops.attention import Bias, pad_bias
from models.ops.layers import product_dtype
from models.ops.packing import Packing, Padded, aligned, to_device


class RelativeBias(nn.Module):
    """An embedding with a row for each bucket of distances and a column for each head.

    causal: a token attends to no later token, as in a decoder.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.buckets = num_buckets if causal else num_buckets // 2  # for each sign of the distance
        self.max_distance = max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, queries: Tensor, num_keys: int) -> Tensor:
        """Return (..., H, L, S). queries: (..., L) positions; the keys are at 0 ... num_keys - 1.

        Keys before the query take the first half of the buckets, keys after it the second. In a decoder, keys before
        the query take all buckets, and keys after it get -inf.
        """
        distance = torch.arange(num_keys, device=queries.device) - queries.unsqueeze(-1)  # (..., L, S)
        table = bucket_of_distance(self.buckets, self.max_distance, queries.device)
        bucket = table[distance.abs().clamp(max=self.max_distance)]
        if self.causal:
            bias: Tensor = self.embedding(bucket).movedim(-1, -3)
            return bias.masked_fill((distance > 0).unsqueeze(-3), float("-inf"))
        bias = self.embedding(bucket + self.buckets * (distance > 0)).movedim(-1, -3)
        return bias

    def for_packing(self, packing: Packing) -> Bias:
        """Return the bias of self-attention for all layers of a stack: by length on a CPU, elsewhere `padded`.

        The bias is computed once, for the longest sequence, and before the first layer: checkpoint_activations computes
        a layer twice. Without a sequence the bias is still in the graph.
        """
        device = self.embedding.weight.device
        if isinstance(packing, Padded):
            of_all: Tensor = self(torch.arange(packing.max_length, device=device), packing.max_length)
            return of_all
        if device.type != "cpu":
            return self.padded(packing)
        longest = max(packing.max_length, 1)
        bias: Tensor = self(torch.arange(longest, device=device), longest)
        biases = {n: bias[:, :n, :n] for n in {*packing.lengths} or {1}}
        return lambda length, keys: biases[length]

    def padded(self, packing: Packing) -> Tensor:
        """Return the bias of all sequences, padded to the longest, as padded_attention takes it (pad_bias)."""
        weight, longest = self.embedding.weight, max(packing.max_length, 1)
        bias: Tensor = self(torch.arange(longest, device=weight.device), aligned(longest))
        padding = None if self.causal or packing.is_uniform else packing
        return pad_bias(bias, longest, padding, product_dtype(weight))

    def for_positions(self, queries: Tensor, num_keys: int) -> Bias:
        """Return the bias, (B, H, L, S), of new tokens at `queries`, (B, L)."""
        bias: Tensor = self(queries, num_keys)
        return bias


@functools.lru_cache(maxsize=16)
def bucket_of_distance(buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Return (max_distance + 1,) int64, the bucket of each distance.

    Half of the buckets have one distance each; the others grow logarithmically. The borders are computed in fp32, as in
    the published code. They are always computed on the CPU: the last bit of a logarithm may differ between devices.
    """
    exact = buckets // 2
    distance = torch.arange(max_distance + 1, device="cpu")
    share = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).long()
    return to_device(torch.where(distance < exact, distance, far.clamp(max=buckets - 1)), device)
