"""Encoded texts: compact arrays from which packed micro-batches are gathered."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from tokenizers import Tokenizer

from data.batch import IGNORE_INDEX, Batch
from data.notes import warn
from data.tokenizers.readable import spell

FINGERPRINT_CHUNK = 2**20  # elements of an array that are read at a time

RecordT = TypeVar("RecordT")
OtherRecordT = TypeVar("OtherRecordT")


@dataclass(frozen=True)
class TextExamples(Generic[RecordT]):
    """N examples as S sequences of tokens, stored end to end with 4 + 1 bytes per token.

    Usually an example is one sequence. The windows of a long text are several sequences of one example; `sequences`
    then says where those of each example begin. A task has labels of one kind: of each sequence or each example, of
    each token, or a target text.
    """

    input_ids: np.ndarray  # (total,) int32
    token_type_ids: np.ndarray  # (total,) uint8
    offsets: np.ndarray  # (S + 1,) int64: where each sequence begins
    # (N,) int64; (N, C) float32, NaN where there is no target; those of a span, (S, 2) int64, are of each sequence
    labels: np.ndarray | None
    ids: list[str]  # (N,) ids of the examples
    truncated: int  # number of texts that lost tokens to max_length
    token_labels: np.ndarray | None = None  # (total,) int64: what to predict at each token
    continued_words: np.ndarray | None = None  # (total,) uint8: 1 where a token is of the same word as the one before
    markers: np.ndarray | None = None  # (S, 2) int64: tokens that mark the two entities of a relation
    target_ids: np.ndarray | None = None  # (total of the targets,) int32: what a decoder should write
    target_offsets: np.ndarray | None = None  # (S + 1,) int64
    decoder_start_id: int = 0  # the token that a decoder reads first
    sequences: np.ndarray | None = None  # (N + 1,) int64: where the sequences of each example begin; None: one each
    numbers: np.ndarray | None = None  # (N,) int64: of the examples in their file; None: 0, 1, ...
    notes: tuple[str, ...] = ()  # sentences about what was truncated or lost
    cache_note: str = ""  # what data.cache did
    record: RecordT = field(
        default=cast("Any", None)
    )  # what a task evaluates and predicts with; training does not use it

    def with_record(self, record: OtherRecordT, **changes: Any) -> TextExamples[OtherRecordT]:
        """Return a copy with `record`, and with other `changes` of its fields."""
        return cast("TextExamples[OtherRecordT]", replace(self, record=cast("Any", record), **changes))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each example, including its target: its cost."""
        lengths = np.diff(self.offsets)
        if self.target_offsets is not None:
            lengths = lengths + np.diff(self.target_offsets)
        if self.sequences is None:
            return lengths
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(ends[self.sequences])

    @property
    def num_targets(self) -> int:
        """Number of targets of all examples."""
        return count_targets(self._all_labels())

    @property
    def _has_spans(self) -> bool:
        """Whether the labels are spans of the sequences, instead of classes or numbers of the examples."""
        return self.labels is not None and self.labels.ndim == 2 and self.labels.dtype.kind == "i"

    def _all_labels(self) -> np.ndarray | None:
        if self.target_ids is not None:
            return self.target_ids
        return self.labels if self.token_labels is None else self.token_labels

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """Return (num_labels,) the number of targets of each class; None where the labels are not classes."""
        labels = self.labels if self.token_labels is None else self.token_labels
        if labels is None or not num_labels or self.target_ids is not None:
            return None
        if labels.ndim == 1:
            counts: np.ndarray = np.bincount(labels[labels != IGNORE_INDEX], minlength=num_labels)
            return counts
        if labels.dtype.kind == "f" and labels.shape[1] > 1:
            totals: np.ndarray = np.nansum(labels, axis=0).astype(np.int64)
            return totals
        return None

    def fingerprint(self) -> str:
        """Return a checksum that changes with any token, any label, and the order of the examples."""
        digest = hashlib.sha256()
        arrays = (self.input_ids, self.token_type_ids, self.offsets, self.labels, self.token_labels, self.markers)
        more = (self.target_ids, self.target_offsets, self.sequences, self.continued_words)
        for array in (array for array in (*arrays, *more) if array is not None):
            for begin in range(0, len(array), FINGERPRINT_CHUNK):
                digest.update(np.ascontiguousarray(array[begin : begin + FINGERPRINT_CHUNK]).tobytes())
        return digest.hexdigest()[:16]

    def sequence(self, index: int) -> list[int]:
        """Return the token ids of sequence `index`."""
        ids: list[int] = self.input_ids[self.offsets[index] : self.offsets[index + 1]].tolist()
        return ids

    def numbers_of(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers of these examples in their file, of which these examples may be a part."""
        chosen = np.asarray(indices, dtype=np.int64)
        numbers: list[int] = (chosen if self.numbers is None else self.numbers[chosen]).tolist()
        return numbers

    def target(self, index: int) -> list[int]:
        """Return the token ids that a decoder should write for sequence `index`; [] where there is no target."""
        if self.target_ids is None or self.target_offsets is None:
            return []
        ids: list[int] = self.target_ids[self.target_offsets[index] : self.target_offsets[index + 1]].tolist()
        return ids

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the packed micro-batch of these examples, in this order; an empty batch for no indices."""
        chosen = np.asarray(indices, dtype=np.int64)
        sequences, per_example = chosen, None
        if self.sequences is not None:
            sequences, counts = _gather(self.sequences, chosen)
            per_example = tuple(counts.tolist())
        tokens, lengths = _gather(self.offsets, sequences)
        decoder: dict[str, Any] = {}
        if self.token_labels is not None:
            labels: np.ndarray | None = self.token_labels[tokens]
        elif self.target_ids is not None and self.target_offsets is not None:
            targets, target_lengths = _gather(self.target_offsets, sequences)
            labels = self.target_ids[targets].astype(np.int64)
            starts = np.cumsum(target_lengths) - target_lengths
            decoder_input_ids = np.roll(labels, 1)
            decoder_input_ids[starts[target_lengths > 0]] = self.decoder_start_id
            decoder = {
                "decoder_input_ids": torch.from_numpy(decoder_input_ids),
                "decoder_lengths": tuple(target_lengths.tolist()),
                "decoder_cu_seqlens": _cumulative(target_lengths),
            }
        else:
            labels = None if self.labels is None else self.labels[sequences if self._has_spans else chosen]
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

    def find_continued_words(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Return (T,) `continued_words` of the tokens of these examples; None where the words are not known."""
        if self.continued_words is None:
            return None
        tokens, _ = _gather(self.offsets, np.asarray(indices, dtype=np.int64))
        found: np.ndarray = self.continued_words[tokens]
        return found

    def show(self, index: int, tokenizer: Tokenizer, labels: Sequence[str]) -> list[str]:
        """Return lines about example `index`: its id and label, and the tokens and ids of its first sequence."""
        first, count = index, 1
        if self.sequences is not None:
            first = int(self.sequences[index])
            count = int(self.sequences[index + 1]) - first
        head = f"id {self.ids[index]}"
        is_choice = self.labels is not None and self.labels.ndim == 1 and not labels
        if self.labels is not None and is_choice:
            right = int(self.labels[index])
            head, first = f"{head}  the right choice, {right + 1} of {count}", first + right
        elif self.labels is not None and self.labels.ndim == 1:
            head += f"  {labels[self.labels[index]]}"
        elif self.labels is not None:
            head += f"  {self._show_span(first, tokenizer) if self._has_spans else self._show_row(index, labels)}"
        head += f"  first of {count} sequences" if count > 1 and not is_choice else ""
        ids = self.sequence(first)
        tokens = spell(ids, tokenizer)
        if self.token_labels is not None:
            # The target at a token is its class, or, in a language model, the token that follows.
            numbers = self.token_labels[self.offsets[first] : self.offsets[first + 1]].tolist()
            targets = [k for k in numbers if k != IGNORE_INDEX]
            shown = " ".join(labels[k] for k in targets) if labels else spell(targets, tokenizer)
            lines = [head, tokens, f"{ids}", f"{len(targets)} targets: {shown}"]
        else:
            lines = [head, tokens, f"{ids}"]
        if target := self.target(first):
            lines += ["target: " + spell(target, tokenizer), f"{target}"]
        return lines

    def _show_row(self, index: int, labels: Sequence[str]) -> str:
        """Return the names of an example's labels, or its number."""
        row = np.empty(0) if self.labels is None else self.labels[index]
        if len(row) < 2 or len(row) != len(labels):
            return str(row.tolist())
        return ", ".join(labels[k] for k in np.flatnonzero(np.nan_to_num(row)).tolist()) or "no label"

    def _show_span(self, sequence: int, tokenizer: Tokenizer) -> str:
        """Return what a sequence teaches: the tokens of the answer and where they are, none, or an anchor."""
        start, end, *more = [-1, -1] if self.labels is None else self.labels[sequence].tolist()
        if more:  # three numbers of each text of a sentence embedding
            return "the anchor"
        if start < 0:
            return "an answer that is not learned from this window"
        if not end:
            return "no answer in this window"
        answer = spell(self.sequence(sequence)[start : end + 1], tokenizer)
        return f"answer: {answer} ({f'tokens {start} to {end}' if start < end else f'token {start}'})"


def count_targets(labels: np.ndarray | None) -> int:
    """Return the number of labels that are targets.

    Floats: all but NaN. Integers: all but IGNORE_INDEX. A span, (S, 2) integers, is one target.
    """
    if labels is None:
        return 0
    if labels.dtype.kind == "f":
        return int(np.count_nonzero(~np.isnan(labels)))
    return int(np.count_nonzero((labels if labels.ndim == 1 else labels[:, 0]) != IGNORE_INDEX))


def count_notes(*counts: tuple[int, str, str]) -> tuple[str, ...]:
    """Return a note for each (count, noun, what became of them) that is not 0: "2 texts truncated to ..."."""
    return tuple(f"{count:,} {noun}{'' if count == 1 else 's'} {verb}" for count, noun, verb in counts if count)


def count_part(count: int, total: int, nouns: str, verb: str) -> tuple[str, ...]:
    """Return the note "2 of 40 texts are ...", or no note for a count of 0."""
    return (f"{count:,} of {total:,} {nouns} {verb}",) if count else ()


def warn_of_part(count: int, total: int, nouns: str, verb: str) -> tuple[str, ...]:
    """Return the note of count_part, as a warning where the count is a large part."""
    return tuple(warn(count, total, note) for note in count_part(count, total, nouns, verb))


def note_truncated(count: int, total: int, nouns: str, limit: str, lost: int, tokens: int) -> tuple[str, ...]:
    """Return the note "12 of 400 texts truncated to data.max_length = 128, 3.1% of all tokens lost", or none.

    limit: the setting and its value. lost: of the `tokens` that all texts have, those that were lost. A large part of
    them makes it a warning.
    """
    share = lost / max(1, tokens)
    shown = f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
    notes = count_part(count, total, nouns, f"truncated to {limit}, {shown} of all tokens lost")
    return tuple(warn(lost, tokens, note) for note in notes)


def _gather(offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (positions of all elements of the chosen sequences, end to end; number of elements of each)."""
    counts = offsets[chosen + 1] - offsets[chosen]
    begins = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(offsets[chosen] - begins, counts), counts


def _cumulative(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
