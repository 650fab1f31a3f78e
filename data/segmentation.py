"""Words of Chinese and Japanese texts, which have no spaces between them: those of a list, or jieba's."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable
from functools import partial

import numpy as np

from data.errors import DataError, ErrorList
from data.formats.lines import clean_lines, locate
from data.formats.options import FileOptions
from data.scripts import KANA_AND_HAN

JIEBA = "jieba"
RUN = re.compile(f"[{KANA_AND_HAN}]+")
SETTING = "masked_lm.segmenter"

Segment = Callable[[str], list[str]]  # a run of Chinese or Japanese characters -> its words, in their order


def load_segmenter(name: str) -> Segment:
    """Return the function that splits a run of characters into words: "jieba", or the name of a file of words.

    A line of the file begins with a word, as in jieba's dictionaries. Raises DataError where the package is missing, or
    the file cannot be read or has no word of several characters.
    """
    if name == JIEBA:
        try:
            jieba = importlib.import_module("jieba")
        except ImportError:
            raise DataError(
                f"{SETTING} = 'jieba' needs the package jieba: pip install jieba; or name a file with a word a line"
            ) from None
        jieba.setLogLevel("ERROR")  # it logs each time that it loads its dictionary
        segment: Segment = jieba.lcut
        return segment
    words = read_words(name)
    return partial(match_longest, words=words, longest=max(map(len, words)))


def read_words(name: str) -> frozenset[str]:
    """Return the words of several Chinese or Japanese characters that the lines of a file begin with."""
    errors = ErrorList()
    try:
        lines = [line for _, line in clean_lines(locate(name), errors, FileOptions())]
    except FileNotFoundError:
        raise DataError(f"{SETTING} = {name!r}: no such file; name a file with a word a line, or jieba") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    errors.raise_if_any()
    words = frozenset(line.split()[0] for line in lines if line.strip())
    words = frozenset(word for word in words if len(word) > 1 and RUN.fullmatch(word))
    if not words:
        raise DataError(f"{SETTING} = {name!r}: no line begins with a word of several Chinese or Japanese characters")
    return words


def match_longest(run: str, words: frozenset[str], longest: int) -> list[str]:
    """Split a run by the longest word of the list at each place, from left to right; other characters are alone."""
    found, begin = list[str](), 0
    while begin < len(run):
        sizes = range(min(longest, len(run) - begin), 1, -1)
        size = next((size for size in sizes if run[begin : begin + size] in words), 1)
        found.append(run[begin : begin + size])
        begin += size
    return found


def number_words(text: str, segment: Segment) -> np.ndarray:
    """Return (characters + 1,) int64: the number of the word that each character is in, -1 outside of all runs.

    The last one is that of the end of the text.
    """
    numbers = np.full(len(text) + 1, -1, dtype=np.int64)
    count = 0
    for run in RUN.finditer(text):
        begin = run.start()
        for word in segment(run.group()):
            numbers[begin : begin + len(word)] = count
            begin, count = begin + len(word), count + 1
    return numbers


def checksum_of_segmenter(name: str) -> str:
    """Return the checksum of the words of a file; the name itself for jieba, or no segmenter."""
    if name in ("", JIEBA):
        return name
    return hashlib.sha256("\n".join(sorted(read_words(name))).encode()).hexdigest()
