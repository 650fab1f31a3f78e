"""The loss of sentence embeddings: each anchor finds its positive among the texts of the whole step.

van den Oord et al. 2018, "Representation learning with contrastive predictive coding" (InfoNCE); Henderson et al. 2017,
"Efficient natural language response suggestion" (in-batch negatives).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.step_loss import Outputs
from models.ops.layers import upcast
from models.ops.packing import to_device


def comparable_vectors(vectors: Tensor, similarity: str) -> Tensor:
    """Return vectors whose dot product is the similarity, in fp32 or wider: for cosine, of length 1."""
    vectors = upcast(vectors)
    return F.normalize(vectors, dim=-1) if similarity == "cosine" else vectors


def in_batch_negatives_loss(outputs: Outputs, similarity: str, scale: float) -> Tensor:
    """Return -log softmax(scale * similarity)[positive] of each anchor, (N,), over the positives and negatives of all.

    outputs: the sequences of each example are its anchor, its positive and its negatives; labels (B, 3) as in
    data/sentence_embedding.py. A candidate is left out where its text is known to fit the anchor: the anchor's own
    text, or a positive of a row with the same anchor.
    """
    vectors = comparable_vectors(outputs.vectors, similarity)
    counts = torch.tensor(outputs.sequences, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    is_negative = torch.ones(int(counts.sum()), dtype=torch.bool)
    is_negative[starts] = is_negative[starts + 1] = False
    order = torch.cat([starts, starts + 1, is_negative.nonzero().squeeze(1)])
    order = to_device(order, vectors.device)  # the one copy of a step that cannot be made ahead: it is of all ranks
    vectors, labels = vectors[order], outputs.labels[order]
    number = len(starts)
    similarities = scale * (vectors[:number] @ vectors[number:].T)  # (N, M), the positive of row i in column i
    is_known = find_known_fits(labels[:, 1] * 2**31 + labels[:, 2], number)
    return F.cross_entropy(
        similarities.masked_fill(is_known, float("-inf")),
        torch.arange(number, device=vectors.device),
        reduction="none",
    )


def find_known_fits(texts: Tensor, number: int) -> Tensor:
    """Return whether each candidate, except an anchor's positive in its own row, is known to fit the anchor, (N, M).

    texts: (N + M,) a number for each text, those of the N anchors first, then of their positives and of all negatives.
    """
    anchors, candidates = texts[:number], texts[number:]
    same_anchor = (anchors[:, None] == anchors).float()
    same_text = (candidates[:number, None] == candidates).float()
    fits = (same_anchor @ same_text > 0) | (anchors[:, None] == candidates)
    return fits.fill_diagonal_(False)
