"""What travels from the loader to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a label that is no target


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch of B sequences, T tokens in all (the legend of shapes is in models/ops/layers.py).

    A sequence is an example, but where `sequences` says how many each example has (the windows of a long text).
    Sequences are sorted by length. It may be empty (B = T = 0): a rank whose share of a step has run out still takes
    part in it, so every rank runs the same number of forwards and collectives.

    Each task fills the fields that its models read: a decoder's (U target tokens in all) in sequence-to-sequence
    models, pixel_values in the place of ids for images.
    """

    lengths: tuple[int, ...]  # of each sequence, on the host
    cu_seqlens: Tensor  # (B + 1,) int32, cumulative lengths
    labels: Tensor | None  # in the shape the head wants (models/heads.py); IGNORE, or NaN in floats, is no target
    num_targets: int  # labels that are a target
    indices: tuple[int, ...]  # the place of each example in its data set
    ids: tuple[str, ...]  # the id of each example in its file
    input_ids: Tensor | None = None  # (T,) int64
    token_type_ids: Tensor | None = None  # (T,) int64
    markers: Tensor | None = None  # (B, 2) int64: where the two entities of a relation are marked
    decoder_input_ids: Tensor | None = None  # (U,) int64: the target shifted right
    decoder_lengths: tuple[int, ...] = ()
    decoder_cu_seqlens: Tensor | None = None  # (B + 1,) int32
    pixel_values: Tensor | None = None  # (B, channels, height, width)
    image_tokens: int = 0  # what all images together are to the model
    sequences: tuple[int, ...] | None = None  # of each example; None: one

    @property
    def num_tokens(self) -> int:
        """All that the model reads."""
        return sum(self.lengths) + sum(self.decoder_lengths) + self.image_tokens

    @property
    def required_labels(self) -> Tensor:
        """The labels; TypeError for an unlabelled batch."""
        if self.labels is None:
            raise TypeError("only labelled examples can be evaluated")
        return self.labels

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, as the loader asks for."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def totals(group: Sequence[Batch]) -> tuple[int, int, int]:
    """(targets, examples, tokens that the model reads) of the micro-batches of a step."""
    return sum(b.num_targets for b in group), sum(len(b.ids) for b in group), sum(b.num_tokens for b in group)
