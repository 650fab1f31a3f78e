"""What a model reads of a micro-batch: the Protocol of every forward, and a plain implementation of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from models.errors import ModelError
from models.ops.packing import cumulative

IGNORE_INDEX = -100  # an integer label that is no target; torch's own default


class ModelInputs(Protocol):
    """A packed micro-batch of B sequences, T tokens in all (legend of shapes: models/ops/packing.py).

    Every architecture reads the fields that it needs and no others: token_type_ids only where it has token types, the
    decoder's only in sequence-to-sequence models (U target tokens in all), pixel_values instead of ids for images.
    `Inputs` below and data.Batch both satisfy it.
    """

    @property
    def input_ids(self) -> Tensor | None:
        """(T,) int64."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence, on the host."""

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32, cumulative lengths."""

    @property
    def token_type_ids(self) -> Tensor | None:
        """(T,) int64."""

    @property
    def labels(self) -> Tensor | None:
        """The labels in the shape that the head reads (models/heads.py)."""

    @property
    def num_targets(self) -> int | None:
        """The number of labels that are targets; None: not counted yet."""

    @property
    def markers(self) -> Tensor | None:
        """(B, 2) int64: the positions of the two marked entities of a relation."""

    @property
    def decoder_input_ids(self) -> Tensor | None:
        """(U,) int64: the target shifted right."""

    @property
    def decoder_lengths(self) -> tuple[int, ...]:
        """The length of each target, on the host."""

    @property
    def decoder_cu_seqlens(self) -> Tensor | None:
        """(B + 1,) int32, cumulative lengths."""

    @property
    def pixel_values(self) -> Tensor | None:
        """(B, channels, height, width)."""


@dataclass(frozen=True)
class Inputs:
    """ModelInputs as a plain dataclass; `pack` and `images` make them."""

    input_ids: Tensor | None
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    token_type_ids: Tensor | None = None
    labels: Tensor | None = None
    markers: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    decoder_lengths: tuple[int, ...] = ()
    decoder_cu_seqlens: Tensor | None = None
    pixel_values: Tensor | None = None
    num_targets: int | None = None

    def to(self, device: torch.device | str) -> Inputs:
        """Return a copy on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        on_device: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **on_device)


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    token_types: Sequence[Sequence[int]] | None = None,
    labels: Tensor | None = None,
    markers: Tensor | None = None,
    decoder: Sequence[Sequence[int]] | None = None,
    device: torch.device | str | None = None,
) -> Inputs:
    """Return Inputs from lists of token ids, one list a sequence; `decoder` has the ids for the decoder likewise.

    Put sequences of equal length next to each other where you can: attention then takes them in one call.
    Raises ModelError for a sequence without tokens, and where the lists do not match.
    """
    lengths = _lengths("sequence", sequences)
    types = [[0] * n for n in lengths] if token_types is None else token_types
    for i, (found, expected) in enumerate(zip_longest(map(len, types), lengths)):
        if found != expected:
            raise ModelError(f"token_types {i} has {found or 0} entries, its sequence {expected or 0} tokens")
    decoder_lengths = () if decoder is None else _lengths("decoder sequence", decoder)
    # Without sequences the encoder has read them already, and the cache has its keys (models/generation/cache.py).
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


def images(pixel_values: Tensor, *, labels: Tensor | None = None) -> Inputs:
    """Return Inputs from preprocessed images of one size, (B, channels, height, width); the model counts patches."""
    return Inputs(None, (), cumulative((), pixel_values.device), labels=labels, pixel_values=pixel_values)


def shift_right(target: Sequence[int], start_id: int, pad_id: int = 0) -> list[int]:
    """Return what the decoder reads while it predicts `target`: start_id, then all but the last token of it.

    IGNORE_INDEX becomes the pad id.
    """
    return [start_id, *(pad_id if token == IGNORE_INDEX else token for token in target[:-1])]


def required(value: Tensor | None, field: str) -> Tensor:
    """Return the value of a field of ModelInputs; ModelError where the micro-batch does not have it."""
    if value is None:
        raise ModelError(f"this model reads {field}, which the micro-batch does not have")
    return value


def _lengths(what: str, sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ModelError(f"{what} {i} is empty: it needs a token, if only a special one")
    return tuple(map(len, sequences))


def _flat(sequences: Sequence[Sequence[int]], device: torch.device | str | None) -> Tensor:
    return torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=device)
