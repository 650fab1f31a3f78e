"""Texts, single or in pairs, with one class each -> examples. Other tasks that read texts share these functions."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from data.errors import ErrorList
from data.examples import TextExamples, note_truncated
from data.label_lists import parse_list_text
from data.label_spelling import label_name
from data.labels import class_numbers
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
    limit: str = "data.max_length",
    nouns: str = "texts",
) -> TextExamples[None]:
    """Encode checked rows, truncated to `max_length` tokens including the special ones (the longest of a pair first).

    label: a column, or "" for unlabelled rows. limit, nouns: the setting of max_length and what the rows are, in notes.
    """
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    # An empty array first, so that no rows make an empty data set.
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    lengths: list[int] = []
    truncated, lost = 0, 0
    inputs = [(r.values[text], r.values[text_pair]) if text_pair else r.values[text] for r in rows]
    is_quiet = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # every rank encodes, one shows it
    with tqdm(total=len(rows), desc="encoding", unit="text", leave=False, delay=1, disable=is_quiet) as bar:
        for chunk in split_into_chunks(inputs):
            encodings = tokenizer.encode_batch_fast(chunk)
            ids += [np.asarray(e.ids, dtype=np.int32) for e in encodings]
            types += [np.asarray(e.type_ids, dtype=np.uint8) for e in encodings]
            lengths += [len(e.ids) for e in encodings]
            beyond = [(i, parts) for i, e in enumerate(encodings) if (parts := e.overflowing)]
            truncated += len(beyond)
            lost += _count_lost([parts for _, parts in beyond], [chunk[i] for i, _ in beyond], tokenizer, max_length)
            del encodings, beyond
            bar.update(len(chunk))
    tokenizer.no_truncation()
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=class_numbers(rows, label, labels) if label else None,
        ids=[row.id for row in rows],
        truncated=truncated,
        notes=note_truncated(truncated, len(rows), nouns, f"{limit} = {max_length}", lost, sum(lengths) + lost),
    )


def _count_lost(
    beyond: Sequence[list[Encoding]], inputs: Sequence[str | tuple[str, str]], tokenizer: Tokenizer, max_length: int
) -> int:
    """Return the number of tokens that truncated texts or pairs lost. beyond: the parts that were truncated away."""
    if not inputs or isinstance(inputs[0], str):
        num_special = tokenizer.num_special_tokens_to_add(False)  # each part has them too
        return sum(len(part) - num_special for parts in beyond for part in parts)
    tokenizer.no_truncation()  # the parts of a pair have its texts in every combination, so they do not tell
    lost = sum(len(encoding) - max_length for encoding in tokenizer.encode_batch_fast(inputs))
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return lost


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
