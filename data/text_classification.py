"""Texts, single or in pairs, with one class each -> examples. Other tasks that read texts share these functions."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

# Characters of the texts that are encoded at a time. An encoding also holds strings, and everything beyond max_length,
# about 20 bytes a character. It is freed before the next texts are encoded.
CHUNK = 4_000_000
_LIKE_A_LIST = re.compile(r"[\[({].*(?:['\",]|[0-9]\s+[0-9]).*[\])}]|\[\s*\]", re.DOTALL)  # [NOISE] is a name
SEVERAL = "multi-label-classification"  # the task that reads several labels to a text


def check_texts(name: str, rows: Sequence[Row], columns: Sequence[str], label: str, errors: ErrorList) -> None:
    """Add to `errors` every row with an empty value, with no text in one of `columns`, or with a bad label.

    label: a column of texts or numbers, or "". A list of one, as doccano exports classes, is read as that one.
    """
    num_lists = 0
    for row in rows:
        for column in columns:
            value = row.values.get(column)
            if not isinstance(value, str):
                errors.add(name, row.line, f"{column!r} should be text, this is {value!r}")
            elif not value.strip():
                errors.add(name, row.line, f"{column!r} is empty", is_empty=True)
        if label and isinstance(value := row.values[label], list) and len(value) == 1 and isinstance(value[0], str):
            row.values[label], num_lists = value[0], num_lists + 1
        if label and (reason := _find_label_fault(row.values[label], label)):
            errors.add(name, row.line, reason)
    if num_lists:
        errors.notes.append(f"{count_of(num_lists, 'label')} written as a list of one class, read as that class")


def _find_label_fault(value: object, column: str) -> str:
    """Return why a value of the label column is no class; "" for one that is."""
    if isinstance(value, dict | list | tuple | set | bytes):
        hint = f'; run.task = "{SEVERAL}" reads lists' if isinstance(value, list) and len(value) > 1 else ""
        return f"a label should be text or a number, this is {value!r}{hint}"
    if not label_name(value):
        return f"the label in {column!r} is empty"
    if isinstance(value, str) and _LIKE_A_LIST.fullmatch(value.strip()) and parse_list_text(value) is not None:
        return f'a label should be one class, this is a list as text, {value!r}; run.task = "{SEVERAL}" reads lists'
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
) -> TextExamples[None]:
    """Encode checked rows, truncated to `max_length` tokens including the special ones (the longest of a pair first).

    label: a column, or "" for unlabelled rows. long_texts, window_overlap: what becomes of texts that are longer
    (data/long_texts.py). limit, nouns: the setting of max_length and what the rows are, in notes.
    """
    reading = LongTexts(long_texts, max_length, window_overlap)
    # An empty array first, so that no rows make an empty data set.
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    lengths: list[int] = []
    counts: list[int] = []  # sequences of each example
    long = lost = tokens = 0
    inputs = [(r.values[text], r.values[text_pair]) if text_pair else r.values[text] for r in rows]
    is_quiet = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # every rank encodes, one shows it
    with tqdm(total=len(rows), desc="encoding", unit="text", leave=False, delay=1, disable=is_quiet) as bar:
        for chunk in split_into_chunks(inputs):
            encoded = (
                _truncate(chunk, tokenizer, max_length) if long_texts == TRUNCATE else _split(chunk, tokenizer, reading)
            )
            ids += encoded.ids
            types += encoded.types
            lengths += map(len, encoded.ids)
            counts += encoded.counts
            long += encoded.long
            lost += encoded.lost
            tokens += encoded.tokens
            bar.update(len(chunk))
    sequences = np.cumsum([0, *counts], dtype=np.int64) if len(counts) != len(lengths) else None
    if long_texts == TRUNCATE:
        notes = note_truncated(long, len(rows), nouns, f"{limit} = {max_length}", lost, tokens)
    else:
        windows = sum(count for count in counts if count > 1)
        notes = reading.notes(long, len(rows), nouns, windows, lost, tokens)
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=class_numbers(rows, label, labels) if label else None,
        ids=[row.id for row in rows],
        truncated=long if long_texts == TRUNCATE else 0,
        sequences=sequences,
        notes=notes,
    )


class _Encoded(NamedTuple):
    """The sequences of some texts."""

    ids: list[np.ndarray]  # of each sequence
    types: list[np.ndarray]
    counts: list[int]  # sequences of each text
    long: int  # texts with more tokens than fit into one
    lost: int  # tokens that are in no sequence
    tokens: int  # all tokens of the texts


def _truncate(inputs: Sequence[str | tuple[str, str]], tokenizer: Tokenizer, max_length: int) -> _Encoded:
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    encodings = tokenizer.encode_batch_fast(inputs)
    beyond = [(i, parts) for i, e in enumerate(encodings) if (parts := e.overflowing)]
    lost = _count_lost([parts for _, parts in beyond], [inputs[i] for i, _ in beyond], tokenizer, max_length)
    tokenizer.no_truncation()
    ids = [np.asarray(e.ids, dtype=np.int32) for e in encodings]
    types = [np.asarray(e.type_ids, dtype=np.uint8) for e in encodings]
    return _Encoded(ids, types, [1] * len(inputs), len(beyond), lost, sum(map(len, ids)) + lost)


def _split(inputs: Sequence[str | tuple[str, str]], tokenizer: Tokenizer, long_texts: LongTexts) -> _Encoded:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    counts: list[int] = []
    long = lost = tokens = 0
    for encoding in tokenizer.encode_batch_fast(inputs):
        all_ids = np.asarray(encoding.ids, dtype=np.int32)
        all_types = np.asarray(encoding.type_ids, dtype=np.uint8)
        if len(all_ids) <= long_texts.max_length:
            sequences = [np.arange(len(all_ids))]
        else:
            parts = np.array([-1 if part is None else part for part in encoding.sequence_ids])
            sequences = long_texts.split(parts)
            long += 1
            lost += len(all_ids) - len(np.unique(np.concatenate(sequences)))
        ids += [all_ids[kept] for kept in sequences]
        types += [all_types[kept] for kept in sequences]
        counts.append(len(sequences))
        tokens += len(all_ids)
    return _Encoded(ids, types, counts, long, lost, tokens)


def _count_lost(
    beyond: Sequence[list[Encoding]], inputs: Sequence[str | tuple[str, str]], tokenizer: Tokenizer, max_length: int
) -> int:
    """Return the number of tokens that truncated texts or pairs lost. beyond: the parts that were truncated away."""
    if not inputs or isinstance(inputs[0], str):
        num_special = tokenizer.num_special_tokens_to_add(False)  # each part has them too
        return sum(len(part) - num_special for parts in beyond for part in parts)
    tokenizer.no_truncation()  # the parts of a pair have its texts in every combination, so they do not tell
    return sum(len(encoding) - max_length for encoding in tokenizer.encode_batch_fast(inputs))


def split_into_chunks(inputs: Sequence[str | tuple[str, str]]) -> Iterator[Sequence[str | tuple[str, str]]]:
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
