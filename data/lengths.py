"""The lengths of the examples of a data set: what is asked about all of them, without an array of all of them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

CHUNK = 2**17  # lengths that are in memory at a time


class Lengths(Protocol):
    """(N,) the tokens of each example: an array, or an object that reads the lengths that an index asks for.

    Such an object may have `counts`, what count_lengths returns, where they are known without reading all lengths.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Any, /) -> Any: ...


def all_lengths(lengths: Lengths) -> np.ndarray:
    """Return (N,) all lengths as an array."""
    return lengths if isinstance(lengths, np.ndarray) else np.asarray(lengths[np.arange(len(lengths))])


def count_lengths(lengths: Lengths) -> np.ndarray:
    """Return (L + 1,) the number of examples of each length from 0 to the largest, L."""
    counts: np.ndarray | None = getattr(lengths, "counts", None)
    if counts is not None:
        return counts
    counts = np.zeros(0, dtype=np.int64)
    for begin in range(0, len(lengths), CHUNK):
        more = np.bincount(lengths[_chunk(begin, lengths)], minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts


def percentile(counts: np.ndarray, percent: float) -> float:
    """Return what np.percentile returns of the lengths, from their counts."""
    ends = np.cumsum(counts)
    place = (int(ends[-1]) - 1) * (percent / 100)
    low, high = np.searchsorted(ends, [int(place), int(np.ceil(place))], side="right").tolist()
    return float(low + (high - low) * (place % 1))


def longest_examples(lengths: Lengths, count: int) -> np.ndarray:
    """Return (count,) the indices of the longest examples, the longest first; of equal ones the last first."""
    counts: np.ndarray | None = getattr(lengths, "counts", None)
    longest = np.inf if counts is None else np.flatnonzero(counts)[-1]
    indices, values = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for begin in reversed(range(0, len(lengths), CHUNK)):  # from the end: an equal example that comes later is first
        more = _chunk(begin, lengths)
        found = lengths[more]
        if len(indices) == count:
            is_longer = found > values[-1]
            more, found = more[is_longer], found[is_longer]
        indices, values = np.concatenate([more, indices]), np.concatenate([found, values])
        best = np.lexsort((indices, values))[::-1][:count]
        indices, values = indices[best], values[best]
        if len(indices) == count and values[-1] == longest:
            break
    return indices


def _chunk(begin: int, lengths: Lengths) -> np.ndarray:
    return np.arange(begin, min(begin + CHUNK, len(lengths)))
