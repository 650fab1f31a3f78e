"""Metrics of sentence embeddings: each anchor looks for its positive among all texts of the data set.

So they depend on the data set, but not on batches or ranks. The statistics keep every vector: a row for each sequence,
which one batch of one rank fills.

Candidates are the distinct positives and negatives. Right ones are the positives of all rows with the anchor's text;
the anchor's own text is no candidate. The rank of an anchor is that of its best right candidate, behind all wrong ones
that are as similar.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data import Batch
from models.ops.packing import to_device

MAX_VALUES = 16_000_000  # numbers of all vectors that are kept, 128 MB; of more, every second, third, ... example is
ROUNDING = 1e-9  # of similarities that are equal, relative
MAX_RANK = 10  # of mrr@10 and accuracy@10
ANCHOR, POSITIVE, NEGATIVE = 1.0, 2.0, 3.0  # the first number of a row: which sequence of its example it is
HEADER = 2  # the number of examples, and the same times the width of a row, from which the width is found
COLUMNS = 3  # before the vector: ANCHOR, ..., and the two numbers of the text
CHUNK = 512  # anchors whose similarities are in memory at once


def pool_statistics(vectors: Tensor, batch: Batch, sequences: np.ndarray, scale: float) -> Tensor:
    """Return [header, a row (kind, two numbers of the text, vector) for each sequence of the data set], flat, fp64.

    vectors: (B, D), whose dot product is the similarity. sequences: (N + 1,), where those of each example begin.
    scale: the factor of the loss, here that of the anchors' vectors. Rows of other batches are 0.
    """
    labels = batch.required_labels
    width, count = vectors.shape[1] + COLUMNS, len(sequences) - 1
    step = max(1, -(-int(sequences[-1]) * width // MAX_VALUES))
    kept = np.arange(0, count, step)
    sizes = np.diff(sequences)
    starts = np.zeros(count, dtype=np.int64)
    starts[kept] = np.cumsum(sizes[kept]) - sizes[kept]
    chosen, places, kinds, first = list[int](), list[int](), list[float](), 0
    for index in batch.indices:
        size = int(sizes[index])
        if index % step == 0:
            chosen += range(first, first + size)
            places += range(int(starts[index]), int(starts[index]) + size)
            kinds += [ANCHOR, POSITIVE, *[NEGATIVE] * (size - 2)]
        first += size
    device = vectors.device
    rows = torch.zeros(int(sizes[kept].sum()), width, dtype=torch.float64, device=device)
    picked, target = (to_device(torch.tensor(values, dtype=torch.int64), device) for values in (chosen, places))
    kind = to_device(torch.tensor(kinds, dtype=torch.float64), device)
    own = vectors.double()[picked] * torch.where(kind == ANCHOR, scale, 1.0)[:, None]
    rows.index_copy_(0, target, torch.cat([kind[:, None], labels[picked, 1:].double(), own], 1))
    header = torch.tensor([len(batch.indices), len(batch.indices) * width], dtype=torch.float64)
    return torch.cat([to_device(header, device), rows.flatten()])


def pool_metrics(statistics: Tensor) -> dict[str, float]:
    """Return the metrics, from summed statistics.

    loss: as in training, with all other candidates as negatives. candidates: their number.
    """
    values = statistics.cpu().numpy()
    width = round(values[1] / values[0]) if values[0] else COLUMNS
    rows = values[HEADER:].reshape(-1, width)
    kinds, texts, vectors = rows[:, 0], rows[:, 1:COLUMNS], rows[:, COLUMNS:]
    anchors = np.flatnonzero(kinds == ANCHOR)
    if not len(anchors):
        return dict.fromkeys(("mrr@10", "accuracy@1", "accuracy@10", "loss", "candidates"), math.nan)
    _, number = np.unique(texts, axis=0, return_inverse=True)
    number = number.ravel()  # of the text of each row
    first = np.full(number.max() + 1, -1)  # the candidate with each text; -1: none has it
    candidates = np.flatnonzero(kinds != ANCHOR)
    distinct, at = np.unique(number[candidates], return_index=True)
    first[distinct] = np.arange(len(distinct))
    pool = torch.from_numpy(vectors[candidates[at]])
    right: dict[int, set[int]] = {}  # {text of an anchor: its right candidates}
    for anchor in anchors.tolist():
        right.setdefault(int(number[anchor]), set()).add(int(first[number[anchor + 1]]))
    ranks, losses = list[Tensor](), list[Tensor]()
    for begin in range(0, len(anchors), CHUNK):
        part = anchors[begin : begin + CHUNK]
        similarities = torch.from_numpy(vectors[part]) @ pool.T
        is_right = torch.zeros(similarities.shape, dtype=torch.bool)
        for i, text in enumerate(number[part].tolist()):
            is_right[i, sorted(right[text])] = True
            own = int(first[text])
            if own >= 0 and own not in right[text]:
                similarities[i, own] = -math.inf
        target = torch.from_numpy(first[number[part + 1]])[:, None]
        positive = similarities.gather(1, target)
        wrong = similarities.masked_fill(is_right, -math.inf)
        best = similarities.masked_fill(~is_right, -math.inf).amax(1, keepdim=True)
        ranks.append(1 + (wrong >= best - ROUNDING * best.abs()).sum(1) + similarities.isnan().any(1) * len(pool))
        losses.append(torch.logaddexp(positive, wrong.logsumexp(1, keepdim=True))[:, 0] - positive[:, 0])
    rank = torch.cat(ranks).double()
    return {
        "mrr@10": float((1 / rank).where(rank <= MAX_RANK, 0.0).mean()),
        "accuracy@1": float((rank <= 1).double().mean()),
        "accuracy@10": float((rank <= MAX_RANK).double().mean()),
        "loss": float(torch.cat(losses).mean()),
        "candidates": float(len(pool)),
    }
