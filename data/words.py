"""Split a text into words, and locate them in the text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

from data import scripts

TEXT = "<text>"  # an internal column: the text from which a row's words were split; no file has this column
UNSPACED = re.compile(f"[{scripts.UNSPACED}]")
MARKS = ("Mn", "Mc", "Me", "Cf")  # Unicode categories that belong to the character before


def split_words(text: str) -> list[str]:
    """Split a text into runs of letters and digits, and single other characters.

    - Each word has the spaces before it. Spaces at the end of the text are dropped.
    - In Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese each character is a word.
    - Marks, such as accents that are characters of their own, belong to the character before.
    """
    ends: list[int] = []
    in_word = False  # whether a letter continues the last word
    for i, character in enumerate(text):
        kind = _kind(character)
        if kind == "space":
            in_word = False
        elif (kind == "mark" and ends and ends[-1] == i) or (kind == "letter" and in_word):
            ends[-1] = i + 1
        else:
            ends.append(i + 1)
            in_word = kind == "letter"
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@cache
def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    if unicodedata.category(character) in MARKS:
        return "mark"
    if (character.isalnum() or character == "_") and not UNSPACED.match(character):
        return "letter"
    return "single"


def locate_words(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return (first character, one after the last) of each word of split_words, without the spaces before it."""
    ends = np.cumsum([0, *map(len, words)]).tolist()
    return [(end - len(word.lstrip()), end) for word, end in zip(words, ends[1:], strict=True)]
