"""Texts for a masked language model: some tokens are masked, and the model predicts them from all others.

BERT's masks (Devlin et al. 2019, section 3.1): of the chosen tokens 80% become the mask token, 10% a random token, and
10% stay. Training chooses them anew in each epoch (Liu et al. 2019, "dynamic masking"), by a pure function of the seed,
the epoch and the id of an example: the micro-batch, the rank and the worker make no difference, and a run resumes
without a saved state. Validation and test texts are masked once, by their ids alone, so alike for every seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer

from data.augmentation.text import MASKED, MASKS, add_mask, find_mask_token
from data.batch import IGNORE_INDEX, Batch
from data.causal_lm import find_piece_mark, note_blocks, split_into_blocks
from data.errors import DataError
from data.examples import TextExamples, count_part
from data.loader import ChangedExamples
from data.long_texts import WINDOWS, LongTexts
from data.mapped import MappedExamples
from data.random_streams import MASKED_TOKENS
from data.row import Row
from data.segmentation import RUN, Segment, number_words
from data.text_classification import encode_texts, split_into_chunks
from data.tokenizers.readable import spell
from data.tokenizers.special import find_special_tokens

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens: BERT's


@dataclass(frozen=True)
class MaskedRecord:
    """The mark of examples whose labels are the tokens that were masked."""

    tokenizer: Tokenizer


@dataclass(frozen=True)
class FillRecord:
    """The data with which the masks of texts are filled."""

    tokenizer: Tokenizer
    mask_token_id: int


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and masked."""

    probability: float  # of a token, or of a whole word, to be chosen
    mask_token_id: int
    may_be_chosen: np.ndarray  # (ids,) bool: all tokens but the special ones
    vocabulary: np.ndarray  # (ids,) int64: the tokens of which a random one is taken, in ascending order

    def mask(
        self, ids: np.ndarray, continues: np.ndarray | None, lengths: np.ndarray, keys: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (the ids with masks, the labels), both (T,) int64, of B sequences with T tokens in total.

        continues: (T,) 1 where a token continues the word before it: the tokens of a word are chosen together. None:
        each alone. lengths: (B,) tokens of each sequence. keys: B seeds. At least one token of each sequence is chosen
        (as in BERT's own code), the first by its random number, if any may be.
        """
        draws = [np.random.default_rng(key).random((3, n)) for key, n in zip(keys, lengths.tolist(), strict=True)]
        chooser, kind, choice = np.concatenate([np.empty((3, 0)), *draws], axis=1)
        is_used = lengths > 0
        starts = (np.cumsum(lengths) - lengths)[is_used]
        if continues is not None:  # all tokens of a word have the number of its first one
            begins = continues == 0
            begins[starts] = True
            chooser = chooser[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))]
        chooser = np.where(self.may_be_chosen[ids], chooser, np.inf)
        lowest = np.repeat(np.minimum.reduceat(chooser, starts), lengths[is_used]) if len(starts) else chooser
        is_chosen = (chooser < self.probability) | ((chooser == lowest) & np.isfinite(chooser))
        random_ids = self.vocabulary[(choice * len(self.vocabulary)).astype(np.int64)]
        masked = np.where(kind < MASK_SHARE + RANDOM_SHARE, random_ids, ids)
        masked = np.where(kind < MASK_SHARE, self.mask_token_id, masked)
        return np.where(is_chosen, masked, ids), np.where(is_chosen, ids, IGNORE_INDEX)


def find_masking(tokenizer: Tokenizer, probability: float) -> Masking:
    """Return how the tokens of this tokenizer are masked; DataError where it has no mask token."""
    special = [*find_special_tokens(tokenizer).values()]
    mask_token_id = tokenizer.get_vocab()[_require_mask_token(tokenizer)]
    known = np.unique(np.array([*tokenizer.get_vocab().values(), *special], dtype=np.int64))
    may_be_chosen = np.ones(int(known.max()) + 1, dtype=bool)
    may_be_chosen[[mask_token_id, *special]] = False
    return Masking(probability, mask_token_id, may_be_chosen, known[may_be_chosen[known]])


def _require_mask_token(tokenizer: Tokenizer) -> str:
    token = find_mask_token(tokenizer)
    if not token:
        raise DataError(
            f"the tokenizer has no mask token, {' or '.join(MASKS)}, which a masked language model reads: choose "
            "another model.name, such as a BERT's"
        )
    return token


def key_of(id: str) -> int:
    """Return the number by which an id is part of a seed."""
    return int.from_bytes(hashlib.sha256(id.encode(errors="surrogatepass")).digest()[:8], "little")


def without_masks(examples: TextExamples[Any]) -> TextExamples[Any]:
    """Return the examples with their tokens as they were before any was masked; other examples unchanged."""
    if not isinstance(examples.record, MaskedRecord) or examples.token_labels is None:
        return examples
    ids = np.where(examples.token_labels == IGNORE_INDEX, examples.input_ids, examples.token_labels)
    return replace(examples, input_ids=ids)


@dataclass(frozen=True)
class DynamicallyMasked(ChangedExamples):
    """Training examples with other masks in each epoch; in evaluation they have those that they were encoded with."""

    examples: TextExamples[Any] | MappedExamples
    masking: Masking
    seed: int
    tokenizer: Tokenizer

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the micro-batch of these examples with the masks of `epoch`; those of the encoding for None."""
        batch = self.examples.batch(indices)
        if epoch is None or not len(indices) or batch.input_ids is None:
            return batch
        ids, labels = batch.input_ids.numpy(), batch.required_labels.numpy()
        ids, labels = self.masking.mask(
            np.where(labels == IGNORE_INDEX, ids, labels),  # as they were before they were masked once
            self.examples.find_continued_words(indices),
            np.array(batch.lengths, dtype=np.int64),
            [[self.seed, epoch, key_of(id), MASKED_TOKENS] for id in batch.ids],
        )
        num_targets = int(np.count_nonzero(labels != IGNORE_INDEX))
        return replace(batch, input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels), num_targets=num_targets)


def show_masked(examples: DynamicallyMasked, count: int = 3, epochs: int = 2) -> str:
    """Return the first examples as they are masked in the first epochs."""
    lines = ["masked examples:"]
    for i in range(min(count, len(examples))):
        lines.append(f"  id {examples.ids[i]}")
        for epoch in range(epochs):
            batch = examples.batch([i], epoch)
            ids = [] if batch.input_ids is None else batch.input_ids.tolist()
            lines.append(f"    epoch {epoch}: {spell(ids, examples.tokenizer)}")
    return "\n".join(lines)


# Rows -> examples


def encode_texts_for_mlm(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    column: str = "text",
    max_length: int,
    masking: Masking,
    whole_words: bool = False,
    segment: Segment | None = None,
    concatenate: bool = False,
) -> TextExamples[MaskedRecord]:
    """Return masked examples of at most max_length tokens, whose labels are the tokens that were masked.

    A longer text continues in further examples, with ids `7#2` and so on, each with the special tokens of a text.
    whole_words: the tokens of a word, as the tokenizer splits texts, are masked together. segment: finds the words of
    Chinese and Japanese, where None makes a character a word.
    concatenate: all texts make one, end to end with their special tokens, which is split into blocks of max_length
    tokens (as transformers' run_mlm does). Each text is masked before.
    """
    texts = [str(row.values[column]) for row in rows]
    reading, mark = LongTexts(WINDOWS, max_length), find_piece_mark([row.id for row in rows])
    chunks, ids, num_long, done = list[_Chunk](), list[str](), 0, 0
    tokenizer.no_truncation()
    for part in split_into_chunks(texts):
        encode = tokenizer.encode_batch if whole_words else tokenizer.encode_batch_fast
        chunk = _Chunk.of(
            texts[done : done + len(part)], encode(part), whole_words, segment, None if concatenate else reading
        )
        for row, count in zip(rows[done : done + len(part)], chunk.counts, strict=True):
            ids += [row.id, *(f"{row.id}{mark}{i}" for i in range(2, count + 1))]
        num_long += sum(count > 1 for count in chunk.counts)
        keys = [[key_of(id), MASKED_TOKENS] for id in ids[len(ids) - len(chunk.lengths) :]]
        chunks.append(chunk.masked(masking, keys))
        done += len(part)
    lengths = np.concatenate([np.empty(0, np.int64), *(chunk.lengths for chunk in chunks)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    notes = reading.notes(num_long, len(rows), "texts", len(ids) - len(rows) + num_long, 0, 0)
    if concatenate and len(rows):
        offsets = split_into_blocks(lengths, max_length)
        ids, notes = [f"block {i}" for i in range(1, len(offsets))], note_blocks(offsets, lengths, max_length)
    continues = [chunk.continues for chunk in chunks if chunk.continues is not None]
    return TextExamples(
        input_ids=np.concatenate([np.empty(0, np.int32), *(chunk.ids for chunk in chunks)]).astype(np.int32),
        token_type_ids=np.concatenate([np.empty(0, np.uint8), *(chunk.types for chunk in chunks)]),
        offsets=offsets,
        labels=None,
        token_labels=np.concatenate([np.empty(0, np.int64), *(chunk.labels for chunk in chunks)]),
        continued_words=np.concatenate([np.empty(0, np.uint8), *continues]) if whole_words else None,
        ids=ids,
        truncated=0,
        notes=notes + _note_texts(texts, tokenizer, whole_words and segment is None),
        record=MaskedRecord(tokenizer),
    )


@dataclass(frozen=True)
class _Chunk:
    """Some texts as sequences, all tokens of which stand end to end."""

    ids: np.ndarray  # (T,) int64
    types: np.ndarray  # (T,) uint8
    continues: np.ndarray | None  # (T,) uint8
    lengths: np.ndarray  # (S,) int64
    counts: list[int]  # sequences of each text
    labels: np.ndarray

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        encodings: Sequence[Encoding],
        whole_words: bool,
        segment: Segment | None,
        reading: LongTexts | None,
    ) -> _Chunk:
        """Return the tokens of encoded texts, the longer ones split as `reading` says; None: no text is split."""
        ids, types, continues = [np.empty(0, np.int64)], [np.empty(0, np.uint8)], [np.empty(0, np.uint8)]
        lengths, counts = list[int](), list[int]()
        for text, encoding in zip(texts, encodings, strict=True):
            parts = [np.arange(len(encoding))]
            if reading is not None and len(encoding) > reading.max_length:
                parts = reading.split(np.array([-1 if part is None else part for part in encoding.sequence_ids]))
            continued = find_continued_words(text, encoding, segment) if whole_words else None
            own_ids, own_types = np.array(encoding.ids, np.int64), np.array(encoding.type_ids, np.uint8)
            for part in parts:
                ids.append(own_ids[part])
                types.append(own_types[part])
                lengths.append(len(part))
                continues += [] if continued is None else [continued[part]]
            counts.append(len(parts))
        words = np.concatenate(continues) if whole_words else None
        every = np.concatenate(ids)
        return cls(every, np.concatenate(types), words, np.array(lengths, np.int64), counts, every)

    def masked(self, masking: Masking, keys: Sequence[Sequence[int]]) -> _Chunk:
        """Return the chunk with masks and labels. keys: a seed for each sequence."""
        ids, labels = masking.mask(self.ids, self.continues, self.lengths, keys)
        return replace(self, ids=ids, labels=labels)


def find_continued_words(text: str, encoding: Encoding, segment: Segment | None = None) -> np.ndarray:
    """Return (tokens,) uint8: 1 where a token is of the same word as the token before it.

    A word is one of the tokenizer's, or one that `segment` finds. Special tokens are in no word.
    """
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    continues = np.zeros(len(words), dtype=np.uint8)
    continues[1:] = (words[1:] == words[:-1]) & (words[1:] >= 0)
    if segment is not None:
        begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
        found = np.where(words >= 0, number_words(text, segment)[begins], -1)
        continues[1:] |= (found[1:] == found[:-1]) & (found[1:] >= 0)
    return continues


def _note_texts(texts: Sequence[str], tokenizer: Tokenizer, has_no_segmenter: bool) -> tuple[str, ...]:
    """Return notes on texts with mask tokens of their own, and on those whose words are not known."""
    token = find_mask_token(tokenizer)
    own = sum(token in text for text in texts)
    notes = count_part(own, len(texts), "texts", f"contain {token}, which is no target")
    if has_no_segmenter:
        unspaced = sum(RUN.search(text) is not None for text in texts)
        verb = "have Chinese or Japanese, of which each character is a word: masked_lm.segmenter finds longer ones"
        notes += count_part(unspaced, len(texts), "texts", verb)
    return notes


def encode_texts_to_fill(
    rows: Sequence[Row], tokenizer: Tokenizer, *, column: str = "text", max_length: int
) -> TextExamples[FillRecord]:
    """Encode texts whose mask tokens are to be filled; a longer text is truncated.

    The mask token is read as itself, whatever data.split_special_tokens says of the other special tokens.
    """
    token = _require_mask_token(tokenizer)
    own = Tokenizer.from_str(tokenizer.to_str())
    own.encode_special_tokens = tokenizer.encode_special_tokens
    mask = add_mask(own, token)
    marked = [row.updated({column: row.values[column].replace(token, MASKED)}) for row in rows]
    examples = encode_texts(marked, own, text=column, max_length=max_length)
    without = sum(token not in row.values[column] for row in rows)
    ids = np.where(examples.input_ids == mask.masked_id, mask.token_id, examples.input_ids)
    notes = (*examples.notes, *count_part(without, len(rows), "texts", f"without {token}: nothing is filled there"))
    return examples.with_record(FillRecord(tokenizer, mask.token_id), input_ids=ids.astype(np.int32), notes=notes)
