"""What a model reads of a micro-batch, for use from Python.

data.Batch has those of the fields that text classification needs, under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.heads import IGNORE


@dataclass(frozen=True)
class Inputs:
    """A packed micro-batch of B sequences, T tokens in all (legend of shapes: models/ops/layers.py).

    Every architecture reads the fields it needs and no others: token_type_ids only where there are token types, the
    decoder's only in sequence-to-sequence models (U target tokens in all), pixel_values in the place of ids for images.
    """

    input_ids: Tensor | None  # (T,) int64
    lengths: tuple[int, ...]  # of each sequence, on the host
    cu_seqlens: Tensor  # (B + 1,) int32, cumulative lengths
    token_type_ids: Tensor | None = None  # (T,) int64
    labels: Tensor | None = None  # in the shape the head wants (models/heads.py)
    markers: Tensor | None = None  # (B, 2) int64: where the two entities of a relation are marked
    decoder_input_ids: Tensor | None = None  # (U,) int64: the target shifted right
    decoder_lengths: tuple[int, ...] = ()
    decoder_cu_seqlens: Tensor | None = None  # (B + 1,) int32
    pixel_values: Tensor | None = None  # (B, channels, height, width)

    def to(self, device: torch.device | str) -> Inputs:
        """The same on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}
        return replace(self, **moved)


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    token_types: Sequence[Sequence[int]] | None = None,
    labels: Tensor | None = None,
    markers: Tensor | None = None,
    decoder: Sequence[Sequence[int]] | None = None,
    device: torch.device | str | None = None,
) -> Inputs:
    """Inputs from lists of token ids, one a sequence; `decoder` has the decoder's ids, one list a sequence.

    Put sequences of equal length next to each other where you can: attention then takes them in one call.
    ModelError for a sequence of no tokens, and where the lists do not match.
    """
    lengths = _lengths("sequence", sequences)
    types = [[0] * n for n in lengths] if token_types is None else token_types
    for i, (found, wanted) in enumerate(zip_longest(map(len, types), lengths)):
        if found != wanted:
            raise ModelError(f"token_types {i} has {found or 0} entries, its sequence {wanted or 0} tokens")
    decoder_lengths = () if decoder is None else _lengths("decoder sequence", decoder)
    # No sequences at all: the encoder has read them, and a cache keeps what cross-attention needs (models/generation/cache.py).
    if decoder is not None and sequences and len(decoder) != len(sequences):
        raise ModelError(f"there are {len(sequences)} sequences and {len(decoder)} of the decoder's")
    return Inputs(
        input_ids=_flat(sequences, device),
        lengths=lengths,
        cu_seqlens=cumulative(lengths, device),
        token_type_ids=_flat(types, device),
        labels=None if labels is None else labels.to(device),
        markers=None if markers is None else markers.to(device),
        decoder_input_ids=None if decoder is None else _flat(decoder, device),
        decoder_lengths=decoder_lengths,
        decoder_cu_seqlens=None if decoder is None else cumulative(decoder_lengths, device),
    )


def _lengths(what: str, sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ModelError(f"{what} {i} is empty: it needs a token, if only a special one")
    return tuple(map(len, sequences))


def images(pixel_values: Tensor, *, labels: Tensor | None = None) -> Inputs:
    """Inputs from preprocessed images of one size, (B, channels, height, width); the model counts their patches."""
    return Inputs(None, (), cumulative((), pixel_values.device), labels=labels, pixel_values=pixel_values)


def shift_right(target: Sequence[int], start_id: int, pad_id: int = 0) -> list[int]:
    """What the decoder reads while it predicts `target`: start_id, then all but the last; IGNORE becomes the pad id."""
    return [start_id, *(pad_id if token == IGNORE else token for token in target[:-1])]


def cumulative(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """(B + 1,) int32: 0 and the running sums of the lengths."""
    return F.pad(torch.tensor(list(lengths), dtype=torch.int64).cumsum(0), (1, 0)).to(device, torch.int32)


def _flat(sequences: Sequence[Sequence[int]], device: torch.device | str | None) -> Tensor:
    return torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=device)
