"""The micro-batch that the loader passes to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# An integer label with this value is no target. models/inputs.py has the same constant, equal to torch's default.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch of B sequences with T tokens in total (legend of shapes: models/ops/packing.py).

    - An example is one sequence, unless `sequences` gives a number for each example (windows of a long text).
    - The sequences are sorted by length.
    - A batch may be empty (B = T = 0). A rank with fewer micro-batches than another runs empty ones, so that every
      rank has the same number of forwards and collectives.

    A task fills the fields that its models read: decoder fields (U target tokens in total) for sequence-to-sequence
    models, pixel_values instead of ids for images.
    """

    lengths: tuple[int, ...]  # tokens of each sequence, on the host
    cu_seqlens: Tensor  # (B + 1,) int32, cumulative lengths
    labels: Tensor | None  # shape: see models/heads.py; IGNORE_INDEX, or NaN among floats, is no target
    num_targets: int  # number of labels that are targets
    indices: tuple[int, ...]  # position of each example in its data set
    ids: tuple[str, ...]  # id of each example in its file
    input_ids: Tensor | None = None  # (T,) int64
    token_type_ids: Tensor | None = None  # (T,) int64
    markers: Tensor | None = None  # (B, 2) int64: tokens that mark the two entities of a relation
    decoder_input_ids: Tensor | None = None  # (U,) int64: the target shifted right
    decoder_lengths: tuple[int, ...] = ()
    decoder_cu_seqlens: Tensor | None = None  # (B + 1,) int32
    pixel_values: Tensor | None = None  # (B, channels, height, width)
    image_tokens: int = 0  # tokens that the model makes of all images together
    sequences: tuple[int, ...] | None = None  # number of sequences of each example; None: one each
    # Of a loss that couples the examples of a step (engine/coupling.py); None: the loss is that of this micro-batch.
    output_gradients: Tensor | None = None  # (B, D) of the step's loss with respect to the model's vectors
    output_loss: Tensor | None = None  # scalar: the part of these examples in that loss

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model reads."""
        return sum(self.lengths) + sum(self.decoder_lengths) + self.image_tokens

    @property
    def weighted_targets(self) -> float:
        """What the loss of a step is divided by: the number of targets, unless those of some tasks count more."""
        return self.num_targets

    @property
    def required_labels(self) -> Tensor:
        """The labels; TypeError for an unlabelled batch."""
        if self.labels is None:
            raise TypeError("only labelled examples can be evaluated")
        return self.labels

    def to(self, device: torch.device) -> Batch:
        """Return a copy on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type != "mps"))

    def upload(self, device: torch.device) -> Batch:
        """Return a copy on `device`, to a GPU through pinned memory, so that the host does not wait for it.

        For MPS the batch itself, since the model copies what it evaluates (engine/mps.py).
        """
        if device.type == "mps":
            return self
        return (self.pin_memory() if device.type == "cuda" else self).to(device)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a copy on a GPU until `stream` has used it, where another stream made the copy."""
        for tensor in self._tensors():
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def pin_memory(self) -> Batch:
        """Return a copy in pinned memory; torch's DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _tensors(self) -> list[Tensor]:
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **mapped)


def totals(micro_batches: Sequence[Batch]) -> tuple[float, int, int]:
    """Return (targets, examples, tokens that the model reads) of the micro-batches of a step."""
    num_targets = sum(batch.weighted_targets for batch in micro_batches)
    num_examples = sum(len(batch.ids) for batch in micro_batches)
    return num_targets, num_examples, sum(batch.num_tokens for batch in micro_batches)
