"""What keeps a fine-tuned model from overfitting, each a function called from the loop."""

from __future__ import annotations

import numpy as np
import torch

from engine.config import Regularize


@torch.no_grad()
def add_penalties_(optimizer: torch.optim.Optimizer, regularize: Regularize) -> None:
    """Add the gradient of l1 * sum |w| + l2 / 2 * sum w^2 to the gradients, once per optimizer step.

    It acts on the matrices and embeddings of every parameter group, not on biases and norms (one dimension); after
    unscaling and after the ranks have summed their gradients, so it counts once however the step was cut.
    """
    if not (regularize.l1 or regularize.l2):
        return
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p for p in trained if p.ndim >= 2 and p.grad is not None]
    gradients = [p.grad for p in weights]
    torch._foreach_add_(gradients, weights, alpha=regularize.l2)
    torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=regularize.l1)


def seed_dropout(seed: int, position: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Make the dropout of one micro-batch a pure function of these four numbers: no state to save, no ranks alike.

    Only the generator of `device` is seeded: torch.manual_seed goes through all devices, much slower than this.
    """
    entropy = np.random.SeedSequence([seed, position, micro_batch, rank])
    generators = torch.cuda.default_generators if device.type == "cuda" else [torch.default_generator]
    generators[device.index or 0].manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
