"""The order in which training reads its examples: a pure function of the seed and the epoch, computed where needed.

Up to LARGEST_PERMUTATION examples an order is an array. A larger set has a keyed permutation, which computes the
examples of any places alone: no process holds an array of all N. The number of examples decides, and nothing else, so a
prepared folder is read in the order of its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.random_streams import BALANCED_CLASS, BALANCED_EXAMPLE

LARGEST_PERMUTATION = 2**20  # 8 MiB, and some 20 ms an epoch
NUM_ROUNDS = 10  # as NIST's FF1; four rounds of random functions are a good permutation (Luby & Rackoff 1988)


@dataclass(frozen=True)
class KeyedPermutation:
    """A permutation of 0, ..., n - 1, of which `permutation[places]` computes the values at any places alone.

    It is a Feistel network over the smallest power of two that holds n. A value outside is permuted again until it is
    inside (cycle walking; Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), on average less than twice.
    It has the uses of a shuffle, not those of a cipher: the rounds are fast hashes of 64 bits.

    key: numbers, any of which gives another permutation.
    """

    key: tuple[int, ...]
    n: int

    def __len__(self) -> int:
        return self.n

    @cached_property
    def _round_keys(self) -> np.ndarray:  # (NUM_ROUNDS, 1) uint64
        return np.random.SeedSequence(self.key).generate_state(NUM_ROUNDS, np.uint64)[:, None]

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Return (P,) int64 the values at `places`, (P,) whole numbers from 0 to n - 1; IndexError for others."""
        places = np.asarray(places, dtype=np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < self.n:
            raise IndexError(f"places {places.min()} to {places.max()} of a permutation of {self.n}")
        values = self._permute(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._permute(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        """Permute numbers of as many bits as n - 1 has: in each round, the hash of one half changes the other half."""
        bits = max(2, (self.n - 1).bit_length())
        widths = [np.uint64(bits - bits // 2), np.uint64(bits // 2)]  # of the two halves, which swap in each round
        left, right = values >> widths[1], values & _ones(widths[1])
        for key in self._round_keys:
            left, right = right, left ^ (_hash(right + key) & _ones(widths[0]))
            widths.reverse()
        return (left << widths[1]) | right


def _ones(width: np.uint64) -> np.uint64:
    return np.uint64((1 << int(width)) - 1)


def _hash(values: np.ndarray) -> np.ndarray:
    """Return the hashes of (P,) uint64: the finalizer of SplitMix64 (Steele, Lea & Flood 2014), Stafford's mix 13."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: np.ndarray = values ^ (values >> np.uint64(31))
    return hashes


Order = np.ndarray | KeyedPermutation  # either gives the examples at places: order[places]


def keyed_order(key: Sequence[int], n: int) -> Order:
    """Return a permutation of n examples, a pure function of the key."""
    if n > LARGEST_PERMUTATION:
        return KeyedPermutation(tuple(key), n)
    return np.random.default_rng(key).permutation(n)


def epoch_order(seed: int, epoch: int, n: int) -> Order:
    """Return the order of n examples in this epoch, a pure function of the arguments."""
    return keyed_order([seed, epoch], n)


def balanced_order(seed: int, epoch: int, classes: np.ndarray) -> np.ndarray:
    """Return the n examples of this epoch, among which all classes are equally frequent, to within one.

    It is a pure function of its arguments. Over the run, the classes take turns: draw t, counted from the first epoch,
    is of class t modulo C; within an epoch the classes are shuffled. A class's examples are read in a new order in each
    cycle through them, so that none is repeated before all others of its class were read.

    classes: (n,) the class of each example; classes without an example are left out. The memory is O(n), at any n.
    """
    n = len(classes)
    present = np.unique(classes)
    draws = np.arange(epoch * n, (epoch + 1) * n)
    turns = np.random.default_rng([seed, epoch, BALANCED_CLASS]).permutation(draws % len(present))
    order = np.empty(n, dtype=np.int64)
    for turn, name in enumerate(present.tolist()):
        places = np.flatnonzero(turns == turn)
        first = (epoch * n - turn + len(present) - 1) // len(present)  # draws of this class in the epochs before
        order[places] = _read_in_cycles(np.flatnonzero(classes == name), [seed, name], first, len(places))
    return order


def _read_in_cycles(members: np.ndarray, key: list[int], first: int, count: int) -> np.ndarray:
    """Return draws `first`, ..., `first + count - 1` from endless cycles through the members, each in a new order.

    The order is that of random numbers. Philox can skip those of the cycles before: it makes four at a time.
    """
    size = len(members)
    cycle, begin = divmod(first, size)
    num_cycles = -(-(begin + count) // size)
    quarter = -(-size // 4)
    generator = np.random.Philox(np.random.SeedSequence([*key, BALANCED_EXAMPLE])).advance(cycle * quarter)
    numbers = generator.random_raw(num_cycles * quarter * 4).reshape(num_cycles, quarter * 4)[:, :size]
    cycles: np.ndarray = members[np.argsort(numbers, axis=1)].ravel()
    return cycles[begin : begin + count]
