"""What travels from the loader to the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch of B texts, T tokens in all (the legend of shapes is in models/layers.py).

    Sequences are sorted by length. It may be empty (B = T = 0): a rank whose share of a step has run out still takes
    part in it, so every rank runs the same number of forwards and collectives.
    """

    input_ids: Tensor  # (T,) int64
    token_type_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int32, cumulative lengths
    lengths: tuple[int, ...]  # the same on the host
    labels: Tensor | None  # (B,) int64, -100 where there is no target
    num_targets: int  # labels that are a target
    indices: tuple[int, ...]  # the place of each example in its data set
    ids: tuple[str, ...]  # the id of each example in its file

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> Batch:  # type: ignore[no-untyped-def]
        moved = {
            name: function(tensor)
            for name in ("input_ids", "token_type_ids", "cu_seqlens", "labels")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)
