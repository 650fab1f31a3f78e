"""The examples of each optimizer step, and their split into micro-batches for the ranks.

Two separate decisions, in this order:
1. The recipe: step s takes `global_batch_size` examples of an order that is a pure function of (seed, epoch).
2. The machine: these examples are distributed to the ranks and split into micro-batches that fit. This cannot change
   the loss.

No loader state is saved to resume: the number of the next step is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import workers
from data.batch import Batch
from data.lengths import Lengths, all_lengths
from data.order import Order, balanced_order, epoch_order


class Examples(Protocol):
    """An encoded data set: texts (data/examples.py), images (data/image_classification.py), or augmented texts.

    ids, lengths: (N,). Those of a set that is larger than memory are read where an index asks for them. Training asks
    for the examples of a step; evaluation, and the search for the largest micro-batch, ask for all lengths.
    notes: sentences about what was truncated, lost or repaired.
    epoch: the epoch of training, for which an augmented data set makes other examples; None: without augmentation.
    """

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def truncated(self) -> int: ...
    @property
    def lengths(self) -> Lengths: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch: ...
    def fingerprint(self) -> str: ...
    def label_counts(self, num_labels: int) -> np.ndarray | None: ...
    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True)
class ChangedExamples:
    """The base of data sets whose training batches differ from epoch to epoch: all else is that of `examples`."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> Sequence[str]:
        return self.examples.ids

    @property
    def truncated(self) -> int:
        return self.examples.truncated

    @property
    def lengths(self) -> Lengths:
        """Lengths of the unchanged examples: a step is split before its examples are changed."""
        return self.examples.lengths

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.examples.notes)

    @property
    def cache_note(self) -> str:
        return str(getattr(self.examples, "cache_note", ""))

    def fingerprint(self) -> str:
        return self.examples.fingerprint()

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        return self.examples.label_counts(num_labels)

    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]:
        return self.examples.show(index, processor, labels)


@dataclass(frozen=True)
class MicroBatching:
    """The limits of a micro-batch (0: no limit; set at most one of the two), and the rank."""

    max_examples: int = 0
    max_tokens: int = 0
    rank: int = 0
    world_size: int = 1


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Return the number of steps; the last one takes the remaining examples and is normalised by its own targets."""
    return math.ceil(n / global_batch_size)


def split_into_micro_batches(indices: np.ndarray, lengths: Lengths, limits: MicroBatching) -> list[np.ndarray]:
    """Return this rank's micro-batches of a step: the same number on every rank, some perhaps empty.

    The examples are sorted by length and distributed in turn, so that the ranks have equal work. Neighbours in length
    share a micro-batch, so that attention runs over equal lengths.

    indices: the examples of the step; lengths: (N,) those of the whole data set.
    """
    by_length = indices[np.argsort(lengths[indices], kind="stable")]
    shares = [by_length[rank :: limits.world_size] for rank in range(limits.world_size)]
    if limits.max_tokens:
        by_rank = [_split_by_tokens(share, lengths, limits.max_tokens) for share in shares]
        count = max(len(micro_batches) for micro_batches in by_rank)
        return by_rank[limits.rank] + [indices[:0]] * (count - len(by_rank[limits.rank]))
    largest = len(shares[0])
    count = math.ceil(largest / limits.max_examples) if limits.max_examples else 1
    return np.array_split(shares[limits.rank], count)


def _split_by_tokens(share: np.ndarray, lengths: Lengths, max_tokens: int) -> list[np.ndarray]:
    """Split greedily into one or more runs of at most `max_tokens`; a longer example is a run of its own."""
    runs: list[list[int]] = [[]]
    used = 0
    for index, length in zip(share.tolist(), lengths[share].tolist(), strict=True):
        if runs[-1] and used + length > max_tokens:
            runs.append([])
            used = 0
        runs[-1].append(index)
        used += length
    return [np.array(run, dtype=np.int64) for run in runs]


class _Steps(Dataset[list[Batch]]):
    """A data set whose item s is this rank's micro-batches of step s; it has no state, so any worker makes any step."""

    def __init__(
        self,
        examples: Examples,
        global_batch_size: int,
        seed: int,
        limits: MicroBatching,
        classes: np.ndarray | None,
    ):
        self.examples, self.global_batch_size, self.seed, self.limits = examples, global_batch_size, seed, limits
        self.classes = classes
        self.lengths = examples.lengths
        self.epoch, self.order = -1, epoch_order(seed, 0, 0)

    def __getitem__(self, step: int) -> Any:
        """Return the micro-batches; in a worker, an exception is returned too."""
        workers.note_step(step)
        made = workers.return_failures(lambda: self._make(step))
        workers.note_step(workers.NONE)
        return made

    def _make(self, step: int) -> list[Batch]:
        n, size = len(self.examples), self.global_batch_size
        epoch, position = divmod(step, steps_per_epoch(n, size))
        order = self._order_of(epoch)
        chosen = order[np.arange(position * size, min((position + 1) * size, n))]
        micro_batches = split_into_micro_batches(chosen, self.lengths, self.limits)
        return [self._read(indices, epoch) for indices in micro_batches]

    def _order_of(self, epoch: int) -> Order:
        if epoch != self.epoch:
            self.epoch = epoch
            if self.classes is None:
                self.order = epoch_order(self.seed, epoch, len(self.examples))
            else:
                self.order = balanced_order(self.seed, epoch, self.classes)
        return self.order

    def _read(self, indices: np.ndarray, epoch: int) -> Batch:
        if len(indices):
            workers.note_example(int(indices[0]))  # at least; data sets that read files note each example
        return self.examples.batch(indices, epoch)


def training_steps(
    examples: Examples,
    global_batch_size: int,
    seed: int,
    limits: MicroBatching,
    *,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    classes: np.ndarray | None = None,
    timeout_seconds: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[Batch]]:
    """Yield steps `start`, `start + 1`, ... without end, each as this rank's list of micro-batches.

    classes: (N,) the class of each example, all of which are then drawn equally often; None: each example once.
    timeout_seconds, should_stop: when to end a wait for data, with the errors of data/workers.py.

    `num_workers = 0` is the fast path for texts: they are in memory, and a step takes well under a millisecond to make.
    Worker processes pay off where examples are expensive to make (image decoding, augmentation).
    """
    endless = range(start, 2**62)
    steps = _Steps(examples, global_batch_size, seed, limits, classes)
    loader = DataLoader(
        steps,
        sampler=endless,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    yield from workers.read_steps(loader, start, examples.ids, timeout_seconds, should_stop)


def evaluation_batches(examples: Examples, limits: MicroBatching) -> list[np.ndarray]:
    """Return this rank's micro-batches of a pass over all examples: each example on exactly one rank, once.

    The examples are sorted by length and distributed in turn. The pass has no collectives, so counts may differ. It
    needs all lengths in memory: some 40 bytes an example while they are sorted, 4 GB for 100 million.
    """
    lengths = all_lengths(examples.lengths)
    by_length = np.argsort(lengths, kind="stable")[limits.rank :: limits.world_size]
    if limits.max_tokens:
        micro_batches = _split_by_tokens(by_length, lengths, limits.max_tokens)
    else:
        size = limits.max_examples or max(1, len(by_length))
        micro_batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    return [indices for indices in micro_batches if len(indices)]
