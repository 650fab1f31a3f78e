"""Texts, single or in pairs, with one class each -> examples. Other tasks that read texts share these functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data.errors import ErrorList
from data.examples import TextExamples, count_notes
from data.labels import label_name
from data.row import Row

# Characters of the texts that are encoded at a time. An encoding also holds strings, and everything beyond max_length,
# about 20 bytes a character. It is freed before the next texts are encoded.
CHUNK = 4_000_000


def check_texts(name: str, rows: Sequence[Row], columns: Sequence[str], label: str, errors: ErrorList) -> None:
    """Add to `errors` every row with an empty value, with no text in one of `columns`, or with a bad label.

    label: a column of texts or numbers, or "".
    """
    for row in rows:
        for column in columns:
            value = row.values.get(column)
            if not isinstance(value, str):
                errors.add(name, row.line, f"{column!r} should be text, this is {value!r}")
            elif not value.strip():
                errors.add(name, row.line, f"{column!r} is empty", is_empty=True)
        if label and isinstance(row.values[label], dict | list):
            errors.add(name, row.line, f"a label should be text or a number, this is {row.values[label]!r}")
        elif label and not label_name(row.values[label]):
            errors.add(name, row.line, f"the label in {label!r} is empty")


def encode_texts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    text: str = "text",
    text_pair: str = "",
    label: str = "",
    labels: Sequence[str] = (),
    max_length: int,
) -> TextExamples[None]:
    """Encode checked rows, truncated to `max_length` tokens including the special ones (the longest of a pair first).

    label: a column, or "" for unlabelled rows.
    """
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    # An empty array first, so that no rows make an empty data set.
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    lengths: list[int] = []
    truncated = 0
    inputs = [(r.values[text], r.values[text_pair]) if text_pair else r.values[text] for r in rows]
    is_quiet = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # every rank encodes, one shows it
    with tqdm(total=len(rows), desc="encoding", unit="text", leave=False, delay=1, disable=is_quiet) as bar:
        for chunk in split_into_chunks(inputs):
            encodings = tokenizer.encode_batch_fast(chunk)
            ids += [np.asarray(e.ids, dtype=np.int32) for e in encodings]
            types += [np.asarray(e.type_ids, dtype=np.uint8) for e in encodings]
            lengths += [len(e.ids) for e in encodings]
            truncated += sum(bool(e.overflowing) for e in encodings)
            del encodings
            bar.update(len(chunk))
    tokenizer.no_truncation()
    number = {name: i for i, name in enumerate(labels)}
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.array([number[label_name(r.values[label])] for r in rows], dtype=np.int64) if label else None,
        ids=[row.id for row in rows],
        truncated=truncated,
        notes=count_notes((truncated, "text", "truncated to data.max_length")),
    )


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
