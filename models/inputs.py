"""The inputs of a model: the Protocol that every forward takes, and a plain implementation of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from models.errors import ModelError
from models.ops.packing import Packing, Padded, Selection, cumulative_lengths, to_device

IGNORE_INDEX = -100  # an integer label that is no target; torch's own default


class ModelInputs(Protocol):
    """A packed micro-batch of B sequences, T tokens in total (legend of shapes: models/ops/packing.py).

    An architecture reads only the fields that it needs:
    - token_type_ids where it has token types;
    - the decoder's fields (U target tokens in total) in sequence-to-sequence models;
    - pixel_values instead of input_ids for images.

    `Inputs` below and data.Batch both satisfy the Protocol.
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

    @property
    def sequences(self) -> tuple[int, ...] | None:
        """The number of sequences of each example, on the host, such as the windows of a text; None: one each."""


# The tokens whose hidden states a head reads; None: all. The packing is that of the hidden states (Head.reads).
Reads: TypeAlias = Callable[[Packing, ModelInputs], Selection | None]


def packing_to_read(packing: Packing, inputs: ModelInputs, reads: Reads | None) -> Packing:
    """Return the packing of the last hidden states: the Selection of `reads`, or that of all tokens."""
    return (None if reads is None else reads(packing, inputs)) or packing


@dataclass(frozen=True)
class Inputs:
    """ModelInputs as a plain dataclass; `pack` and `pack_images` make them."""

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
    sequences: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> Inputs:
        """Return a copy on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        on_device: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **on_device)


@dataclass(frozen=True)
class PaddedInputs(Inputs):
    """Inputs of an exported graph: padded sequences, (B * L,) with the padding (models/padded.py)."""

    packing: Padded | None = None
    decoder_packing: Padded | None = None


def packing_of(inputs: ModelInputs) -> Packing:
    """Return the packing of the texts of a micro-batch, or of the sources of an encoder-decoder."""
    if isinstance(inputs, PaddedInputs) and inputs.packing is not None:
        return inputs.packing
    return Packing(inputs.lengths, inputs.cu_seqlens)


def packing_of_decoder(inputs: ModelInputs) -> Packing:
    """Return the packing of the targets of an encoder-decoder."""
    if isinstance(inputs, PaddedInputs) and inputs.decoder_packing is not None:
        return inputs.decoder_packing
    return Packing(inputs.decoder_lengths, require(inputs.decoder_cu_seqlens, "decoder_cu_seqlens"))


def packing_of_images(inputs: ModelInputs, tokens: Tensor) -> Packing:
    """Return the packing of the tokens of images of one size, (B, L, D)."""
    if isinstance(inputs, PaddedInputs):
        return Padded.from_shape(tokens, None)
    count, length = tokens.shape[:2]
    starts = torch.arange(count + 1, dtype=torch.int32, device=tokens.device) * length
    return Packing((length,) * count, starts)


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    token_types: Sequence[Sequence[int]] | None = None,
    labels: Tensor | None = None,
    markers: Tensor | None = None,
    decoder: Sequence[Sequence[int]] | None = None,
    windows: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Inputs:
    """Return Inputs from lists of token ids, one list per sequence; `decoder` has those of the decoder.

    windows: the number of sequences of each example, where an example is several; a classifier takes their mean.

    Attention is faster where sequences of equal length are neighbours, since it computes them in one call.
    Raises ModelError for a sequence without tokens, and where the lists do not match.
    """
    lengths = _check_lengths("sequence", sequences)
    types = [[0] * n for n in lengths] if token_types is None else token_types
    for i, (found, expected) in enumerate(zip_longest(map(len, types), lengths)):
        if found != expected:
            raise ModelError(f"token_types {i} has {found or 0} entries, its sequence {expected or 0} tokens")
    decoder_lengths = () if decoder is None else _check_lengths("decoder sequence", decoder)
    # In generation the encoder runs once, so later inputs have no sequences (models/generation/cache.py).
    if decoder is not None and sequences and len(decoder) != len(sequences):
        raise ModelError(f"there are {len(sequences)} sequences and {len(decoder)} decoder sequences")
    if windows is not None and (sum(windows) != len(sequences) or min(windows, default=1) < 1):
        raise ModelError(f"windows {[*windows]} should be numbers from 1, {len(sequences)} together")
    return Inputs(
        input_ids=_flatten(sequences, device),
        lengths=lengths,
        cu_seqlens=cumulative_lengths(lengths, device),
        token_type_ids=_flatten(types, device),
        labels=None if labels is None else labels.to(device),
        markers=None if markers is None else markers.to(device),
        decoder_input_ids=None if decoder is None else _flatten(decoder, device),
        decoder_lengths=decoder_lengths,
        decoder_cu_seqlens=None if decoder is None else cumulative_lengths(decoder_lengths, device),
        sequences=None if windows is None else tuple(windows),
    )


def pack_images(pixel_values: Tensor, *, labels: Tensor | None = None) -> Inputs:
    """Return Inputs from preprocessed images of one size, (B, channels, height, width)."""
    return Inputs(None, (), cumulative_lengths((), pixel_values.device), labels=labels, pixel_values=pixel_values)


def shift_right(target: Sequence[int], start_id: int, pad_id: int = 0) -> list[int]:
    """Return the decoder's input while it predicts `target`: start_id, then all tokens of `target` but the last.

    IGNORE_INDEX becomes pad_id.
    """
    return [start_id, *(pad_id if token == IGNORE_INDEX else token for token in target[:-1])]


def require(value: Tensor | None, field: str) -> Tensor:
    """Return `value`, a field of ModelInputs; ModelError where the micro-batch does not have it."""
    if value is None:
        raise ModelError(f"this model reads {field}, which the micro-batch does not have")
    return value


def _check_lengths(noun: str, sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the length of each sequence; ModelError for an empty one."""
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ModelError(f"{noun} {i} is empty: it needs at least one token, such as a special one")
    return tuple(map(len, sequences))


def _flatten(sequences: Sequence[Sequence[int]], device: torch.device | str | None) -> Tensor:
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return tokens if device is None else to_device(tokens, device)
