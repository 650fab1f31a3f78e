"""Rows of an anchor, a text that answers it and texts that do not -> examples of several sequences each.

The sequences of an example are its anchor, its positive and its negatives, in this order. Each has three labels: 0 for
an anchor, else IGNORE_INDEX, and two numbers of 31 bits that are equal for equal texts alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.batch import IGNORE_INDEX
from data.errors import ErrorList
from data.examples import TextExamples, count_part
from data.formats.options import FileOptions
from data.formats.rows import read_rows
from data.row import Row, Rows
from data.text_classification import check_texts, encode_texts

TEXT = "text"  # the column of the texts of all rows while they are encoded


def read_pairs(name: str, required: Sequence[str], negatives: Sequence[str], group: str, options: FileOptions) -> Rows:
    """Return rows with a text in each column of `required`; one of `negatives` may be null, empty or absent.

    group: the column of groups, or "".
    """
    errors = ErrorList()
    rows = read_rows(name, [*required, *filter(None, [group])], options.also_reading(negatives), errors)
    check_texts(name, rows, required, "", errors)
    found = dict.fromkeys(negatives, False)
    for row in rows:
        for column in negatives:
            value = row.values.get(column)
            found[column] |= column in row.values
            if value is not None and not isinstance(value, str):
                errors.add(name, row.line, f"{column!r} should be text, not {value!r:.80}")
    for column, is_found in found.items():
        if rows and not is_found:
            errors.add(name, rows[0].line, f"no row has the column {column!r} of negatives", of_file=True)
    return errors.settle(rows, options)


def encode_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, columns: Sequence[str], negatives: Sequence[str], **options: Any
) -> TextExamples[Any]:
    """Encode the texts of checked rows, each alone.

    columns: the anchor's and the positive's. options: of encode_texts.
    """
    texts, counts = list[str](), list[int]()
    for row in rows:
        own = [row.values.get(column) for column in (*columns, *negatives)]
        kept = [text for text in own if text and text.strip()]
        texts += kept
        counts.append(len(kept))
    examples = encode_texts([Row("", 0, {TEXT: text}) for text in texts], tokenizer, text=TEXT, **options)
    sequences = np.cumsum([0, *counts], dtype=np.int64)
    labels = np.empty((len(texts), 3), dtype=np.int64)
    labels[:, 0] = IGNORE_INDEX
    labels[sequences[:-1], 0] = 0
    labels[:, 1:] = [text_numbers(text) for text in texts] or np.empty((0, 2))
    return replace(
        examples,
        ids=[row.id for row in rows],
        labels=labels,
        sequences=sequences,
        notes=(*examples.notes, *_note_repeated(labels, sequences)),
    )


def text_numbers(text: str) -> tuple[int, int]:
    """Return two numbers below 2^31, 62 bits of a checksum of a text without the white space around it."""
    digest = hashlib.sha256(text.strip().encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") >> 1, int.from_bytes(digest[4:8], "little") >> 1


def _note_repeated(labels: np.ndarray, sequences: np.ndarray) -> tuple[str, ...]:
    """Return a note on rows that share their anchor or their positive with another row."""
    shared = np.zeros(len(sequences) - 1, dtype=bool)
    for place in (0, 1):
        _, inverse, counts = np.unique(
            labels[sequences[:-1] + place, 1:], axis=0, return_inverse=True, return_counts=True
        )
        shared |= counts[inverse.ravel()] > 1
    return count_part(
        int(shared.sum()), len(shared), "rows", "share a text with another one: it is no negative of theirs in the loss"
    )
