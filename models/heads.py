"""Task heads: features of a packed micro-batch -> logits and the *sum* of the losses of its targets.

A head never averages. The loop divides by the number of targets of the whole optimizer step, over all micro-batches and
ranks, so that the way a step is cut cannot change the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import POOLINGS, Packing

IGNORE = -100  # a label without a target; torch's own default


class SequenceClassification(nn.Module):
    """One label for a sequence: pool -> [BERT's pooler: dense, tanh] -> dropout -> linear -> cross entropy.

    pooling "cls" reads the first token through the dense + tanh pooler, as the published BERT classifiers do;
    "mean" averages the token vectors and has no pooler, so that no parameter is left unused.
    """

    def __init__(self, hidden_size: int, num_labels: int, pooling: str, dropout: float, label_smoothing: float = 0.0):
        super().__init__()
        self.pooling = pooling
        self.label_smoothing = label_smoothing
        self.pooler = nn.Linear(hidden_size, hidden_size) if pooling == "cls" else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden: Tensor, packing: Packing, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden: (T, D); labels: (B,), IGNORE where there is no target, or None when predicting.

        Returns logits (B, num_labels) and the sum of the losses, a scalar in fp32 or wider (0 without targets).
        Label smoothing (Szegedy et al. 2016) is part of the training objective only; evaluation is without it.
        """
        pooled = POOLINGS[self.pooling](hidden, packing)
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pooled))
        logits = self.classifier(self.dropout(pooled))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if labels is None:
            return logits, wide.new_zeros(())
        smoothing = self.label_smoothing if self.training else 0.0
        loss_sum = F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
        return logits, loss_sum
