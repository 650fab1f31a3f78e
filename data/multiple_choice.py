"""Questions with choices -> examples: one example is several sequences, each a context with one of the choices.

The choices of an example are always in the same micro-batch, since their scores are compared. data/formats/choices.py
reads the files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from data.examples import TextExamples, warn_of_part
from data.formats.choices import CHOICES
from data.long_texts import TRUNCATE
from data.row import Row
from data.scripts import KANA_AND_HAN
from data.text_classification import encode_texts

BLANK = re.compile("_+")  # in a question, where the choice belongs
# The last character of a text behind which no space is written: Chinese, Japanese, and their punctuation.
_UNSPACED_END = re.compile(f"[{KANA_AND_HAN}\u3000-\u303f\uff00-\uff65]$")


@dataclass(frozen=True)
class ChoiceRecord:
    """The choices of N examples, for predictions."""

    choices: list[list[str]]  # (N,)


def encode_choices(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    context: str = "context",
    question: str = "question",
    label: str = "label",
    max_length: int,
    long_texts: str = TRUNCATE,
) -> TextExamples[ChoiceRecord]:
    """Return the rows of read_choices as examples of one sequence for each choice; see pair_texts.

    Labels, (N,) int64, are the numbers of the right choices; label: "" without labels. Where a pair is too long, only
    its first text is shortened, as long_texts says, unless the second one is too long by itself.
    """
    pairs = [
        Row("", 0, {"first": first, "second": second})
        for row in rows
        for first, second in pair_texts(row.values[context], row.values[question], row.values[CHOICES])
    ]
    encoded = encode_texts(
        pairs,
        tokenizer,
        text="first",
        text_pair="second",
        max_length=max_length,
        long_texts=long_texts,
        keeps_second=True,
        nouns="contexts with a choice",
    )
    counts = [len(row.values[CHOICES]) for row in rows]
    sequences = np.cumsum([0, *counts], dtype=np.int64)
    alike = _count_alike(encoded, sequences)
    verb = "have choices with the same tokens, which cannot be told apart"
    return replace(
        encoded,
        sequences=sequences,
        labels=np.array([row.values[label] for row in rows], dtype=np.int64) if label else None,
        ids=[row.id for row in rows],
        notes=(*encoded.notes, *warn_of_part(alike, len(rows), "examples", verb)),
    ).with_record(ChoiceRecord([row.values[CHOICES] for row in rows]))


def pair_texts(context: str, question: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """Return the two texts that are read for each choice.

    (context, question with the choice behind it), or with the choice in the place of its blank, as transformers'
    scripts for SWAG and RACE pair them; without a context (question, choice).
    """
    if not context.strip():
        return [(question, choice) for choice in choices]
    if BLANK.search(question):
        return [(context, BLANK.sub(lambda _, text=choice: text, question)) for choice in choices]  # type: ignore[misc]
    space = "" if not question or _UNSPACED_END.search(question) else " "
    return [(context, f"{question}{space}{choice}") for choice in choices]


def _count_alike(encoded: TextExamples[None], sequences: np.ndarray) -> int:
    """Return how many examples have two choices with the same tokens, such as names that differ in case alone."""
    count = 0
    for begin, end in zip(sequences[:-1].tolist(), sequences[1:].tolist(), strict=True):
        bounds = encoded.offsets[begin : end + 1].tolist()
        distinct = {encoded.input_ids[first:last].tobytes() for first, last in itertools.pairwise(bounds)}
        count += len(distinct) < end - begin
    return count
