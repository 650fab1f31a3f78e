"""Metrics of a causal language model, from sums of losses, right tokens, tokens and bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX


def language_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor, num_bytes: int) -> Tensor:
    """Return [sum of losses, right tokens, tokens, bytes of their text], (4,) fp64.

    logits: (targets, V), of the tokens that have a target. labels: (T,), IGNORE_INDEX where there is no target.
    """
    targets = labels[labels != IGNORE_INDEX]
    hits = (logits.argmax(-1) == targets).sum()
    sums = torch.tensor([0.0, 0.0, len(targets), num_bytes], dtype=torch.float64, device=logits.device)
    sums[0], sums[1] = loss_sum, hits
    return sums


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
