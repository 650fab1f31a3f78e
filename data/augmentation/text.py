"""Texts that are a little different in every epoch: rows -> changed rows -> the task's own encoding, on the fly.

What becomes of an example is a pure function of (seed, epoch, its id). So nothing is remembered to resume a run, and it
is the same whichever worker makes it, on whichever rank, in whichever micro-batch.

A word is what stands between spaces; in Chinese and Japanese, which have none, it is a character. Two kinds of change:
in place, of words where they stand (synonyms, masks), after which a place in the text can still be found; and of the
order or the number of words (swap, delete, crop, fill), which only a label of the whole text outlives.
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
from tokenizers import Tokenizer
from torch.utils.data import get_worker_info

from data.batch import Batch
from data.errors import ErrorList
from data.formats.rows import read_rows
from data.loader import Examples
from data.row import Row
from data.scripts import KANA_AND_HAN
from data.tag_schemes import OUTSIDE

WORD = re.compile(rf"[{KANA_AND_HAN}]|[^\s{KANA_AND_HAN}]+")
MASKS = ("[MASK]", "<mask>")  # of BERT and of RoBERTa

Change = Callable[[Row, np.random.Generator], Row]
Span = tuple[int, int]  # the first character, and the one after the last
Edit = tuple[int, int, str]  # what stands in its place


@dataclass(frozen=True)
class Augmented:
    """`examples` whose batches of training have been changed; everything else, so every evaluation, is as it was."""

    examples: Examples
    rows: Sequence[Row]  # of the examples, in their order
    encode: Callable[[list[Row]], Examples]
    change: Change
    seed: int
    files: str = ""  # a digest of what else the changes were read from

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> list[str]:
        return self.examples.ids

    @property
    def truncated(self) -> int:
        return self.examples.truncated

    @property
    def lengths(self) -> np.ndarray:
        """Of the examples as they are, since a step is cut before they are changed; no cut changes what they become."""
        return self.examples.lengths

    @property
    def notes(self) -> tuple[str, ...]:
        return self.examples.notes

    def fingerprint(self) -> str:
        """Changes when the examples or the files do that the changes are read from; the rest is in the recipe."""
        own = self.examples.fingerprint()
        return hashlib.sha256((own + self.files).encode()).hexdigest()[:16] if self.files else own

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        return self.examples.label_counts(num_labels)

    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]:
        return self.examples.show(index, processor, labels)

    def changed(self, index: int, epoch: int) -> Row:
        """What row `index` is in `epoch`."""
        row = self.rows[index]
        key = int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "little")
        return self.change(row, np.random.default_rng([self.seed, epoch, key]))

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """The micro-batch of these examples as they are in `epoch`, the shortest first; unchanged for None."""
        if epoch is None or not len(indices):
            return self.examples.batch(indices, epoch)
        if (
            get_worker_info() is not None
        ):  # a fork has none of the tokenizer's threads, and would wait for them for ever
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoded = self.encode([self.changed(int(i), epoch) for i in indices])
        order = np.argsort(encoded.lengths, kind="stable")  # attention takes equal lengths in one call
        chosen = np.asarray(indices, dtype=np.int64)[order]
        ids = tuple(self.ids[i] for i in chosen)
        return replace(encoded.batch(order), indices=tuple(chosen.tolist()), ids=ids)


def sheet(examples: Examples, count: int = 3, epochs: int = 2) -> str:
    """The first `count` rows, as they are and as they are in the first epochs; "" where nothing is augmented."""
    if not isinstance(examples, Augmented):
        return ""
    lines = ["augmented samples:"]
    for i in range(min(count, len(examples))):
        row, changed = examples.rows[i], [examples.changed(i, epoch) for epoch in range(epochs)]
        different = [k for k, value in row.values.items() if any(other.values[k] != value for other in changed)]
        lines.append(f"  id {row.id}" + ("" if different else f": as it is in the first {epochs} epochs"))
        for column in different:
            lines.append(f"    {column}: {_shown(row.values[column])}")
            lines += [f"    epoch {e}: {_shown(other.values[column])}" for e, other in enumerate(changed)]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# What is changed


@dataclass(frozen=True)
class TextChanges:
    """Rates by word, and what words become."""

    crop: float = 0.0  # the largest share of the words that is cut off at the ends
    delete: float = 0.0
    swap: float = 0.0
    mask: float = 0.0
    fill: float = 0.0
    synonym: float = 0.0
    mask_token: str = ""
    words: Sequence[str] = ()  # for fill
    synonyms: Mapping[tuple[str, ...], Sequence[str]] = field(default_factory=dict)  # by words in lower case
    wordings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # other texts, by the id of a row


def change_text(row: Row, rng: np.random.Generator, changes: TextChanges, columns: Sequence[str]) -> Row:
    """All changes, of every column; another wording only in the first of them, which it is a wording of."""
    values = {column: row.values[column] for column in columns}
    if others := changes.wordings.get(row.id):
        choices = [values[columns[0]], *others]
        values[columns[0]] = choices[rng.integers(len(choices))]
    for column in columns:
        text = values[column]
        values[column] = _reorder(apply(text, find_edits(text, rng, changes)), rng, changes)
    return row.updated(values)


def change_around(
    row: Row, rng: np.random.Generator, changes: TextChanges, column: str, spans: Sequence[Span]
) -> tuple[str, list[Span]]:
    """The text in `column`, changed in place but for words that touch one of `spans`, and where the spans are now."""
    text = row.values[column]
    edits = find_edits(text, rng, changes, spans)
    return apply(text, edits), [(shifted(start, edits), shifted(end, edits)) for start, end in spans]


def change_tagged(
    row: Row, rng: np.random.Generator, changes: TextChanges, words: str, tags: str, entities: bool
) -> Row:
    """The words of a tagged sentence, replaced or masked one by one, or left out together with their tags.

    entities: the tags are those of entities (IOB1, IOB2, IOBES), of which none may be cut or joined: left out are words
    outside, "O", that follow another one outside, so that between two entities one always stays.
    """
    new, new_tags = list(row.values[words]), list(row.values[tags])
    draws = rng.random((4, len(new)))
    for i, word in enumerate(new):
        spaces = len(word) - len(word.lstrip())
        start, end = _bare(word, spaces, len(word.rstrip()))
        options = [text for text in changes.synonyms.get(_entry(word[start:end]), ()) if len(text.split()) == 1]
        if options and draws[0, i] < changes.synonym:
            new[i] = word[:start] + _like(word[start:end], options[int(draws[1, i] * len(options))]) + word[end:]
        elif draws[2, i] < changes.mask:
            new[i] = word[:spaces] + changes.mask_token
    outside = [not entities or tag == OUTSIDE for tag in new_tags]
    kept = [i for i in range(len(new)) if not (draws[3, i] < changes.delete and i and outside[i] and outside[i - 1])]
    return row.updated({words: [new[i] for i in kept], tags: [new_tags[i] for i in kept]})


def find_edits(text: str, rng: np.random.Generator, changes: TextChanges, kept: Sequence[Span] = ()) -> list[Edit]:
    """Synonyms and masks, in the order of the text; none for a word that touches one of the spans `kept`.

    The longest entry of the table that begins at a word is drawn; what is no synonym may become a mask. Marks around a
    word, as quotes and full stops, stay.
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
            options = changes.synonyms[_entry(text[start:end])]
            edits.append((start, end, _like(text[start:end], options[int(draws[1, i] * len(options))])))
        elif free[i] and draws[2, i] < changes.mask:
            edits.append((start, end, changes.mask_token))
        i += count
    return edits


def _entry_at(text: str, words: list[Span], i: int, longest: int, changes: TextChanges, free: list[bool]) -> int:
    """The words of the longest entry of the table that begins at word `i`, with only spaces between; 0: none does."""
    for n in range(min(longest, len(words) - i), 0, -1):
        part = words[i : i + n]
        gaps = "".join(text[a[1] : b[0]] for a, b in pairwise(part))
        if all(free[i : i + n]) and not gaps.strip() and _entry(text[part[0][0] : part[-1][1]]) in changes.synonyms:
            return n
    return 0


def _entry(words: str) -> tuple[str, ...]:
    """What a table has them under: whatever their capitals and the spaces between them."""
    return tuple(WORD.findall(words.lower()))


def _bare(text: str, start: int, end: int) -> Span:
    """A word without the punctuation around it; a word of nothing else stays whole."""
    first, last = start, end
    while first < last and unicodedata.category(text[first])[0] in "PS":
        first += 1
    while last > first and unicodedata.category(text[last - 1])[0] in "PS":
        last -= 1
    return (first, last) if first < last else (start, end)


def _like(word: str, synonym: str) -> str:
    """The synonym with the capitals of the word it stands for."""
    if word.isupper() and len(word) > 1:
        return synonym.upper()
    return synonym[0].upper() + synonym[1:] if word[0].isupper() else synonym


def apply(text: str, edits: Iterable[Edit]) -> str:
    """The text with its edits, which are in its order and do not overlap."""
    parts, end = [], 0
    for start, stop, new in edits:
        parts += [text[end:start], new]
        end = stop
    return "".join([*parts, text[end:]])


def shifted(position: int, edits: Iterable[Edit]) -> int:
    """Where a place in the text is after the edits, none of which is around it."""
    return position + sum(len(new) - (stop - start) for start, stop, new in edits if stop <= position)


def _reorder(text: str, rng: np.random.Generator, changes: TextChanges) -> str:
    """Swap, delete, crop, fill, in this order; at least one word stays, and the spaces keep their places."""
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
    cut = int(rng.integers(int(changes.crop * len(kept)) + 1))  # less than all of them, as the share is below 1
    first = int(rng.integers(cut + 1))
    kept = kept[first : len(kept) - (cut - first)]
    parts: list[str] = []
    for place, filled in zip(kept, rng.random(len(kept)) < changes.fill, strict=True):
        parts += [spaces[place] if parts else "", words[place]]
        if filled:
            new = changes.words[int(rng.integers(len(changes.words)))]
            spaced = not (_unspaced(new) or _unspaced(words[place]))
            parts += [" " if spaced else "", new]
    return "".join(parts)


def _unspaced(word: str) -> bool:
    return re.match(f"[{KANA_AND_HAN}]", word) is not None


# Where it comes from


def distinct_words(texts: Iterable[str]) -> list[str]:
    """All words of the texts, without the punctuation around them, sorted."""
    found = {text[slice(*_bare(text, *match.span()))] for text in texts for match in WORD.finditer(text)}
    return sorted(found)


def mask_token(tokenizer: Tokenizer) -> str:
    """The token that stands for a hidden word, as a text can name it; "" for a tokenizer without one."""
    for token in MASKS:
        number = tokenizer.token_to_id(token)
        if number is not None and number in tokenizer.encode(f"a {token}", add_special_tokens=False).ids:
            return token
    return ""


def read_synonyms(name: str) -> dict[tuple[str, ...], list[str]]:
    """{the words of an entry, in lower case: its synonyms} of a .tsv or .jsonl file with `word` and `synonyms`.

    The synonyms are a list, or in one field with commas between. All that is wrong is one DataError.
    """
    errors = ErrorList()
    table: dict[tuple[str, ...], list[str]] = {}
    lines: dict[tuple[str, ...], int] = {}
    for row in read_rows(name, ["word", "synonyms"], errors=errors):
        word, synonyms = row.values["word"], row.values["synonyms"]
        texts = synonyms.split(",") if isinstance(synonyms, str) else synonyms
        if not isinstance(word, str) or not word.strip():
            errors.add(name, row.line, f"'word' should be text, this is {word!r}")
        elif not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            errors.add(name, row.line, f"'synonyms' should be texts with commas between, this is {synonyms!r}")
        elif not texts:
            errors.add(name, row.line, f"{word!r} has no synonyms; leave the line out")
        elif (key := _entry(word)) in table:
            errors.add(name, row.line, f"{word!r} is on line {lines[key]} too; put all its synonyms in one")
        else:
            table[key], lines[key] = [text.strip() for text in texts], row.line
    errors.raise_if_any()
    return table


def read_wordings(name: str, ids: Iterable[str]) -> dict[str, list[str]]:
    """{id: other wordings} of a .jsonl file with `id` and `texts`; each id must be one of `ids`."""
    errors, known = ErrorList(), set(ids)
    wordings: dict[str, list[str]] = {}
    for row in read_rows(name, ["id", "texts"], errors=errors):
        texts = row.values["texts"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            errors.add(name, row.line, f"'texts' should be a list of texts, this is {texts!r}")
        elif row.id not in known:
            errors.add(name, row.line, f"the training data has no id {row.id!r}")
        else:
            wordings[row.id] = texts
    errors.raise_if_any()
    return wordings


def digest(*tables: Mapping[Any, Sequence[str]]) -> str:
    """Changes when any table does; "" where all are empty."""
    if not any(tables):
        return ""
    return hashlib.sha256(repr([sorted(table.items()) for table in tables]).encode()).hexdigest()[:16]
