"""Which examples an optimizer step sees, and how they are cut into micro-batches for the ranks.

Two separate questions, answered in this order:
1. The recipe: step s sees `batch_size` examples of a permutation that is a pure function of (seed, epoch).
2. The machine: those examples are dealt to the ranks and cut into micro-batches that fit. This cannot change the loss.

Nothing is stored to resume: the next step is a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import Batch


class Examples(Protocol):
    """An encoded data set: of texts (data/examples.py), of images (data/image_classification.py), or augmented (data/augmentation/text.py).

    epoch: of training; a data set that is augmented gives other examples in each. None: the examples as they are.
    """

    @property
    def ids(self) -> list[str]: ...
    @property
    def truncated(self) -> int: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def extra(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch: ...
    def fingerprint(self) -> str: ...
    def label_counts(self, num_labels: int) -> np.ndarray | None: ...
    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True)
class MicroBatching:
    """How the machine cuts a step. Give the limit of one micro-batch as a number of examples or as tokens (0: none)."""

    examples: int = 0
    tokens: int = 0
    rank: int = 0
    world_size: int = 1


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of n examples in this epoch; a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The last step of an epoch takes what is left, normalised by its own targets."""
    return math.ceil(n / batch_size)


def cut(indices: np.ndarray, lengths: np.ndarray, how: MicroBatching) -> list[np.ndarray]:
    """This rank's micro-batches of a step, the same number on every rank (some may be empty).

    Examples are sorted by length and dealt like cards, so that ranks have equal work; neighbours in length then share a
    micro-batch, so that attention runs over equal lengths. indices: the examples of the step; lengths: of the data set.
    """
    by_length = indices[np.argsort(lengths[indices], kind="stable")]
    shares = [by_length[rank :: how.world_size] for rank in range(how.world_size)]
    if how.tokens:
        all_cuts = [_cut_by_tokens(share, lengths, how.tokens) for share in shares]
        count = max(len(parts) for parts in all_cuts)
        return all_cuts[how.rank] + [indices[:0]] * (count - len(all_cuts[how.rank]))
    largest = len(shares[0])
    count = math.ceil(largest / how.examples) if how.examples else 1
    return np.array_split(shares[how.rank], count)


def _cut_by_tokens(share: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Greedy runs of at most `budget` tokens; a longer example stands alone. At least one run, perhaps empty."""
    parts: list[list[int]] = [[]]
    used = 0
    for index in share:
        if parts[-1] and used + lengths[index] > budget:
            parts.append([])
            used = 0
        parts[-1].append(int(index))
        used += int(lengths[index])
    return [np.array(part, dtype=np.int64) for part in parts]


class _Steps(Dataset[list[Batch]]):
    """Item s: this rank's micro-batches of step s. Any worker can make any step, since nothing is remembered."""

    def __init__(self, examples: Examples, batch_size: int, seed: int, how: MicroBatching):
        self.examples, self.batch_size, self.seed, self.how = examples, batch_size, seed, how
        self.lengths = examples.lengths
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, place = divmod(step, steps_per_epoch(len(self.examples), self.batch_size))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(self.seed, epoch, len(self.examples))
        chosen = self.order[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.examples.batch(part, epoch) for part in cut(chosen, self.lengths, self.how)]


def training_steps(
    examples: Examples,
    batch_size: int,
    seed: int,
    how: MicroBatching,
    *,
    start: int = 0,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[list[Batch]]:
    """Steps `start`, `start + 1`, ... without end, each as this rank's list of micro-batches.

    The examples are in memory and cutting a step takes well under a millisecond, so `workers = 0` is the fast path;
    worker processes pay off when making an example is dear (image decoding, augmentation).
    """
    endless = range(start, 2**62)
    steps = _Steps(examples, batch_size, seed, how)
    yield from DataLoader(
        steps, sampler=endless, batch_size=None, num_workers=workers, pin_memory=pin, generator=torch.Generator()
    )


def evaluation_batches(examples: Examples, how: MicroBatching) -> list[np.ndarray]:
    """This rank's micro-batches of a pass over everything: each example on exactly one rank, once.

    Sorted by length and dealt to the ranks; no collective happens inside the pass, so counts may differ.
    """
    lengths = examples.lengths
    by_length = np.argsort(lengths, kind="stable")[how.rank :: how.world_size]
    if how.tokens:
        parts = _cut_by_tokens(by_length, lengths, how.tokens)
    else:
        size = how.examples or max(1, len(by_length))
        parts = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    return [part for part in parts if len(part)]
