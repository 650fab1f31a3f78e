"""Texts, single or in pairs, with one class each -> examples. Other tasks that read texts share these functions."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from data.errors import ErrorList
from data.examples import TextExamples, note_truncated
from data.label_lists import parse_list_text
from data.label_spelling import label_name
from data.labels import class_numbers
from data.long_texts import TRUNCATE, LongTexts
from data.notes import count_of
from data.row import Row

# Characters of the texts that are encoded at a time. An encoding also holds strings, about 20 bytes a character. The
# encodings of two chunks are in memory at once.
CHUNK = 2_000_000
_LIKE_A_LIST = re.compile(r"[\[({].*(?:['\",]|[0-9]\s+[0-9]).*[\])}]|\[\s*\]", re.DOTALL)  # [NOISE] is a name
Text = str | tuple[str, str]  # a text, or two texts that are read together
SEVERAL = "multi-label-classification"  # the task that reads several labels to a text


def check_texts(
    name: str, rows: Sequence[Row], columns: Sequence[str], label: str, errors: ErrorList, several: str = SEVERAL
) -> None:
    """Add to `errors` every row with an empty value, with no text in one of `columns`, or with a bad label.

    label: a column of texts or numbers, or "". A list of one, as doccano exports classes, is read as that one.
    several: the task that reads several labels, in messages.
    """
    num_lists = 0
    for row in rows:
        for column in columns:
            value = row.values.get(column)
            if not isinstance(value, str):
                errors.add(name, row.line, f"{column!r} should be text, not {value!r}")
            elif not value.strip():
                errors.add(name, row.line, f"{column!r} is empty", is_empty=True)
        if label and isinstance(value := row.values[label], list) and len(value) == 1 and isinstance(value[0], str):
            row.values[label], num_lists = value[0], num_lists + 1
        if label and (reason := _find_label_fault(row.values[label], label, several)):
            errors.add(name, row.line, reason)
    if num_lists:
        errors.notes.append(f"{count_of(num_lists, 'label')} written as a list of one class, read as that class")


def _find_label_fault(value: object, column: str, several: str) -> str:
    """Return why a value of the label column is no class; "" for one that is."""
    if isinstance(value, dict | list | tuple | set | bytes):
        hint = f'; run.task = "{several}" reads lists' if isinstance(value, list) and len(value) > 1 else ""
        return f"a label should be text or a number, not {value!r}{hint}"
    if not label_name(value):
        return f"the label in {column!r} is empty"
    if isinstance(value, str) and _LIKE_A_LIST.fullmatch(value.strip()) and parse_list_text(value) is not None:
        return f'a label should be one class, not a list as text, {value!r}; run.task = "{several}" reads lists'
    return ""


def encode_texts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    text: str = "text",
    text_pair: str = "",
    label: str = "",
    labels: Sequence[str] = (),
    max_length: int,
    long_texts: str = TRUNCATE,
    window_overlap: int = 0,
    limit: str = "data.max_length",
    nouns: str = "texts",
    keeps_second: bool = False,
) -> TextExamples[None]:
    """Encode checked rows, truncated to `max_length` tokens including the special ones (the longest of a pair first).

    label: a column, or "" for unlabelled rows. long_texts, window_overlap, keeps_second: how texts are read that are
    longer (data/long_texts.py). limit, nouns: the setting of max_length and what the rows are, in notes.
    """
    reading = LongTexts(long_texts, max_length, window_overlap, keeps_second)
    inputs: list[Text] = [(r.values[text], r.values[text_pair]) if text_pair else r.values[text] for r in rows]
    encoded = _Encoded([np.empty(0, np.int32)], [np.empty(0, np.uint8)])  # no rows make an empty data set
    tokenizer.no_truncation()
    is_quiet = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # every rank encodes, one shows it
    with tqdm(total=len(rows), desc="encoding", unit="text", leave=False, delay=1, disable=is_quiet) as bar:
        for encodings in encode_ahead(list(split_into_chunks(inputs)), tokenizer):
            encoded.add(encodings, reading, is_pair=bool(text_pair))
            bar.update(len(encodings))
            del encodings  # they need far more memory than their ids
    if long_texts == TRUNCATE:
        limit = f"{limit} = {max_length}"
        notes = note_truncated(encoded.long, len(rows), nouns, limit, encoded.lost, encoded.tokens)
    else:
        notes = reading.notes(encoded.long, len(rows), nouns, encoded.windows, encoded.lost, encoded.tokens)
    has_windows = encoded.windows > encoded.long
    return TextExamples(
        input_ids=np.concatenate(encoded.ids),
        token_type_ids=np.concatenate(encoded.types),
        offsets=np.concatenate([[0], np.cumsum(encoded.lengths)]).astype(np.int64),
        labels=class_numbers(rows, label, labels) if label else None,
        ids=[row.id for row in rows],
        truncated=encoded.long if long_texts == TRUNCATE else 0,
        sequences=np.cumsum([0, *encoded.counts], dtype=np.int64) if has_windows else None,
        notes=notes,
    )


@dataclass
class _Encoded:
    """The sequences of the texts that have been encoded so far."""

    ids: list[np.ndarray]  # of several sequences each
    types: list[np.ndarray]
    lengths: list[int] = field(default_factory=list)  # of each sequence
    counts: list[int] = field(default_factory=list)  # sequences of each text
    long: int = 0  # texts with more tokens than fit into one sequence
    windows: int = 0  # their sequences
    lost: int = 0  # tokens that are in no sequence
    tokens: int = 0  # all tokens of the texts

    def add(self, encodings: list[Encoding], reading: LongTexts, is_pair: bool) -> None:
        """Add texts, those that are too long as `reading` says. The encodings are not truncated."""
        lengths = np.array([len(encoding) for encoding in encodings])
        ends = np.cumsum(lengths)
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, ends[-1])
        # The types of a text alone are those of the tokens around it, and of its own, which are all equal.
        if is_pair or any(encodings[int(lengths.argmax())].type_ids):
            types = np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.uint8, ends[-1])
        else:
            types = np.zeros(len(ids), np.uint8)
        sequences, done = [lengths[:0]], 0  # the lengths of the sequences
        counts = np.ones(len(encodings), dtype=np.int64)
        for i in np.flatnonzero(lengths > reading.max_length).tolist():
            begin, end = int(ends[i] - lengths[i]), int(ends[i])
            parts = np.array([-1 if part is None else part for part in encodings[i].sequence_ids])
            kept = reading.split(parts)
            before = slice(int(ends[done] - lengths[done]), begin)
            self.ids += [ids[before], *(ids[begin + positions] for positions in kept)]
            self.types += [types[before], *(types[begin + positions] for positions in kept)]
            sequences += [lengths[done:i], np.array([len(positions) for positions in kept])]
            counts[i] = len(kept)
            self.long += 1
            self.windows += len(kept)
            self.lost += end - begin - len(np.unique(np.concatenate(kept)))
            done = i + 1
        rest = int(ends[done - 1]) if done else 0
        self.ids.append(ids[rest:])
        self.types.append(types[rest:])
        self.lengths += np.concatenate([*sequences, lengths[done:]]).tolist()
        self.counts += counts.tolist()
        self.tokens += len(ids)


def encode_ahead(chunks: Sequence[Sequence[Text]], tokenizer: Tokenizer) -> Iterator[list[Encoding]]:
    """Yield the encodings of each chunk, while a thread encodes the next one: on all cores, and without the GIL."""
    if len(chunks) < 2:
        yield from map(tokenizer.encode_batch_fast, chunks)
        return
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(tokenizer.encode_batch_fast, chunks[0])
        for following in [*chunks[1:], []]:
            encodings = upcoming.result()
            upcoming = thread.submit(tokenizer.encode_batch_fast, following)
            yield encodings
            del encodings


def split_into_chunks(inputs: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """Yield runs of texts or pairs of about CHUNK characters in total; a longer one is a run of its own."""
    start, characters = 0, 0
    for i, texts in enumerate(inputs):
        length = len(texts) if isinstance(texts, str) else sum(map(len, texts))
        if i > start and characters + length > CHUNK:
            yield inputs[start:i]
            start, characters = i, 0
        characters += length
    if start < len(inputs):
        yield inputs[start:]
