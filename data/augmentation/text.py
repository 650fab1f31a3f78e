"""Augmentation of training texts: rows -> changed rows -> the task's own encoding, anew in every epoch.

The change of an example is a pure function of (seed, epoch, id). So a run resumes without a saved state, and the result
does not depend on the worker, the rank or the micro-batch.

A word is a run between spaces; in Chinese and Japanese, which have no spaces, it is a character. Two kinds of change:
- of single words (synonyms, masks): every position can be mapped to the new text;
- of the order or number of words (swap, delete, crop, fill): only labels of the whole text stay valid.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from torch.utils.data import get_worker_info

from data.augmentation.tables import WORD, entry_key
from data.batch import Batch
from data.lengths import all_lengths
from data.loader import ChangedExamples, Examples
from data.row import Row
from data.scripts import KANA_AND_HAN
from data.workers import note_example

MASKS = ("[MASK]", "<mask>")  # BERT; RoBERTa
MASKED = "\U0010fffd"  # a masked word in a changed text: a character for private use, since "[MASK]" in a text is text

Change = Callable[[Row, np.random.Generator], Row]
Span = tuple[int, int]  # (first character, one after the last)
Edit = tuple[int, int, str]  # (first character, one after the last, the new text)


@dataclass(frozen=True)
class Mask:
    """The mask token of a tokenizer, and the id by which the tokenizer encodes MASKED."""

    token: str
    token_id: int
    masked_id: int


@dataclass(frozen=True)
class Augmented(ChangedExamples):
    """A data set whose training batches are augmented; in evaluation it equals `examples`."""

    rows: Sequence[Row]  # the rows of the examples, in their order
    encode: Callable[[list[Row]], Examples]
    change: Change
    seed: int
    files: str = ""  # checksum of the files that the changes were read from
    mask: Mask | None = None  # how MASKED is encoded; None: no word is masked

    def fingerprint(self) -> str:
        """Return a checksum of the examples and of the files with changes; all else is in the recipe."""
        own = self.examples.fingerprint()
        return hashlib.sha256((own + self.files).encode()).hexdigest()[:16] if self.files else own

    def changed(self, index: int, epoch: int) -> Row:
        """Return row `index` as it is in `epoch`."""
        note_example(index)
        row = self.rows[index]
        key = int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "little")
        return self.change(row, np.random.default_rng([self.seed, epoch, key]))

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the micro-batch of these examples as they are in `epoch`, the shortest first; unchanged for None."""
        if epoch is None or not len(indices):
            return self.examples.batch(indices, epoch)
        if get_worker_info() is not None:
            # A forked worker does not have the tokenizer's threads, and would wait for them forever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoded: Any = self.encode([self.changed(int(i), epoch) for i in indices])
        if self.mask is not None:
            is_masked = encoded.input_ids == self.mask.masked_id
            encoded = replace(encoded, input_ids=np.where(is_masked, self.mask.token_id, encoded.input_ids))
        order = np.argsort(all_lengths(encoded.lengths), kind="stable")  # attention runs over equal lengths in one call
        chosen = np.asarray(indices, dtype=np.int64)[order]
        ids = tuple(self.ids[i] for i in chosen)
        batch: Batch = encoded.batch(order)
        return replace(batch, indices=tuple(chosen.tolist()), ids=ids)


def show_augmented(examples: Examples, count: int = 3, epochs: int = 2) -> str:
    """Return the first `count` rows, unchanged and in the first epochs; "" where nothing is augmented."""
    if not isinstance(examples, Augmented):
        return ""
    lines = ["augmented samples:"]
    for i in range(min(count, len(examples))):
        row, changed = examples.rows[i], [examples.changed(i, epoch) for epoch in range(epochs)]
        different = [k for k, value in row.values.items() if any(other.values[k] != value for other in changed)]
        lines.append(f"  id {row.id}" + ("" if different else f": as it is in the first {epochs} epochs"))
        for column in different:
            shown = [_shown(other.values[column]) for other in changed]
            if examples.mask is not None:
                shown = [text.replace(MASKED, examples.mask.token) for text in shown]
            lines.append(f"    {column}: {_shown(row.values[column])}")
            lines += [f"    epoch {e}: {text}" for e, text in enumerate(shown)]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Changes


@dataclass(frozen=True)
class TextChanges:
    """The rate of each change by word, and the tables of new words."""

    crop: float = 0.0  # the largest share of the words that is removed at the ends
    delete: float = 0.0
    swap: float = 0.0
    mask: float = 0.0
    fill: float = 0.0
    synonym: float = 0.0
    mask_token: str = ""  # in place of a masked word
    masking: Mask | None = None  # what the encoding makes of it
    words: Sequence[str] = ()  # to insert, for fill
    synonyms: Mapping[tuple[str, ...], Sequence[str]] = field(
        default_factory=dict
    )  # by the words of an entry, in lower case
    wordings: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # other wordings of a text, by the id of its row


def change_text(row: Row, rng: np.random.Generator, changes: TextChanges, columns: Sequence[str]) -> Row:
    """Return the row with all changes in every column; other wordings are of the first column alone."""
    values = {column: row.values[column] for column in columns}
    if others := changes.wordings.get(row.id):
        choices = [values[columns[0]], *others]
        values[columns[0]] = choices[rng.integers(len(choices))]
    for column in columns:
        text = values[column]
        values[column] = _reorder(apply_edits(text, find_edits(text, rng, changes)), rng, changes)
    return row.updated(values)


def change_around(
    row: Row, rng: np.random.Generator, changes: TextChanges, column: str, spans: Sequence[Span]
) -> tuple[str, list[Span]]:
    """Return (the text in `column` with single words changed outside `spans`; the spans in the new text)."""
    text = row.values[column]
    edits = find_edits(text, rng, changes, spans)
    return apply_edits(text, edits), [
        (shift_position(start, edits), shift_position(end, edits)) for start, end in spans
    ]


def change_tagged(row: Row, rng: np.random.Generator, changes: TextChanges, words: str, tags: str, outside: str) -> Row:
    """Return a tagged sentence with words replaced or masked one by one, or deleted together with their tags.

    outside: the tag of words outside of entities, which must not be split or joined. Then only words outside that
    follow another word outside are deleted, so that one always stays between two entities. "": tags that mark none.
    """
    new, new_tags = list(row.values[words]), list(row.values[tags])
    draws = rng.random((4, len(new)))
    for i, word in enumerate(new):
        spaces = len(word) - len(word.lstrip())
        start, end = _bare(word, spaces, len(word.rstrip()))
        options = [text for text in changes.synonyms.get(entry_key(word[start:end]), ()) if len(text.split()) == 1]
        if options and draws[0, i] < changes.synonym:
            new[i] = word[:start] + _like(word[start:end], options[int(draws[1, i] * len(options))]) + word[end:]
        elif draws[2, i] < changes.mask:
            new[i] = word[:spaces] + changes.mask_token
    free = [not outside or tag == outside for tag in new_tags]
    kept = [i for i in range(len(new)) if not (draws[3, i] < changes.delete and i and free[i] and free[i - 1])]
    return row.updated({words: [new[i] for i in kept], tags: [new_tags[i] for i in kept]})


def find_edits(text: str, rng: np.random.Generator, changes: TextChanges, kept: Sequence[Span] = ()) -> list[Edit]:
    """Return the edits for synonyms and masks, in the order of the text; none for words that touch the spans `kept`.

    At each word the longest entry of the table is considered. A word that is not replaced may become a mask.
    Punctuation around a word stays.
    """
    words = [_bare(text, *match.span()) for match in WORD.finditer(text)]
    free = [not any(start < last and first < end for first, last in kept) for start, end in words]
    draws = rng.random((3, len(words)))
    longest = max(map(len, changes.synonyms), default=0)
    edits: list[Edit] = []
    i = 0
    while i < len(words):
        start, end = words[i]
        count = 1
        if longest and draws[0, i] < changes.synonym and (n := _entry_at(text, words, i, longest, changes, free)):
            count, end = n, words[i + n - 1][1]
            options = changes.synonyms[entry_key(text[start:end])]
            edits.append((start, end, _like(text[start:end], options[int(draws[1, i] * len(options))])))
        elif free[i] and draws[2, i] < changes.mask:
            edits.append((start, end, changes.mask_token))
        i += count
    return edits


def _entry_at(text: str, words: list[Span], i: int, longest: int, changes: TextChanges, free: list[bool]) -> int:
    """Return the number of words of the longest entry that begins at word `i`, with only spaces between; 0 for none."""
    for n in range(min(longest, len(words) - i), 0, -1):
        spans = words[i : i + n]
        gaps = "".join(text[a[1] : b[0]] for a, b in pairwise(spans))
        if (
            all(free[i : i + n])
            and not gaps.strip()
            and entry_key(text[spans[0][0] : spans[-1][1]]) in changes.synonyms
        ):
            return n
    return 0


def _bare(text: str, start: int, end: int) -> Span:
    """Return the span of a word without the punctuation around it; a word of punctuation alone stays whole."""
    first, last = start, end
    while first < last and unicodedata.category(text[first])[0] in "PS":
        first += 1
    while last > first and unicodedata.category(text[last - 1])[0] in "PS":
        last -= 1
    return (first, last) if first < last else (start, end)


def _like(word: str, synonym: str) -> str:
    """Return the synonym with the capitals of the word that it replaces."""
    if word.isupper() and len(word) > 1:
        return synonym.upper()
    return synonym[0].upper() + synonym[1:] if word[0].isupper() else synonym


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Return the text with its edits, which are in its order and do not overlap."""
    parts, end = [], 0
    for start, stop, new in edits:
        parts += [text[end:start], new]
        end = stop
    return "".join([*parts, text[end:]])


def shift_position(position: int, edits: Iterable[Edit]) -> int:
    """Return the position of a character after the edits, none of which contains it."""
    return position + sum(len(new) - (stop - start) for start, stop, new in edits if stop <= position)


def _reorder(text: str, rng: np.random.Generator, changes: TextChanges) -> str:
    """Return the text after swap, delete, crop and fill, in this order; one word stays, and so does the spacing."""
    matches = list(WORD.finditer(text))
    if not matches or not (changes.swap or changes.delete or changes.crop or changes.fill):
        return text
    words = [match.group() for match in matches]
    ends = [0, *(match.end() for match in matches)]
    spaces = [text[end : match.start()] for end, match in zip(ends, matches, strict=False)]
    draws = rng.random(len(words))
    i = 0
    while i + 1 < len(words):
        swapped = draws[i] < changes.swap
        if swapped:
            words[i], words[i + 1] = words[i + 1], words[i]
        i += 2 if swapped else 1
    kept = np.flatnonzero(rng.random(len(words)) >= changes.delete)
    if not len(kept):
        kept = rng.integers(len(words), size=1)
    num_cropped = int(rng.integers(int(changes.crop * len(kept)) + 1))  # fewer than all, since the share is below 1
    first = int(rng.integers(num_cropped + 1))
    kept = kept[first : len(kept) - (num_cropped - first)]
    parts: list[str] = []
    for index, filled in zip(kept, rng.random(len(kept)) < changes.fill, strict=True):
        parts += [spaces[index] if parts else "", words[index]]
        if filled:
            new = changes.words[int(rng.integers(len(changes.words)))]
            spaced = not (_unspaced(new) or _unspaced(words[index]))
            parts += [" " if spaced else "", new]
    return "".join(parts)


def _unspaced(word: str) -> bool:
    return re.match(f"[{KANA_AND_HAN}]", word) is not None


# What changes need from the texts and the tokenizer


def find_distinct_words(texts: Iterable[str]) -> list[str]:
    """Return all words of the texts, without the punctuation around them, sorted."""
    found = {text[slice(*_bare(text, *match.span()))] for text in texts for match in WORD.finditer(text)}
    return sorted(found)


def find_mask_token(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's mask token, which it does not split; "" for a tokenizer without one."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return next((token for token in MASKS if token in added), "")


def add_mask(tokenizer: Tokenizer, token: str) -> Mask:
    """Make the tokenizer encode MASKED as one token, which includes the same spaces as its mask token."""
    ((token_id, added),) = [item for item in tokenizer.get_added_tokens_decoder().items() if item[1].content == token]
    tokenizer.add_tokens([AddedToken(MASKED, lstrip=added.lstrip, rstrip=added.rstrip, normalized=False)])
    return Mask(token, token_id, tokenizer.get_vocab()[MASKED])
