"""A SentencePiece model (spiece.model), read from protobuf's wire format: the few fields that a tokenizer needs.

Sources: sentencepiece_model.proto (github.com/google/sentencepiece) for the fields and their defaults,
protobuf.dev/programming-guides/encoding for the format.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.errors import DataError
from data.tokenizers.charsmap import check_charsmap
from data.tokenizers.limits import check_unigrams, read_limited

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NORMALIZER_FLAGS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
CONTROL, USER_DEFINED = 3, 4  # types of pieces: never part of a text; never split

T = TypeVar("T", int, bytes)
Fields = dict[int, list[int | bytes]]  # {number of a field: its values, in the order of the file}


@dataclass(frozen=True)
class SentencePiece:
    """The content of a model file. A piece's id is its position; its score is the logarithm of its probability."""

    pieces: list[tuple[str, float]]
    types: list[int]
    model_type: str  # one of MODEL_TYPES
    unk_id: int
    charsmap: bytes  # normalizations of characters, compiled; b"" for none
    unusual_spacing: str  # the settings of spaces that differ from the usual ones; "" for none


def read_sentencepiece(path: Path) -> SentencePiece:
    """Return the model in a file; DataError for a damaged file, or another kind of file."""
    try:
        model = _parse_fields(read_limited(path))
        pieces, types = [], []
        for content in model.get(1, []):
            piece = _parse_fields(_require_bytes(content))
            pieces.append((_get_field(piece, 1, b"").decode("utf-8"), _parse_score(piece)))
            types.append(_get_field(piece, 3, 1))
        trainer, normalizer = (_parse_fields(_get_field(model, number, b"")) for number in (2, 3))
        read = SentencePiece(
            pieces=pieces,
            types=types,
            model_type=MODEL_TYPES.get(_get_field(trainer, 3, 1), "unknown"),
            unk_id=_get_field(trainer, 40, 0),
            charsmap=_get_field(normalizer, 2, b""),
            unusual_spacing=_unusual_spacing(trainer, normalizer),
        )
        _check_pieces(read)
        check_unigrams(path, sum(len(piece.encode()) for piece, _ in pieces))
        if read.charsmap:
            check_charsmap(read.charsmap)
    except ValueError as error:  # UnicodeDecodeError too
        raise DataError(f"{path}: not a SentencePiece model, or a damaged one: {error}") from None
    return read


def _parse_fields(message: bytes) -> Fields:
    """Return the fields of one message: whole numbers as int, everything else (texts, messages, floats) as bytes."""
    fields: Fields = {}
    position = 0
    while position < len(message):
        key, position = _parse_varint(message, position)
        number, wire_type = key >> 3, key & 7
        value: int | bytes
        if wire_type == 0:
            value, position = _parse_varint(message, position)
        elif wire_type in (1, 2, 5):
            length, position = (
                _parse_varint(message, position) if wire_type == 2 else (8 if wire_type == 1 else 4, position)
            )
            value, position = message[position : position + length], position + length
            if position > len(message):
                raise ValueError("it ends inside a field")
        else:
            raise ValueError(f"a field of wire type {wire_type}")
        fields.setdefault(number, []).append(value)
    return fields


def _parse_varint(message: bytes, position: int) -> tuple[int, int]:
    """Return (a number stored in 7 bits per byte, lowest first; the position behind it)."""
    # The fast path: most numbers are one byte, and mT5's model has two million of them.
    if position < len(message) and message[position] < 128:
        return message[position], position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends inside a number")
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than ten bytes")


def _get_field(fields: Fields, number: int, default: T) -> T:
    """Return the value of a field, of several the last one, by protobuf's rule. ValueError for another type."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, type(default)):
        raise ValueError(f"field {number} is a {type(value).__name__}, a {type(default).__name__} is needed")
    return value


def _require_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a piece is a number")
    return value


def _parse_score(piece: Fields) -> float:
    content = _get_field(piece, 2, bytes(4))
    score: float = struct.unpack("<f", content)[0] if len(content) == 4 else math.nan
    if not math.isfinite(score):
        raise ValueError("a score is not a finite number")
    return score


def _unusual_spacing(trainer: Fields, normalizer: Fields) -> str:
    """Return the settings of spaces that differ from the usual ones, as "name = value"; "" for none.

    The usual ones: a space is added before a text. Spaces at its ends, and all but one in a row, are dropped. Spaces
    are written as ▁ and belong to the word that follows.
    """
    odd = [name for number, name in NORMALIZER_FLAGS.items() if not _get_field(normalizer, number, 1)]
    odd = [f"{name} = false" for name in odd]
    return ", ".join(odd + ["treat_whitespace_as_suffix = true"] * bool(_get_field(trainer, 24, 0)))


def _check_pieces(model: SentencePiece) -> None:
    """Raise ValueError for pieces that the tokenizers library accepts but gives meaningless ids."""
    first: dict[str, int] = {}
    for i, (piece, _) in enumerate(model.pieces):
        if not piece:
            raise ValueError(f"piece {i} is empty")
        if (other := first.setdefault(piece, i)) != i:
            raise ValueError(f"pieces {other} and {i} are both {piece!r}")
    if not model.pieces:
        raise ValueError("it has no pieces")
    if model.unk_id >= len(model.pieces):
        raise ValueError(f"unk_id = {model.unk_id}, of {len(model.pieces)} pieces")
