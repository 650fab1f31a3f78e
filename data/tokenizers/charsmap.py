"""SentencePiece's table of normalizations: a double array of Darts-clone (github.com/s-yata/darts-clone)."""

from __future__ import annotations

import numpy as np


def check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError where a step leads out of the table; a text with this step would crash the process.

    Layout, little-endian: the size of a trie in bytes, the trie, and the replacements, each ended by a NUL. A unit of
    the trie is
    - a value (bit 31 is set): the position of a replacement; or
    - a node: bits 10 to 30 and bit 9 give the offset of its children. Bit 8 says whether the first child is a value.
      Bits 0 to 7 are the byte by which the node is reached.
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
