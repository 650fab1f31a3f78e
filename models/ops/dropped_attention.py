"""Attention over packed sequences with dropout on its weights, for a CPU, which has no kernel for that.

Attention composed of plain calls makes several for each run of equal lengths. On short sentences most of its time goes
into the calls themselves and into autograd. Here the attention of a layer is one node of the graph: rows are reordered
for all runs at once, and the weights of all runs lie in one tensor, which a single dropout covers.

On long texts the time goes into waiting for memory. So a few sequences are processed at a time, and their weights never
leave the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.ops.dropout import sample_dropped_positions, scale_and_zero

BLOCK = 2**19  # weights that are processed together: as many as stay in a core's cache from one product to the next
# (count, query length L, key length S) of neighbouring sequences that agree in both lengths
Runs = tuple[tuple[int, int, int], ...]


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    biases: Sequence[Tensor],
    causal: bool,
    scale: float,
    rate: float,
) -> Tensor:
    """Return dropout(softmax(q k^T * scale + bias), rate) v inside each sequence, (T, H, K); see packed_attention.

    query: (T, H, K). key, value: (S, H, K). All in one floating-point type.
    biases: (H, L, S) for each run, or none at all.
    rate: 0 < rate < 1; the random numbers come from torch's default generator.
    """
    out: Tensor = _DroppedAttention.apply(query, key, value, runs, causal, scale, rate, *biases)
    return out


class _DroppedAttention(torch.autograd.Function):
    """The forward and backward of dropped_attention.

    With P the softmax and M / (1 - rate) the factors of dropout:
    O = (P M / (1 - rate)) V,   dS = P (dP - rowsum(P dP)),   dP = dO V^T M / (1 - rate).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: Runs,
        causal: bool,
        scale: float,
        rate: float,
        *biases: Tensor,
    ) -> Tensor:
        heads = query.shape[1]
        q = _to_run_order(query, runs, 1).mul_(scale)
        k, v = _to_run_order(key, runs, 2), _to_run_order(value, runs, 2)
        out = torch.empty_like(q)
        chunks, blocks = _make_chunks(runs, heads), _make_blocks(runs, heads)
        weights = q.new_empty(blocks[-1].stop)
        positions = sample_dropped_positions(len(weights), rate)
        causal_mask = _causal_mask(max(length for _, length, _ in runs), q.dtype) if causal else None
        qs, ks, vs, outs = (_split(x, chunks, side) for x, side in ((q, 1), (k, 2), (v, 2), (out, 1)))
        for block, block_positions in zip(blocks, _split_positions(blocks, positions), strict=True):
            p = weights[block.start : block.stop]
            for i, p_run in zip(block.chunks, _split_weights(p, chunks, block), strict=True):
                scores = torch.bmm(qs[i], ks[i].transpose(1, 2))  # (count H, L, S)
                length, key_length = scores.shape[1:]
                if biases:
                    scores.view(len(scores) // heads, heads, length, key_length).add_(biases[chunks[i].run])
                if causal_mask is not None:
                    scores.add_(causal_mask[:length, :key_length])
                torch.softmax(scores, -1, out=p_run)
            dropped = scale_and_zero(p, block_positions, 1 / (1 - rate))
            for i, p_run in zip(block.chunks, _split_weights(dropped, chunks, block), strict=True):
                torch.bmm(p_run, vs[i], out=outs[i])
        ctx.save_for_backward(q, k, v, weights, positions)
        ctx.runs, ctx.heads, ctx.scale, ctx.rate, ctx.biased = runs, heads, scale, rate, len(biases)
        return _to_token_order(out, runs, heads, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, positions = ctx.saved_tensors
        runs, heads = ctx.runs, ctx.heads
        d_out, d_q, d_k, d_v = (
            _to_run_order(grad, runs, 1),
            torch.empty_like(q),
            torch.empty_like(k),
            torch.empty_like(v),
        )
        chunks, blocks = _make_chunks(runs, heads), _make_blocks(runs, heads)
        d_outs, qs, d_qs = (_split(x, chunks, 1) for x in (d_out, q, d_q))
        ks, vs, d_ks, d_vs = (_split(x, chunks, 2) for x in (k, v, d_k, d_v))
        d_biases: list[Tensor | None] = [None] * ctx.biased
        for block, block_positions in zip(blocks, _split_positions(blocks, positions), strict=True):
            p = weights[block.start : block.stop]
            dropped = scale_and_zero(p, block_positions, 1 / (1 - ctx.rate))
            d_p = torch.empty_like(p)
            ps, drops, d_ps = (_split_weights(x, chunks, block) for x in (p, dropped, d_p))
            for i, d_p_run, drop in zip(block.chunks, d_ps, drops, strict=True):
                torch.bmm(d_outs[i], vs[i].transpose(1, 2), out=d_p_run)
                torch.bmm(drop.transpose(1, 2), d_outs[i], out=d_vs[i])
            d_p.mul_(dropped)  # P dP
            for i, d_p_run, p_run in zip(block.chunks, d_ps, ps, strict=True):
                d_scores = d_p_run.addcmul_(p_run, d_p_run.sum(-1, keepdim=True), value=-1)
                torch.bmm(d_scores, ks[i], out=d_qs[i])
                torch.bmm(d_scores.transpose(1, 2), qs[i], out=d_ks[i])
                if ctx.biased:
                    d_bias, before = (
                        d_scores.view(len(d_scores) // heads, heads, *d_scores.shape[1:]).sum(0),
                        d_biases[chunks[i].run],
                    )
                    d_biases[chunks[i].run] = d_bias if before is None else before + d_bias
        d_q.mul_(ctx.scale)
        tokens = (
            _to_token_order(d_q, runs, heads, 1),
            _to_token_order(d_k, runs, heads, 2),
            _to_token_order(d_v, runs, heads, 2),
        )
        return *tokens, None, None, None, None, *d_biases


class _Chunk(NamedTuple):
    """Some sequences of one run."""

    run: int  # index of the run
    matrices: int  # sequences times heads
    length: int
    key_length: int


class _Block(NamedTuple):
    """Chunks that are processed together; start, stop: the range of their weights among all."""

    chunks: range  # indices of the chunks
    start: int
    stop: int


@lru_cache(maxsize=8)  # all layers of an encoder use the same entry, those of an encoder-decoder three
def _make_chunks(runs: Runs, heads: int) -> list[_Chunk]:
    """Split each run into chunks of at most BLOCK weights, or of one sequence."""
    chunks = []
    for run, (count, length, key_length) in enumerate(runs):
        max_sequences = max(1, BLOCK // max(1, heads * length * key_length))
        sizes = [min(max_sequences, count - start) for start in range(0, count, max_sequences)]
        chunks += [_Chunk(run, size * heads, length, key_length) for size in sizes]
    return chunks


@lru_cache(maxsize=8)
def _make_blocks(runs: Runs, heads: int) -> list[_Block]:
    """Group neighbouring chunks into blocks of at most BLOCK weights, or of one chunk."""
    blocks: list[_Block] = []
    first = start = stop = 0
    chunks = _make_chunks(runs, heads)
    for i, chunk in enumerate(chunks):
        size = chunk.matrices * chunk.length * chunk.key_length
        if i > first and stop + size - start > BLOCK:
            blocks.append(_Block(range(first, i), start, stop))
            first, start = i, stop
        stop += size
    return [*blocks, _Block(range(first, len(chunks)), start, stop)]


def _split_positions(blocks: Sequence[_Block], positions: Tensor) -> list[Tensor]:
    """Split `positions`, ascending among all weights, into positions within each block."""
    if len(blocks) == 1:
        return [positions]
    borders = torch.searchsorted(positions, torch.tensor([block.stop for block in blocks])).tolist()
    starts = [0, *borders[:-1]]
    return [positions[a:b] - block.start for block, a, b in zip(blocks, starts, borders, strict=True)]


@lru_cache(maxsize=8)
def _run_order(runs: Runs, heads: int, side: int) -> tuple[Tensor, Tensor]:
    """Return the permutation of (T H) rows from token order to run, sequence and head order, and its inverse.

    side: 1 for the queries, 2 for the keys.
    """
    total = sum(run[0] * run[side] for run in runs)
    rows = torch.arange(total * heads, device="cpu").view(total, heads)
    runs_of_rows = zip(torch.split(rows, [run[0] * run[side] for run in runs]), runs, strict=True)
    order = torch.cat([chunk.view(run[0], run[side], heads).transpose(1, 2).flatten() for chunk, run in runs_of_rows])
    return order, order.argsort()


def _to_run_order(x: Tensor, runs: Runs, side: int) -> Tensor:
    """Reorder (T, H, K) to (T H, K), in the order of _run_order."""
    return x.reshape(-1, x.shape[-1]).index_select(0, _run_order(runs, x.shape[1], side)[0])


def _to_token_order(x: Tensor, runs: Runs, heads: int, side: int) -> Tensor:
    """Reorder (T H, K) to (T, H, K): the inverse of _to_run_order."""
    return x.index_select(0, _run_order(runs, heads, side)[1]).view(-1, heads, x.shape[-1])


def _split(x: Tensor, chunks: Sequence[_Chunk], side: int) -> list[Tensor]:
    """Split (T H, K) into a view (count H, L, K) of each chunk; side as in _run_order."""
    lengths = [chunk.length if side == 1 else chunk.key_length for chunk in chunks]
    pieces = torch.split(x, [chunk.matrices * length for chunk, length in zip(chunks, lengths, strict=True)])
    sizes = zip(pieces, chunks, lengths, strict=True)
    return [piece.view(chunk.matrices, length, x.shape[-1]) for piece, chunk, length in sizes]


def _split_weights(x: Tensor, chunks: Sequence[_Chunk], block: _Block) -> list[Tensor]:
    """Split the weights of a block into a view (count H, L, S) of each of its chunks."""
    shapes = [chunks[i][1:] for i in block.chunks]
    pieces = torch.split(x, [math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@lru_cache(maxsize=2)
def _causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Return (length, length): -inf above the diagonal, 0 elsewhere."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device="cpu").triu_(1)
