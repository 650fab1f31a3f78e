"""A SentencePiece model (spiece.model), read from protobuf's wire format: the few fields that a tokenizer needs.

Sources: sentencepiece_model.proto (github.com/google/sentencepiece) for the fields and their defaults,
protobuf.dev/programming-guides/encoding for the format. The table of normalizations is a double array of Darts-clone.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.errors import DataError

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NORMALIZER_FLAGS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
CONTROL, USER_DEFINED = 3, 4  # types of pieces: never found in a text; always found whole

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
    odd_spaces: str  # the unusual settings of spaces, as "name = value"; "" for none


def read_sentencepiece(path: Path) -> SentencePiece:
    """Return the model in a file; DataError for a damaged file, or another kind of file."""
    try:
        model = _fields(path.read_bytes())
        pieces, types = [], []
        for content in model.get(1, []):
            piece = _fields(_is_bytes(content))
            pieces.append((_last(piece, 1, b"").decode("utf-8"), _score(piece)))
            types.append(_last(piece, 3, 1))
        trainer, normalizer = (_fields(_last(model, number, b"")) for number in (2, 3))
        read = SentencePiece(
            pieces=pieces,
            types=types,
            model_type=MODEL_TYPES.get(_last(trainer, 3, 1), "unknown"),
            unk_id=_last(trainer, 40, 0),
            charsmap=_last(normalizer, 2, b""),
            odd_spaces=_odd_spaces(trainer, normalizer),
        )
        _check_pieces(read)
        if read.charsmap:
            _check_charsmap(read.charsmap)
    except ValueError as error:  # UnicodeDecodeError too
        raise DataError(f"{path}: not a SentencePiece model, or a damaged one: {error}") from None
    return read


def _fields(message: bytes) -> Fields:
    """Return the fields of one message: whole numbers as int, everything else (texts, messages, floats) as bytes."""
    fields: Fields = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        value: int | bytes
        if wire_type == 0:
            value, at = _varint(message, at)
        elif wire_type in (1, 2, 5):
            length, at = _varint(message, at) if wire_type == 2 else (8 if wire_type == 1 else 4, at)
            value, at = message[at : at + length], at + length
            if at > len(message):
                raise ValueError("it ends inside a field")
        else:
            raise ValueError(f"a field of wire type {wire_type}")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return (a number stored in 7 bits a byte, lowest first; where the next field begins)."""
    if at < len(message) and message[at] < 128:  # the fast path: most numbers are one byte, and mT5 has two million
        return message[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends inside a number")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _last(fields: Fields, number: int, default: T) -> T:
    """Return the value of a field that occurs once. By protobuf's rule the last one counts."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, type(default)):
        raise ValueError(f"field {number} holds a {type(value).__name__}, a {type(default).__name__} is needed")
    return value


def _is_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a piece that is a number")
    return value


def _score(piece: Fields) -> float:
    content = _last(piece, 2, bytes(4))
    score: float = struct.unpack("<f", content)[0] if len(content) == 4 else math.nan
    if not math.isfinite(score):
        raise ValueError("a score that is no finite number")
    return score


def _odd_spaces(trainer: Fields, normalizer: Fields) -> str:
    """Return the settings of spaces that differ from the usual ones.

    Usually a space is put before a text; spaces at its ends, and all but one in a row, are dropped; spaces are written
    as ▁ and belong to the word that follows.
    """
    odd = [name for number, name in NORMALIZER_FLAGS.items() if not _last(normalizer, number, 1)]
    odd = [f"{name} = false" for name in odd]
    return ", ".join(odd + ["treat_whitespace_as_suffix = true"] * bool(_last(trainer, 24, 0)))


def _check_pieces(model: SentencePiece) -> None:
    """Raise ValueError for pieces that the tokenizers library accepts, but then gives meaningless ids for."""
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


def _check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError where a step through the table leaves it: a text that takes this step would end the program.

    Layout, little-endian: the size of a trie in bytes, the trie, and the replacements, each ended by a NUL. A unit of
    the trie is
    - a value (bit 31 set): the beginning of a replacement; or
    - a node: bits 10 to 30 and 9 give the distance of its children, bit 8 says whether the first of them is a value,
      and bits 0 to 7 are the byte by which the node is reached.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size % 4 or not 0 < size <= len(charsmap) - 4:
        raise ValueError(f"a table of normalizations of {size} bytes, where {len(charsmap)} are left")
    units = np.frombuffer(charsmap, "<u4", size // 4, offset=4).astype(np.int64)
    replacements = charsmap[4 + size :]
    replacements.decode("utf-8")
    is_value = units >> 31 == 1
    children = np.arange(len(units)) ^ (units >> 10 << (units >> 6 & 8))
    inside = (children | 255) < len(units)  # a child is reached by one byte more
    if is_value[0] or not (inside | is_value).all() or not is_value[children[~is_value & (units >> 8 & 1 == 1)]].all():
        raise ValueError("a table of normalizations that leads out of itself")
    begins = np.concatenate([[True], np.frombuffer(replacements, np.uint8) == 0])[:-1]
    starts = units[is_value] & 0x7FFFFFFF
    if (starts >= len(begins)).any() or not begins[starts].all():
        raise ValueError("a table of normalizations with a replacement that begins inside another")
