"""Texts for the span corruption of T5: spans of tokens are cut out, and the model writes them.

As in T5's own code (Raffel et al. 2020, section 3.1.4): the number of tokens that are cut out and of their spans is
a function of the length of a text, and where the spans begin is random. Each span becomes a sentinel in the source; the
target has each sentinel and what stood there. So the lengths of source and target do not depend on the draws.

Training cuts out others in each epoch, by a pure function of the seed, the epoch and the id of an example; validation
and test texts are cut once, by their ids alone (data/masked_lm.py does the same with masks).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.batch import Batch
from data.causal_lm import find_piece_mark, note_blocks, split_into_blocks
from data.errors import DataError
from data.examples import TextExamples, count_part, note_truncated
from data.loader import ChangedExamples
from data.mapped import MappedExamples
from data.masked_lm import key_of
from data.random_streams import CORRUPTED_SPANS
from data.row import Row
from data.seq2seq import PairTokenizer
from data.text_classification import split_into_chunks
from data.tokenizers.readable import spell

SENTINEL = re.compile(r"<extra_id_(\d+)>")
Pair = tuple[np.ndarray, np.ndarray]  # the ids of a source and of its target


@dataclass(frozen=True)
class SpanRecord:
    """The mark of examples whose targets are the spans that were cut out, or are to be written."""

    tokenizer: Tokenizer


@dataclass(frozen=True)
class Corruption:
    """How spans of a text are cut out."""

    noise_density: float  # share of the tokens that are cut out
    mean_span_length: float
    sentinels: np.ndarray  # (spans,) ids, that of <extra_id_0> first
    end_id: int

    def count_spans(self, length: int) -> tuple[int, int]:
        """Return (tokens that are cut out, spans) of a text of `length` tokens; at least one token stays."""
        length = max(length, 2)
        num_noise = min(max(round(length * self.noise_density), 1), length - 1)
        return num_noise, min(max(round(num_noise / self.mean_span_length), 1), length - num_noise, num_noise)

    def check_sentinels(self, longest: int) -> None:
        """Raise DataError where a text of `longest` tokens has more spans than there are sentinels."""
        needed, known = self.count_spans(longest)[1], len(self.sentinels)
        if needed > known:
            raise DataError(
                f"a text of {longest:,} tokens makes {needed:,} spans, and the tokenizer has {known} sentinels: lower "
                "data.max_length, or raise span_corruption.mean_span_length"
            )

    def draw_mask(self, length: int, key: Sequence[int]) -> np.ndarray:
        """Return (length,) bool: the tokens that are cut out. Spans that stay and spans that do not take turns.

        A text of one token stays whole, as in T5's code.
        """
        generator = np.random.default_rng(key)
        num_noise, num_spans = self.count_spans(length)
        removed = _split_randomly(num_noise, num_spans, generator)
        kept = _split_randomly(max(length, 2) - num_noise, num_spans, generator)
        is_cut = np.tile([False, True], num_spans)
        return np.repeat(is_cut, np.stack([kept, removed], 1).flatten())[:length]

    def corrupt(self, ids: np.ndarray, key: Sequence[int]) -> Pair:
        """Return the source and the target of a text, each with the end token."""
        if not len(ids):
            return np.array([self.end_id]), np.array([self.end_id])
        is_cut = self.draw_mask(len(ids), key)
        return self._replace_spans(ids, is_cut), self._replace_spans(ids, ~is_cut)

    def restore(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return the text of a source and its target: the inverse of `corrupt`."""
        source, target = source[:-1], target[:-1]
        places = np.flatnonzero(np.isin(source, self.sentinels))
        spans = np.split(target, np.flatnonzero(np.isin(target, self.sentinels)))[1:]
        pieces = np.split(source, np.stack([places, places + 1], 1).flatten())
        pieces[1::2] = [span[1:] for span in spans[: len(places)]]
        return np.concatenate(pieces)

    def _replace_spans(self, ids: np.ndarray, is_hidden: np.ndarray) -> np.ndarray:
        """Return the ids with a sentinel in the place of each hidden span, and the end token."""
        begins = is_hidden & ~np.concatenate([[False], is_hidden[:-1]])
        numbers = np.maximum(np.cumsum(begins) - 1, 0)
        replaced = np.where(begins, self.sentinels[numbers], ids)
        return np.append(replaced[begins | ~is_hidden], self.end_id)


def _split_randomly(count: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Return (parts,) int64 from 1 with the sum `count`: each way to split has the same probability."""
    borders = np.sort(generator.choice(count - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], borders, [count]]))


def find_corruption(tokenizer: Tokenizer, noise_density: float, mean_span_length: float) -> Corruption:
    """Return how spans are cut out of texts; DataError where the tokenizer has no sentinels for them."""
    found = {int(m[1]): i for token, i in tokenizer.get_vocab().items() if (m := SENTINEL.fullmatch(token))}
    sentinels = [found[k] for k in range(len(found)) if k in found]
    if not sentinels or len(sentinels) < len(found):
        raise DataError(
            "the tokenizer has no sentinels <extra_id_0>, <extra_id_1>, ..., which replace the spans that are cut out: "
            "choose another model.name, such as a T5's"
        )
    return Corruption(noise_density, mean_span_length, np.array(sentinels), tokenizer.encode("a").ids[-1])


@dataclass(frozen=True)
class DynamicallyCorrupted(ChangedExamples):
    """Training examples with other spans cut out in each epoch; in evaluation those of the encoding."""

    examples: TextExamples[Any] | MappedExamples
    corruption: Corruption
    seed: int
    tokenizer: Tokenizer

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the micro-batch of these examples with the spans of `epoch`; those of the encoding for None."""
        batch = self.examples.batch(indices)
        if epoch is None or not len(indices) or batch.input_ids is None or batch.decoder_input_ids is None:
            return batch
        start = int(batch.decoder_input_ids[0])
        sources, targets = (
            np.split(ids.numpy(), np.cumsum(lengths)[:-1])
            for ids, lengths in (
                (batch.input_ids, batch.lengths),
                (batch.required_labels, batch.decoder_lengths),
            )
        )
        pairs = [
            self.corruption.corrupt(
                self.corruption.restore(source, target), [self.seed, epoch, key_of(id), CORRUPTED_SPANS]
            )
            for source, target, id in zip(sources, targets, batch.ids, strict=True)
        ]
        changed = make_examples(pairs, list(batch.ids), start, self.tokenizer).batch(range(len(pairs)))
        return replace(changed, indices=batch.indices)


def show_corrupted(examples: DynamicallyCorrupted, count: int = 3, epochs: int = 2) -> str:
    """Return the sources and targets of the first examples in the first epochs."""
    lines = ["texts with spans cut out:"]
    for i in range(min(count, len(examples))):
        lines.append(f"  id {examples.ids[i]}")
        for epoch in range(epochs):
            batch = examples.batch([i], epoch)
            for name, ids in (("source", batch.input_ids), ("target", batch.labels)):
                tokens = "" if ids is None else spell(ids.tolist(), examples.tokenizer)
                lines.append(f"    epoch {epoch} {name}: {tokens}")
    return "\n".join(lines)


def with_spans(examples: TextExamples[Any]) -> TextExamples[Any]:
    """Return the examples with the tokens of their targets behind those of their sources; others unchanged."""
    if not isinstance(examples.record, SpanRecord) or examples.target_ids is None or examples.target_offsets is None:
        return examples
    sources = np.split(examples.input_ids, examples.offsets[1:-1])
    targets = np.split(examples.target_ids, examples.target_offsets[1:-1])
    pairs = zip(sources, targets, strict=True)
    ids, offsets = _concatenate([np.concatenate(pair) for pair in pairs][: len(examples)])
    return replace(examples, input_ids=ids, token_type_ids=np.zeros(len(ids), np.uint8), offsets=offsets)


# Rows -> examples


def make_examples(
    pairs: Sequence[Pair], ids: list[str], decoder_start_id: int, tokenizer: Tokenizer, notes: tuple[str, ...] = ()
) -> TextExamples[SpanRecord]:
    """Return examples of sources and targets."""
    (sources, offsets), (targets, target_offsets) = (_concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return TextExamples(
        input_ids=sources,
        token_type_ids=np.zeros(len(sources), np.uint8),
        offsets=offsets,
        labels=None,
        ids=ids,
        truncated=0,
        target_ids=targets,
        target_offsets=target_offsets,
        decoder_start_id=decoder_start_id,
        notes=notes,
        record=SpanRecord(tokenizer),
    )


def _concatenate(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (all ids end to end, where each part begins and the last one ends)."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int32), offsets


def encode_texts_for_spans(
    rows: Sequence[Row],
    processor: PairTokenizer,
    *,
    column: str,
    max_length: int,
    corruption: Corruption,
    concatenate: bool = False,
) -> TextExamples[SpanRecord]:
    """Return examples of texts of at most max_length tokens, the end token included, with spans cut out by their ids.

    A longer text continues in further examples, with ids `7#2` and so on.
    concatenate: all texts make one, end to end with their end tokens, which is split into blocks.
    """
    tokenizer = processor.tokenizer
    tokenizer.no_truncation()
    texts, ids, num_own, num_long = list[np.ndarray](), list[str](), 0, 0
    mark, size = find_piece_mark([row.id for row in rows]), max_length - 1
    for part in split_into_chunks([str(row.values[column]) for row in rows]):
        for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False):
            own = np.array(encoding.ids, np.int64)
            is_sentinel = np.isin(own, corruption.sentinels)
            num_own += bool(is_sentinel.any())
            texts.append(own[~is_sentinel])
    if concatenate and rows:
        texts = [np.append(text, corruption.end_id) for text in texts]
        lengths = np.array([len(text) for text in texts])
        borders = split_into_blocks(lengths, size)
        pieces = np.split(np.concatenate(texts), borders[1:-1])
        ids = [f"block {i}" for i in range(1, len(borders))]
        notes = note_blocks(borders, lengths, size, f"{size} tokens, which the end token makes data.max_length")
    else:
        pieces = []
        for row, text in zip(rows, texts, strict=True):
            own_pieces = np.split(text, range(size, len(text), size))
            num_long += len(own_pieces) > 1
            pieces += own_pieces
            ids += [row.id, *(f"{row.id}{mark}{i}" for i in range(2, len(own_pieces) + 1))]
        verb = f"are longer than data.max_length = {max_length} and continue in further examples, {len(ids):,} in all"
        notes = count_part(num_long, len(rows), "texts", verb)
    notes += count_part(num_own, len(rows), "texts", "contain sentinels of their own, which are left out")
    corruption.check_sentinels(max(map(len, pieces), default=0))
    pairs = [corruption.corrupt(p, [key_of(id), CORRUPTED_SPANS]) for p, id in zip(pieces, ids, strict=True)]
    return make_examples(pairs, ids, processor.decoder_start_id, tokenizer, tuple(notes))


def encode_texts_with_sentinels(
    rows: Sequence[Row], processor: PairTokenizer, *, column: str, max_length: int, corruption: Corruption
) -> TextExamples[SpanRecord]:
    """Encode texts whose sentinels are to be replaced by spans; a longer text is truncated.

    A sentinel is read as itself, whatever data.split_special_tokens says of the other special tokens.
    """
    tokenizer = processor.tokenizer
    sentinel = {f"<extra_id_{k}>": i for k, i in enumerate(corruption.sentinels.tolist())}
    pattern = re.compile(f"({'|'.join(map(re.escape, sentinel))})")
    sources, without, num_truncated, lost, total = list[np.ndarray](), 0, 0, 0, 0
    for row in rows:
        parts = pattern.split(row.values[column])
        without += len(parts) == 1
        ids = list[int]()
        for part in parts:
            ids += [sentinel[part]] if part in sentinel else tokenizer.encode(part, add_special_tokens=False).ids
        total += len(ids) + 1
        num_truncated += len(ids) >= max_length
        lost += max(0, len(ids) + 1 - max_length)
        sources.append(np.array([*ids[: max_length - 1], corruption.end_id]))
    notes = note_truncated(num_truncated, len(rows), "texts", f"data.max_length = {max_length}", lost, total)
    notes += count_part(without, len(rows), "texts", "without <extra_id_0>: nothing is filled there")
    examples = make_examples([(s, s[:0]) for s in sources], [row.id for row in rows], 0, tokenizer, notes)
    return replace(examples, target_ids=None, target_offsets=None, truncated=num_truncated)


def fill_spans(
    source: Sequence[int], written: Sequence[int], sentinels: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """Return (the source with its sentinels replaced by what was written for them, these spans).

    written: sentinels, each with its span behind it. A sentinel that was not written has an empty span, and of one that
    was written twice the first span counts. The end token is one like any other, which decoding leaves out.
    """
    known, spans, current = {*sentinels}, dict[int, list[int]](), list[int]()
    for token in written:
        if token in known:
            current = []
            spans.setdefault(token, current)
        else:
            current.append(token)
    found = [spans.get(token, []) for token in source if token in known]
    filled = [token for own in source for token in (spans.get(own, []) if own in known else [own])]
    return filled, found
