"""Encoded texts, held in compact arrays and cut into packed micro-batches without a copy more."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from data.batch import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class TextExamples:
    """N examples in S sequences of tokens, which lie end to end; 4 + 1 bytes a token.

    Usually a sequence is an example. The windows of a long text are several sequences of one, and `sequences` says
    where those of each begin. Labels are of each sequence, of each token, or a text of their own: a task has one kind.
    """

    input_ids: np.ndarray  # (total,) int32
    token_type_ids: np.ndarray  # (total,) uint8
    offsets: np.ndarray  # (S + 1,) int64: where each sequence begins
    labels: np.ndarray | None  # (S,) int64; (S, C) float32, NaN where there is no target; (S, 2) int64 of a span
    ids: list[str]  # of the examples
    truncated: int  # texts that lost tokens to max_length
    token_labels: np.ndarray | None = None  # (total,) int64: what to predict at each token
    markers: np.ndarray | None = None  # (S, 2) int64: where the two entities of a relation are marked
    target_ids: np.ndarray | None = None  # (total of the targets,) int32: what a decoder should write
    target_offsets: np.ndarray | None = None  # (S + 1,) int64
    decoder_start_id: int = 0  # what a decoder reads first
    sequences: np.ndarray | None = None  # (N + 1,) int64: where the sequences of each example begin; None: one each
    extra: dict[str, Any] = field(default_factory=dict)  # what a task measures and predicts with; trains nothing

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) the tokens of each example, its target's too: what it costs."""
        lengths = np.diff(self.offsets)
        if self.target_offsets is not None:
            lengths = lengths + np.diff(self.target_offsets)
        if self.sequences is None:
            return lengths
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(ends[self.sequences])

    @property
    def num_targets(self) -> int:
        """Of all the examples."""
        return count_targets(self._all_labels())

    def _all_labels(self) -> np.ndarray | None:
        if self.target_ids is not None:
            return self.target_ids
        return self.labels if self.token_labels is None else self.token_labels

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """(num_labels,) targets of each class; None where the labels are no classes."""
        labels = self.labels if self.token_labels is None else self.token_labels
        if labels is None or not num_labels or self.target_ids is not None:
            return None
        if labels.ndim == 1:
            return np.bincount(labels[labels != IGNORE_INDEX], minlength=num_labels)
        if labels.dtype.kind == "f" and labels.shape[1] > 1:
            return np.nansum(labels, axis=0).astype(np.int64)
        return None

    def fingerprint(self) -> str:
        """Changes when any token, label or the order of the examples does."""
        digest = hashlib.sha256()
        arrays = (self.input_ids, self.token_type_ids, self.offsets, self.labels, self.token_labels, self.markers)
        for array in (*arrays, self.target_ids, self.target_offsets, self.sequences):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def sequence(self, index: int) -> list[int]:
        """The token ids of sequence `index`."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]].tolist()

    def target(self, index: int) -> list[int]:
        """The token ids that a decoder should write for sequence `index`."""
        if self.target_ids is None or self.target_offsets is None:
            return []
        return self.target_ids[self.target_offsets[index] : self.target_offsets[index + 1]].tolist()

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """The micro-batch of these examples, in this order; an empty one for no indices. Every epoch has the same."""
        chosen = np.asarray(indices, dtype=np.int64)
        sequences, per_example = chosen, None
        if self.sequences is not None:
            sequences, counts = _spread(self.sequences, chosen)
            per_example = tuple(counts.tolist())
        tokens, lengths = _spread(self.offsets, sequences)
        decoder: dict[str, Any] = {}
        if self.token_labels is not None:
            labels: np.ndarray | None = self.token_labels[tokens]
        elif self.target_ids is not None and self.target_offsets is not None:
            places, target_lengths = _spread(self.target_offsets, sequences)
            labels = self.target_ids[places].astype(np.int64)
            starts = np.cumsum(target_lengths) - target_lengths
            read = np.roll(labels, 1)
            read[starts[target_lengths > 0]] = self.decoder_start_id
            decoder = {
                "decoder_input_ids": torch.from_numpy(read),
                "decoder_lengths": tuple(target_lengths.tolist()),
                "decoder_cu_seqlens": _cumulative(target_lengths),
            }
        else:
            labels = None if self.labels is None else self.labels[sequences]
        return Batch(
            input_ids=torch.from_numpy(self.input_ids[tokens].astype(np.int64)),
            token_type_ids=torch.from_numpy(self.token_type_ids[tokens].astype(np.int64)),
            cu_seqlens=_cumulative(lengths),
            lengths=tuple(lengths.tolist()),
            labels=None if labels is None else torch.from_numpy(labels),
            num_targets=count_targets(labels),
            indices=tuple(chosen.tolist()),
            ids=tuple(self.ids[i] for i in chosen),
            markers=None if self.markers is None else torch.from_numpy(self.markers[sequences]),
            sequences=per_example,
            **decoder,
        )

    def show(self, index: int, tokenizer: Tokenizer, labels: Sequence[str]) -> list[str]:
        """Lines on example `index`: its id and label, its tokens and their ids, those of its first sequence."""
        first = index if self.sequences is None else int(self.sequences[index])
        head = f"id {self.ids[index]}"
        if self.labels is not None and self.labels.ndim == 1:
            head += f"  {labels[self.labels[first]]}"
        elif self.labels is not None:
            head += f"  {self.labels[first].tolist()}"
        ids = self.sequence(first)
        tokens = [str(tokenizer.id_to_token(k)) for k in ids]
        if self.token_labels is not None:
            # What is to be predicted at a token: a class of it, or, in a language model, the token that follows.
            of_token = self.token_labels[self.offsets[first] : self.offsets[first + 1]].tolist()
            names = [labels[k] if labels else str(tokenizer.id_to_token(k)) for k in of_token if k != IGNORE_INDEX]
            lines = [head, " ".join(tokens), f"{ids}", f"{len(names)} targets: {' '.join(names)}"]
        else:
            lines = [head, " ".join(tokens), f"{ids}"]
        if target := self.target(first):
            lines += ["target: " + " ".join(str(tokenizer.id_to_token(k)) for k in target), f"{target}"]
        return lines


def count_targets(labels: np.ndarray | None) -> int:
    """The labels that are a target: numbers in floats; in integers all but IGNORE_INDEX, and of a span, (S, 2), the pair."""
    if labels is None:
        return 0
    if labels.dtype.kind == "f":
        return int(np.count_nonzero(~np.isnan(labels)))
    return int(np.count_nonzero((labels if labels.ndim == 1 else labels[:, 0]) != IGNORE_INDEX))


def _spread(offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the places that the chosen units hold, end to end; how many each holds): one gather, no loop over units."""
    counts = offsets[chosen + 1] - offsets[chosen]
    begins = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(offsets[chosen] - begins, counts), counts


def _cumulative(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
