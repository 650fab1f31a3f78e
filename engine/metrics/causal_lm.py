"""Metrics of a causal language model, from sums of losses, right tokens, tokens and bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.losses import find_supervised_positions
from models.ops.packing import to_device


def language_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor, num_bytes: int) -> Tensor:
    """Return [sum of losses, right tokens, tokens, bytes of their text], (4,) fp64.

    logits: (targets, V), of the tokens that have a target. labels: (T,), IGNORE_INDEX where there is no target.
    """
    positions = find_supervised_positions(labels, len(logits))
    targets = labels if positions is None else labels.index_select(0, positions)
    hits = (logits.argmax(-1) == targets).sum()
    counts = to_device(torch.tensor([len(logits), num_bytes], dtype=torch.float64), logits.device)
    return torch.cat([torch.stack([loss_sum.double(), hits.double()]), counts])


def language_metrics(statistics: Tensor) -> dict[str, float]:
    """Return perplexity, bits_per_byte, loss (nats per token) and token_accuracy.

    - Perplexity is exp(loss), infinite on overflow. It depends on the tokenizer, since the loss is a mean over tokens.
    - Bits per byte, (sum of losses / ln 2) / UTF-8 bytes of the text, does not. The end token of a text has no bytes,
      but its loss is in the sum.
    """
    loss_sum, hits, tokens, num_bytes = statistics.cpu()
    loss = loss_sum / tokens
    return {
        "perplexity": loss.exp().item(),
        "bits_per_byte": (loss_sum / math.log(2) / num_bytes).item(),
        "loss": loss.item(),
        "token_accuracy": (hits / tokens).item(),
    }
