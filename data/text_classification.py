"""Rows of text -> examples, encoded once into compact arrays."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats.rows import Row

# Characters of the texts encoded at a time. An encoding also holds strings, and all that lies beyond max_length, some
# 20 bytes a character: it is given back before the next ones are made.
CHUNK = 4_000_000


def check_rows(name: str, rows: Sequence[Row], columns: Sequence[str], label: str, errors: ErrorList) -> None:
    """In every row each of `columns` must be text, and `label`, a column or "", text or a number; none is empty."""
    for row in rows:
        for column in columns:
            value = row.values.get(column)
            if not isinstance(value, str):
                errors.add(name, row.line, f"{column!r} should be text, this is {value!r}")
            elif not value.strip():
                errors.add(name, row.line, f"{column!r} is empty")
        if label and isinstance(row.values[label], dict | list):
            errors.add(name, row.line, f"a label should be text or a number, this is {row.values[label]!r}")
        elif label and not label_name(row.values[label]):
            errors.add(name, row.line, f"the label in {label!r} is empty")


def label_name(value: object) -> str:
    """A label as its name: JSON's true, 1 and "1" are 'true', '1' and '1'."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def label_names(name: str, rows: Sequence[Row], column: str, declared: Sequence[str]) -> list[str]:
    """The classes, sorted (as numbers where all are numbers) or as declared; at least two of them must occur."""
    found = dict.fromkeys(label_name(row.values[column]) for row in rows)
    declared_all = not declared or found.keys() <= set(declared)  # else check_labels says which, and where
    if len(found) < 2 and declared_all:
        raise DataError(f"{name}: column {column!r} has one class only, {next(iter(found))!r}; two are needed to learn")
    return list(declared) or sort_labels(found)


def sort_labels(found: Iterable[str]) -> list[str]:
    """In the order of their characters; as numbers where all are numbers."""
    names = sorted(found)
    numeric = all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names)
    return sorted(names, key=float) if numeric else names


def check_labels(name: str, rows: Sequence[Row], column: str, labels: Sequence[str]) -> None:
    """Every label must be one of `labels`; all that are not are reported together."""
    errors, known = ErrorList(), set(labels)
    for row in rows:
        if label_name(row.values[column]) not in known:
            reason = f"unknown label {row.values[column]!r}; the labels are {', '.join(map(repr, labels))}"
            errors.add(name, row.line, reason)
    errors.raise_if_any()


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
    """Encode all rows, truncated (longest of a pair first) to `max_length` tokens with the special ones.

    `label` is a column name, or "" for unlabelled rows. Rows have been checked before.
    """
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    # An array of nothing first, so that no rows make an empty data set.
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    lengths: list[int] = []
    truncated = 0
    inputs = [(r.values[text], r.values[text_pair]) if text_pair else r.values[text] for r in rows]
    off = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # every rank encodes, one shows it
    with tqdm(total=len(rows), desc="encoding", unit="text", leave=False, delay=1, disable=off) as bar:
        for chunk in in_chunks(inputs):
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


def in_chunks(inputs: Sequence[str | tuple[str, str]]) -> Iterator[Sequence[str | tuple[str, str]]]:
    """Runs of texts or pairs of about CHUNK characters together; a longer one stands alone."""
    start, characters = 0, 0
    for i, texts in enumerate(inputs):
        length = len(texts) if isinstance(texts, str) else sum(map(len, texts))
        if i > start and characters + length > CHUNK:
            yield inputs[start:i]
            start, characters = i, 0
        characters += length
    if start < len(inputs):
        yield inputs[start:]
