"""Texts -> words, and words -> examples with a label at the first token of each word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from tokenizers import Tokenizer

from data.batch import IGNORE_INDEX
from data.examples import TextExamples, count_notes
from data.formats.rows import Row

TEXT = "<text>"  # what else a row has that was a text; no name that a column would have
CHUNK = 20_000  # rows encoded at a time; an encoding holds far more than its ids

# Scripts that are written without spaces, or whose words end in particles: a character is a word there.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


def split_words(text: str) -> list[str]:
    """Runs of letters and digits, and every other character, each with the spaces before it; spaces at the end go.

    In Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese each character is a word. Marks, as accents that are
    characters of their own, belong to what they stand after.
    """
    ends: list[int] = []
    in_word = False  # may the next letter go on?
    for i, character in enumerate(text):
        kind = _kind(character)
        if kind == "space":
            in_word = False
        elif (kind == "mark" and ends and ends[-1] == i) or (kind == "letter" and in_word):
            ends[-1] = i + 1
        else:
            ends.append(i + 1)
            in_word = kind == "letter"
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@cache
def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
        return "mark"
    if (character.isalnum() or character == "_") and not UNSPACED.match(character):
        return "letter"
    return "single"


def word_places(words: Sequence[str]) -> list[tuple[int, int]]:
    """(first character, one after the last) in the text of each of the words it was cut into, without their spaces."""
    ends = np.cumsum([0, *map(len, words)]).tolist()
    return [(end - len(word.lstrip()), end) for word, end in zip(words, ends[1:], strict=True)]


# Rows -> examples


@dataclass(frozen=True)
class Words:
    """The words of N examples, end to end, and where each has its token."""

    offsets: np.ndarray  # (N + 1,) int64: where the words of each example begin
    places: np.ndarray  # (total,) int32: the word's first token in its sequence; -1: it has none
    labels: np.ndarray | None  # (total,) int64: classes
    truncated: int  # number of words that lost their tokens to max_length
    unreadable: int  # number of words that have no token in this tokenizer, like a lone control character
    rows: Sequence[Row]
    column: str  # of the words, in the rows
    entities: bool  # do the tags mark entities?

    @property
    def num_lost(self) -> int:
        """Number of words without a token."""
        return self.truncated + self.unreadable

    def part(self, index: int) -> slice:
        """Return the positions of the words of example `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def encode_tagged(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    text: str,
    label: str = "",
    labels: Sequence[str] = (),
    max_length: int,
    entities: bool = True,
) -> TextExamples[Words]:
    """Encode words one by one, truncated to `max_length` tokens including the special ones.

    A word's label stands at its first token, and IGNORE_INDEX at all others (Devlin et al. 2019, section 5.3). Which tokens
    are a word's, the tokenizer says. label: the column of the tags, or "". Rows have been checked before.
    """
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    places = [np.empty(0, dtype=np.int32)]
    lengths: list[int] = []
    truncated_words = unreadable = truncated = 0
    tokenizer.enable_truncation(max_length)
    for begin in range(0, len(rows), CHUNK):
        chunk = [_inputs(row, text, tokenizer) for row in rows[begin : begin + CHUNK]]
        for words, encoding in zip(chunk, tokenizer.encode_batch(chunk, is_pretokenized=True), strict=True):
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
            types.append(np.asarray(encoding.type_ids, dtype=np.uint8))
            lengths.append(len(encoding.ids))
            places.append(_first_tokens(encoding.word_ids, len(words)))
            beyond = {word for part in encoding.overflowing for word in part.word_ids}
            lost = set(np.flatnonzero(places[-1] < 0).tolist())
            truncated += bool(beyond)
            truncated_words += len(lost & beyond)
            unreadable += len(lost - beyond)
    tokenizer.no_truncation()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    counts = [len(row.values[text]) for row in rows]
    number = {name: i for i, name in enumerate(labels)}
    tags = np.array([number[tag] for row in rows for tag in row.values[label]], dtype=np.int64) if label else None
    record = Words(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        places=np.concatenate(places),
        labels=tags,
        truncated=truncated_words,
        unreadable=unreadable,
        rows=rows,
        column=text,
        entities=entities,
    )
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=offsets,
        labels=None,
        ids=[row.id for row in rows],
        truncated=truncated,
        token_labels=None if tags is None else _at_tokens(record, tags, counts, offsets),
        notes=count_notes(
            (truncated, "text", "truncated to data.max_length"), (record.num_lost, "word", "without a token")
        ),
        record=record,
    )


def _inputs(row: Row, text: str, tokenizer: Tokenizer) -> list[str]:
    """The words as the tokenizer should see them: with one space before them, but for those of a text that have none.

    To a byte-level tokenizer, as RoBERTa's, a word after a space is another one, and a second space would be a token of
    its own. WordPiece's sees no difference. One that does not split texts would take the space for a part of the word.
    """
    words: list[str] = row.values[text]
    if tokenizer.pre_tokenizer is None:
        return [word.lstrip() for word in words]
    if TEXT in row.values:
        return [" " + word.lstrip() if word[0].isspace() else word for word in words]
    return [" " + word for word in words]


def _first_tokens(word_ids: Sequence[int | None], count: int) -> np.ndarray:
    """(count,) the first token of each word, or -1."""
    places = np.full(count, -1, dtype=np.int32)
    for place in range(len(word_ids) - 1, -1, -1):  # backwards, so that the first is written last
        word = word_ids[place]
        if word is not None:
            places[word] = place
    return places


def _at_tokens(words: Words, tags: np.ndarray, counts: Sequence[int], offsets: np.ndarray) -> np.ndarray:
    """(total tokens,) the label of each word at its first token, IGNORE_INDEX elsewhere."""
    labels = np.full(offsets[-1], IGNORE_INDEX, dtype=np.int64)
    kept = words.places >= 0
    labels[(np.repeat(offsets[:-1], counts) + words.places)[kept]] = tags[kept]
    return labels
