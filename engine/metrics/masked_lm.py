"""Metrics of a masked language model, from sums of losses, right tokens and masked tokens."""

from __future__ import annotations

from torch import Tensor

from engine.metrics.causal_lm import language_statistics


def masked_statistics(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return [sum of losses, right tokens, masked tokens], (3,) fp64; arguments as for language_statistics."""
    return language_statistics(loss_sum, logits, labels, 0)[:3]


def masked_metrics(statistics: Tensor) -> dict[str, float]:
    """Return perplexity, exp(loss), accuracy and loss (nats per token), all of the masked tokens alone.

    They depend on the tokenizer, and on the share of tokens that is masked.
    """
    loss_sum, hits, tokens = statistics.cpu()
    loss = loss_sum / tokens
    return {"perplexity": loss.exp().item(), "accuracy": (hits / tokens).item(), "loss": loss.item()}
