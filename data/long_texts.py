"""Texts that have more tokens than the model reads: their first and last tokens, or windows over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.examples import count_part, note_truncated

TRUNCATE, HEAD_AND_TAIL, WINDOWS = "truncate", "head+tail", "windows"  # values of data.long_texts
HEAD_SHARE = 4  # a quarter of the tokens that are kept are the first ones, three quarters the last ones


@dataclass(frozen=True)
class LongTexts:
    """How texts with more than max_length tokens, special ones included, are read.

    - truncate: the first tokens are kept.
    - head+tail: the first quarter and the last three quarters of what fits, the best share of Sun et al. 2019, "How to
      fine-tune BERT for text classification?": 128 and 382 of 510. In a pair, each text that is too long.
    - windows: all tokens are read, in windows that share `overlap` tokens. In a pair, windows over the longer text;
      the other one is in all of them, truncated to half of what fits.

    Where a pair is too long, the shorter text may have half of what fits, and the longer one the rest, as in the
    tokenizers' strategy "longest_first".
    """

    mode: str
    max_length: int
    overlap: int = 0
    keeps_second: bool = False  # whether the second text of a pair is shortened only where it is too long by itself

    def split(self, parts: np.ndarray) -> list[np.ndarray]:
        """Return the positions of the tokens of each sequence in which a long text is read.

        parts: (T,) the text of a pair that each token is from, 0 or 1; -1 for special tokens.
        """
        return self._split_into_windows(parts) if self.mode == WINDOWS else [self._shorten(parts)]

    def _shorten(self, parts: np.ndarray) -> np.ndarray:
        kept = parts < 0
        for part, size in enumerate(self._sizes(parts)):
            tokens = np.flatnonzero(parts == part)
            head = -(-size // HEAD_SHARE) if self.mode == HEAD_AND_TAIL else size
            is_whole = len(tokens) <= size
            kept[tokens if is_whole else np.concatenate([tokens[:head], tokens[len(tokens) - size + head :]])] = True
        return np.flatnonzero(kept)

    def _split_into_windows(self, parts: np.ndarray) -> list[np.ndarray]:
        sizes = self._sizes(parts)
        longer = int((parts == 1).sum() > (parts == 0).sum())
        tokens, other = np.flatnonzero(parts == longer), np.flatnonzero(parts == 1 - longer)
        in_all = np.concatenate([np.flatnonzero(parts < 0), other[: sizes[1 - longer]]])
        size = sizes[longer]
        starts = range(0, len(tokens) - self.overlap, size - self.overlap)
        return [np.sort(np.concatenate([in_all, tokens[start : start + size]])) for start in starts]

    def _sizes(self, parts: np.ndarray) -> tuple[int, int]:
        """Return how many tokens of each text of a pair fit into a sequence; of a text alone, (all, 0)."""
        first, second = int((parts == 0).sum()), int((parts == 1).sum())
        room = self.max_length - (len(parts) - first - second)
        if self.keeps_second:
            return (room - min(second, room), min(second, room))
        shorter = min(first, second, room // 2)
        return (shorter, room - shorter) if first <= second else (room - shorter, shorter)

    def notes(self, long: int, total: int, nouns: str, windows: int, lost: int, tokens: int) -> tuple[str, ...]:
        """Return notes on the long texts: how they are read, and the share of tokens that was lost.

        long, windows: number of long texts and of their windows. lost: of the `tokens` that all texts have.
        """
        limit = f"data.max_length = {self.max_length}"
        if self.mode == HEAD_AND_TAIL:
            return note_truncated(long, total, nouns, f"their first and last tokens, {limit}", lost, tokens)
        verb = "is" if long == 1 else "are"
        notes = count_part(long, total, nouns, f"{verb} longer than {limit}: read in {windows:,} windows")
        share = f"{lost / max(1, tokens):.1%} of all tokens lost"
        return notes + ((f"both texts of some pairs are longer than half of {limit}: {share}",) if lost else ())


def find_overlap_fault(max_length: int, num_special: int, overlap: int, is_pair: bool) -> str:
    """Return why windows cannot share `overlap` tokens, with what would work; "" where they can."""
    room = max_length - num_special
    size = room - room // 2 if is_pair else room
    if overlap < size:
        return ""
    if is_pair:
        reason = f"a window of data.max_length = {max_length} has room for {size} tokens of the longer text of a pair"
    else:
        reason = f"a window of data.max_length = {max_length} has room for {size} tokens beside {num_special} special"
    return f"data.window_overlap = {overlap}: {reason}; lower it to {size - 1} or less, or raise data.max_length"


# Words


@dataclass(frozen=True)
class WordWindows:
    """The windows of a long text of words, over its tokens without special ones."""

    slices: list[tuple[int, int]]  # (begin, end) of each window
    words: np.ndarray  # (W,) the words that have tokens
    window: np.ndarray  # (W,) the window in which each is read
    first: np.ndarray  # (W,) its first token, counted from the beginning of the text
    num_cut: int  # words longer than a window, of which only the first tokens are read


def split_into_word_windows(word_ids: Sequence[int] | np.ndarray, size: int, overlap: int) -> WordWindows:
    """Split a text of words into windows of at most `size` tokens that share at most `overlap` tokens.

    - Windows begin and end between words, so that each word is whole in one of them. A word longer than a window has
      its first tokens in a window of its own.
    - A word is read in the window where it has the most context: where the smaller of the numbers of tokens before and
      after it is largest (Devlin et al. 2019, in their code for SQuAD); the first such window.

    word_ids: (T,) the word of each token, not decreasing.
    """
    words, starts = np.unique(np.asarray(word_ids), return_index=True)
    ends = np.append(starts[1:], len(word_ids))
    slices, word = [], 0
    while True:
        begin = int(starts[word])
        stop = int(np.searchsorted(ends, begin + size, side="right"))  # the first word that does not fit
        end = int(ends[stop - 1]) if stop > word else begin + size
        slices.append((begin, end))
        stop = max(stop, word + 1)
        if stop == len(words):
            break
        # Shared words leave room for the next one, so that each window has a word that none before it had.
        word = min(stop, int(np.searchsorted(starts, max(end - overlap, ends[stop] - size))))
    context, window = np.full(len(words), -1), np.zeros(len(words), dtype=np.int64)
    is_cut = ends - starts > size
    for number, (begin, end) in enumerate(slices):
        smaller = np.where(is_cut & (starts == begin), 0, np.minimum(starts - begin, end - ends))
        window[smaller > context] = number
        context = np.maximum(context, smaller)
    return WordWindows(slices, words, window, starts, int(is_cut.sum()))
