"""Attention over packed sequences with dropout on its weights, on a CPU, which has no kernel for that.

Composed of plain calls, one run of equal lengths after another, attention spends most of its time on short sentences in
the calls themselves and in what autograd does for each. Here a layer is one node of the graph: rows are put in order
for all runs at once, and the weights of all runs lie in one tensor, dropped by one draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from models.dropout import dropped_places, scaled_but_zero_at

Runs = tuple[
    tuple[int, int, int], ...
]  # (count, query length L, key length S) of neighbouring sequences that are alike


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
    """dropout(softmax(q k^T * scale + bias), rate) v inside each sequence, as layers.packed_attention says it.

    query: (T, H, K); key, value: (S, H, K); all in one floating-point type. biases: (H, L, S) for each run, or none at
    all. 0 < rate < 1; the draws are from torch's default generator. Returns (T, H, K).
    """
    return _DroppedAttention.apply(query, key, value, runs, causal, scale, rate, *biases)


class _DroppedAttention(torch.autograd.Function):
    """With P the softmax and M / (1 - rate) what dropout multiplies it by:

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
        q = _by_run(query, runs, 1).mul_(scale)
        k, v = _by_run(key, runs, 2), _by_run(value, runs, 2)
        weights = q.new_empty(sum(heads * count * length * source for count, length, source in runs))
        hidden = _hidden(max(length for _, length, _ in runs), q.dtype) if causal else None
        qs, ks, vs = _cut(q, runs, heads, 1), _cut(k, runs, heads, 2), _cut(v, runs, heads, 2)
        ps = _cut_weights(weights, runs, heads)
        for i, (count, length, source) in enumerate(runs):
            scores = torch.bmm(qs[i], ks[i].transpose(1, 2))  # (count H, L, S)
            if biases:
                scores.view(count, heads, length, source).add_(biases[i])
            if hidden is not None:
                scores.add_(hidden[:length, :source])
            torch.softmax(scores, -1, out=ps[i])
        places = dropped_places(len(weights), rate)
        dropped = _cut_weights(scaled_but_zero_at(weights, places, 1 / (1 - rate)), runs, heads)
        out = torch.empty_like(q)
        for p, v_run, o in zip(dropped, vs, _cut(out, runs, heads, 1), strict=True):
            torch.bmm(p, v_run, out=o)
        ctx.save_for_backward(q, k, v, weights, places)
        ctx.runs, ctx.heads, ctx.scale, ctx.rate, ctx.biased = runs, heads, scale, rate, len(biases)
        return _by_token(out, runs, heads, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, places = ctx.saved_tensors
        runs, heads = ctx.runs, ctx.heads
        dropped = scaled_but_zero_at(weights, places, 1 / (1 - ctx.rate))
        d_out, d_q, d_k, d_v = _by_run(grad, runs, 1), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_weights = torch.empty_like(weights)
        d_outs, qs, d_qs = (_cut(x, runs, heads, 1) for x in (d_out, q, d_q))
        ks, vs, d_ks, d_vs = (_cut(x, runs, heads, 2) for x in (k, v, d_k, d_v))
        ps, drops, d_ps = (_cut_weights(x, runs, heads) for x in (weights, dropped, d_weights))
        for i in range(len(runs)):
            torch.bmm(d_outs[i], vs[i].transpose(1, 2), out=d_ps[i])
            torch.bmm(drops[i].transpose(1, 2), d_outs[i], out=d_vs[i])
        d_weights.mul_(dropped)  # P dP
        d_biases: list[Tensor | None] = []
        for i, (count, length, source) in enumerate(runs):
            d_scores = d_ps[i].addcmul_(ps[i], d_ps[i].sum(-1, keepdim=True), value=-1)
            torch.bmm(d_scores, ks[i], out=d_qs[i])
            torch.bmm(d_scores.transpose(1, 2), qs[i], out=d_ks[i])
            if ctx.biased:
                d_biases.append(d_scores.view(count, heads, length, source).sum(0))
        d_q.mul_(ctx.scale)
        tokens = (_by_token(d_q, runs, heads, 1), _by_token(d_k, runs, heads, 2), _by_token(d_v, runs, heads, 2))
        return *tokens, None, None, None, None, *d_biases


@lru_cache(maxsize=8)  # the layers of a model ask one after another, of a decoder for three kinds
def _rows(runs: Runs, heads: int, side: int) -> tuple[Tensor, Tensor]:
    """How the (T H) rows of all tokens' heads lie run by run, there sequence by sequence, head by head; and back.

    side: 1 of the queries, 2 of the keys.
    """
    total = sum(run[0] * run[side] for run in runs)
    rows = torch.arange(total * heads, device="cpu").view(total, heads)
    parts = rows.split([run[0] * run[side] for run in runs])
    there = torch.cat(
        [part.view(run[0], run[side], heads).transpose(1, 2).flatten() for part, run in zip(parts, runs, strict=True)]
    )
    return there, there.argsort()


def _by_run(x: Tensor, runs: Runs, side: int) -> Tensor:
    """(T, H, K) -> (T H, K) in the order of _rows."""
    return x.reshape(-1, x.shape[-1]).index_select(0, _rows(runs, x.shape[1], side)[0])


def _by_token(x: Tensor, runs: Runs, heads: int, side: int) -> Tensor:
    """_by_run the other way round."""
    return x.index_select(0, _rows(runs, heads, side)[1]).view(-1, heads, x.shape[-1])


def _cut(x: Tensor, runs: Runs, heads: int, side: int) -> list[Tensor]:
    """(T H, K) -> a view (count H, L, K) of each run."""
    parts = x.split([heads * run[0] * run[side] for run in runs])
    return [part.view(heads * run[0], run[side], -1) for part, run in zip(parts, runs, strict=True)]


def _cut_weights(x: Tensor, runs: Runs, heads: int) -> list[Tensor]:
    """All weights -> a view (count H, L, S) of each run."""
    parts = x.split([heads * count * length * source for count, length, source in runs])
    return [part.view(heads * count, length, source) for part, (count, length, source) in zip(parts, runs, strict=True)]


@lru_cache(maxsize=2)
def _hidden(length: int, dtype: torch.dtype) -> Tensor:
    """(length, length): -inf above the diagonal, else 0."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device="cpu").triu_(1)
