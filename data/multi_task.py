"""The examples of several tasks as one data set: a micro-batch has examples of any of them, one task after another.

The loss of a step is a mean over its targets in which those of a task k count f_k:

    sum over the targets of f_k * loss  /  sum over the targets of f_k        f_k = w_k * examples_k / targets_k

with its weight w_k and the examples and targets of its training set. So on average an example of every task counts its
weight, however many targets it has: a sentence of thirty tags as much as a review with one class. It is a function of
the examples of the step alone, so the split into micro-batches and ranks does not change it. All f_k together may be
multiplied by any number; the smallest one is 1 here, so that a single task has exactly its own loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.cache import notes_of
from data.errors import DataError
from data.lengths import Lengths, all_lengths
from data.loader import Examples


@dataclass(frozen=True)
class MultiTaskBatch(Batch):
    """A packed micro-batch with the examples of several tasks, one task after another; the labels are in its parts.

    `num_targets` counts those of all tasks alike, `weighted_targets` each as often as it counts.
    """

    parts: tuple[Batch, ...] = ()  # that of each task, perhaps empty
    counts: tuple[int, ...] = ()  # sequences of each task
    factors: tuple[float, ...] = ()  # of the losses and the targets of each task

    @property
    def weighted_targets(self) -> float:
        """The sum over the tasks of factor * number of targets."""
        return sum(factor * part.num_targets for factor, part in zip(self.factors, self.parts, strict=True))

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), *(tensor for part in self.parts for tensor in part._tensors())]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        mapped: Any = super()._map(function)
        batch: Batch = replace(mapped, parts=tuple(part._map(function) for part in self.parts))
        return batch


@dataclass(frozen=True)
class MultiTaskExamples:
    """The examples of the tasks {name: examples}, one task after another; ids are "name/id"."""

    parts: Mapping[str, Examples]
    factors: tuple[float, ...]

    @property
    def _starts(self) -> np.ndarray:
        """(tasks + 1,) where the examples of each task begin."""
        starts: np.ndarray = np.cumsum([0, *(len(examples) for examples in self.parts.values())])
        return starts

    def __len__(self) -> int:
        return sum(len(examples) for examples in self.parts.values())

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"{name}/{id}" for name, examples in self.parts.items() for id in examples.ids]

    @property
    def truncated(self) -> int:
        return sum(examples.truncated for examples in self.parts.values())

    @cached_property
    def lengths(self) -> Lengths:
        found = [all_lengths(examples.lengths) for examples in self.parts.values()]
        lengths: np.ndarray = np.concatenate([np.empty(0, np.int64), *found])
        return lengths

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{name}: {note}" for name, examples in self.parts.items() for note in notes_of(examples))

    def fingerprint(self) -> str:
        """Return a checksum of all examples and of how much each task counts."""
        parts = [(name, examples.fingerprint()) for name, examples in self.parts.items()]
        return hashlib.sha256(repr((parts, self.factors)).encode()).hexdigest()[:16]

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """Return None: the labels are those of the parts."""
        return None

    def show(self, index: int, processor: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
        """Return lines about example `index`. processor, labels: of all tasks; labels are "name/label"."""
        starts = self._starts
        place = int(np.searchsorted(starts, index, side="right")) - 1
        name = [*self.parts][place]
        lines = self.parts[name].show(int(index - starts[place]), processor[name], labels_of(name, labels))
        return [f"{name}: {lines[0]}", *lines[1:]]

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the packed micro-batch of these examples: task after task, those of each in this order."""
        chosen, starts = np.asarray(indices, dtype=np.int64), self._starts
        parts, order = [], list[np.ndarray]()
        for i, examples in enumerate(self.parts.values()):
            own = chosen[(chosen >= starts[i]) & (chosen < starts[i + 1])]
            parts.append(examples.batch(own - starts[i], epoch))
            order.append(own)
        lengths = tuple(length for part in parts for length in part.lengths)
        is_image = parts[0].pixel_values is not None
        ids = tuple(f"{name}/{id}" for name, part in zip(self.parts, parts, strict=True) for id in part.ids)
        return MultiTaskBatch(
            lengths=lengths,
            cu_seqlens=torch.tensor([0, *np.cumsum(lengths, dtype=np.int64)], dtype=torch.int32),
            labels=None,
            num_targets=sum(part.num_targets for part in parts),
            indices=tuple(np.concatenate(order).tolist()),
            ids=ids,
            input_ids=_concatenate([part.input_ids for part in parts]),
            token_type_ids=_concatenate([part.token_type_ids for part in parts]),
            pixel_values=_concatenate([part.pixel_values for part in parts]),
            image_tokens=sum(part.image_tokens for part in parts),
            parts=tuple(replace(part, pixel_values=None) for part in parts),
            counts=tuple(len(part.ids if is_image else part.lengths) for part in parts),
            factors=self.factors,
        )


def join_examples(parts: Mapping[str, Examples], weights: Sequence[float]) -> MultiTaskExamples:
    """Return the examples of the tasks {name: examples} as one data set; weights: how much an example of each counts.

    Raises DataError for a task without any target. Where there are no examples, as of a file that is not given, its
    targets count nothing.
    """
    factors = []
    for (name, examples), weight in zip(parts.items(), weights, strict=True):
        count = count_all_targets(examples)
        if len(examples) and not count:
            raise DataError(f"{name}: none of its {len(examples):,} examples has a target to learn")
        factors.append(weight * len(examples) / max(1, count))
    smallest = min((factor for factor in factors if factor), default=1.0)
    return MultiTaskExamples(parts, tuple(factor / smallest for factor in factors))


def count_all_targets(examples: Any) -> int:
    """Return the targets of all examples as they were encoded; augmentation changes few of them."""
    known = getattr(examples, "num_targets", None)
    inner = getattr(examples, "examples", None)
    if known is None and inner is not None:
        return count_all_targets(inner)
    if known is None:  # such as images, of which a batch would read the files: each has one class
        return len(examples)
    return int(known)


def labels_of(name: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of one task among those of all, which are "name/label"."""
    return tuple(label.removeprefix(f"{name}/") for label in labels if label.startswith(f"{name}/"))


def join_labels(labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the labels of all tasks as "name/label", from those of each."""
    return [f"{name}/{label}" for name, own in labels.items() for label in own]


def _concatenate(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    filled = [tensor for tensor in present if len(tensor)]  # images that are not there have no size either
    return torch.cat(filled) if filled else next(iter(present), None)
