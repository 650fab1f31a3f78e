"""Disentangled attention (He et al. 2021, "DeBERTa", eq. 4): scores of contents and of relative positions.

The score of query i and key j is the sum of up to three products:
- of the contents, q_i k_j;
- of the query and the position of the key relative to it, q_i pk_b ("c2p");
- of the key and the position of the query relative to it, k_j pq_b ("p2c").
b is the bucket of the distance i - j. pk and pq are projections of an embedding of buckets that all layers share.

Shapes: models/ops/packing.py, and: P the number of buckets.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops.attention import join_heads, to_packed, to_padded
from models.ops.dropout import Dropout
from models.ops.joint_linear import joint_linear
from models.ops.packing import Packing, Padded, to_device


@dataclass(frozen=True)
class Distances:
    """The buckets of the distances i - j: `size` for each sign.

    Up to size / 2, a distance has a bucket of its own if `logarithmic`; longer ones share buckets that grow
    logarithmically up to `longest`. Else every distance below size has its own.
    """

    size: int
    longest: int
    logarithmic: bool


class DisentangledAttention(nn.Module):
    """Multi-head self-attention with relative positions.

    kinds: "c2p", "p2c" or both. shared_keys: whether positions are projected by the key and query of the contents.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        distances: Distances,
        kinds: tuple[str, ...],
        shared_keys: bool,
        dropout: float,
        position_dropout: float,
    ):
        super().__init__()
        self.num_heads, self.distances, self.kinds, self.dropout = num_heads, distances, kinds, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        own_key, own_query = (not shared_keys and kind in kinds for kind in ("c2p", "p2c"))
        self.position_key = nn.Linear(hidden_size, hidden_size) if own_key else None
        self.position_query = nn.Linear(hidden_size, hidden_size) if own_query else None
        self.position_dropout = Dropout(position_dropout)
        # Rounded to fp32, as in the published code.
        scale = torch.tensor(hidden_size // num_heads * (1 + len(kinds)), dtype=torch.float32, device="cpu")
        self.scale = 1 / scale.sqrt().item()

    def forward(self, x: Tensor, packing: Packing, positions: Tensor) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D). positions: (P, D), the embeddings of the buckets."""
        whole = packing.whole
        q, k, v = (self.split_heads(y) for y in joint_linear(x, (self.query, self.key, self.value)))
        index_of = graph_bucket_index if isinstance(whole, Padded) else bucket_index
        index, first, last = index_of(self.distances, whole.max_length, x.device)
        positions = self.position_dropout(positions)[first:last]  # no longer distance occurs
        position_key = position_query = None
        if "c2p" in self.kinds:
            position_key = self.split_heads((self.position_key or self.key)(positions))
        if "p2c" in self.kinds:
            position_query = self.split_heads((self.position_query or self.query)(positions))
        dropout = self.dropout if self.training else 0.0
        attended = disentangled_attention(q, k, v, whole, position_key, position_query, index, self.scale, dropout)
        out: Tensor = self.output(packing.take(attended))
        return out

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H, K)"""
        return torch.unflatten(x, -1, (self.num_heads, -1))


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    position_key: Tensor | None,
    position_query: Tensor | None,
    index: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """Return softmax((q k^T + q pk^T + (k pq^T)^T) * scale) v inside each sequence, (T, H K).

    query, key, value: (T, H, K). position_key, position_query: (P, H, K); None: without this term.
    index: (L, L) int64, the row of the positions for each pair of a query and a key, L the longest sequence.

    On a CPU it is one call for each run of neighbouring sequences of equal length, elsewhere one call with padding.
    """
    if not query.shape[
        0
    ]:  # all inputs stay in the graph, so that a rank without examples has gradients, which are zero
        unused = [x.sum(0) for x in (key, value, position_key, position_query) if x is not None]
        return (query + sum(unused)).flatten(1)
    pk, pq = (None if x is None else x.movedim(0, -1) * scale for x in (position_key, position_query))  # (H, K, P)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, H, L, K) of the same."""
        length = q.shape[2]
        pairs = index[:length, :length]
        for content, position, rows in ((q, pk, pairs), (k, pq, pairs.T)):
            if position is not None:
                scores = (content @ position).gather(-1, rows.expand(*q.shape[:3], length))
                scores = scores if rows is pairs else scores.mT
                mask = scores if mask is None else mask + scores
        mask = mask if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)

    if takes_runs(query, packing):
        sizes = [count * length for _, count, length in packing.runs]
        outputs = []
        pieces = zip(*(torch.split(x, sizes) for x in (query, key, value)), strict=True)
        for (_, count, length), run in zip(packing.runs, pieces, strict=True):
            q, k, v = (torch.unflatten(x, 0, (count, length)).transpose(1, 2) for x in run)
            outputs.append(attend(q, k, v, None).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs)
    q, k, v = (to_padded(x, packing).transpose(1, 2) for x in (query, key, value))
    if isinstance(packing, Padded):
        return join_heads(attend(q, k, v, packing.padding_mask.to(query.dtype)))
    mask = None if packing.is_uniform else packing.padding_mask[..., : packing.max_length].to(query.dtype)
    return to_packed(attend(q, k, v, mask).transpose(1, 2).flatten(0, 1), packing).flatten(1)


def takes_runs(query: Tensor, packing: Packing) -> bool:
    """Return whether each run of equal lengths is computed by itself: on a CPU, where lengths differ."""
    return query.device.type == "cpu" and not packing.is_uniform


@functools.lru_cache(maxsize=8)  # all layers use the same entry
def bucket_index(distances: Distances, length: int, device: torch.device) -> tuple[Tensor, int, int]:
    """Return (index, first, last): the buckets that occur are first ... last - 1, `index` counts from the first.

    index: (length, length) int64, of each pair of a query and a key. The borders are computed in fp32 and on the CPU,
    as in the published code: the last bit of a logarithm may differ between devices.
    """
    with torch.inference_mode(False), torch.no_grad():  # the entry is used in training too
        places = torch.arange(length, device="cpu")
        distance = places[:, None] - places
        if distances.logarithmic:
            distance = _logarithmic(distance, distances)
        index = (distance + distances.size).clamp(0, 2 * distances.size - 1)
        first, last = (int(index.min()), int(index.max()) + 1) if length else (0, 0)
        return to_device((index - first).contiguous(), device), first, last


def graph_bucket_index(distances: Distances, length: int, device: torch.device) -> tuple[Tensor, int, int]:
    """Return bucket_index for a graph, which does not know the length: all buckets, by a table of distances."""
    table, longest = _bucket_table(distances, device)
    places = torch.arange(length, device=device)
    distance = (places[:, None] - places).clamp(-longest, longest)
    return table[distance + longest], 0, 2 * distances.size


@functools.lru_cache(maxsize=8)
def _bucket_table(distances: Distances, device: torch.device) -> tuple[Tensor, int]:
    """Return the bucket of the distances -longest ... longest, and `longest`; longer ones have the same buckets."""
    longest = max(distances.longest, distances.size)
    distance = torch.arange(-longest, longest + 1, device="cpu")
    bucket = _logarithmic(distance, distances) if distances.logarithmic else distance
    return (bucket + distances.size).clamp(0, 2 * distances.size - 1).to(device), longest


def _logarithmic(distance: Tensor, distances: Distances) -> Tensor:
    """Return the bucket of each distance, with its sign."""
    half = distances.size // 2
    share = torch.log(distance.abs().clamp(min=max(1, half - 1)) / half)
    share = share / torch.log(torch.tensor((distances.longest - 1) / half, device="cpu"))
    far = torch.ceil(share * (half - 1)) + half
    return torch.where(distance.abs() <= half, distance, (far * distance.sign()).long())
