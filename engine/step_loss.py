"""The objective of a task whose loss couples all examples of an optimizer step (engine/coupling.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from data import Batch
from models import Output, TaskModel


@dataclass(frozen=True)
class Outputs:
    """Outputs of the model for some examples. sequences: the number of sequences of each example, on the host."""

    vectors: Tensor  # (B, D) fp32 or wider
    labels: Tensor  # (B, ...) int64
    sequences: tuple[int, ...]


StepLoss = Callable[[Outputs], Tensor]  # the losses of the examples of a whole step, (N,); of none, (0,)


class CoupledObjective(nn.Module):
    """A model whose loss is that of a whole step. A micro-batch without `output_gradients` is a step of its own."""

    def __init__(self, model: TaskModel, step_loss: StepLoss):
        super().__init__()
        self.model = model
        self.step_loss = step_loss

    def forward(self, batch: Batch) -> Output:
        """Return the loss of a micro-batch, summed over its examples, and its vectors."""
        vectors = self.model(batch).logits
        if batch.output_gradients is None:
            losses = self.step_loss(outputs_of(vectors, batch))
            return Output(losses.sum() + 0 * vectors.sum(), vectors)
        product = (vectors * batch.output_gradients.to(vectors.device)).sum()
        value = 0.0 if batch.output_loss is None else batch.output_loss.to(vectors.device)
        return Output(product + (value - product.detach()), vectors)


def outputs_of(vectors: Tensor, batch: Batch) -> Outputs:
    """Return the vectors of a labelled micro-batch with what a StepLoss reads beside them."""
    if batch.sequences is None:
        raise TypeError("only labelled examples can be learned from")
    return Outputs(vectors, batch.required_labels, batch.sequences)
