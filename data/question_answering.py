"""Questions and contexts -> windows of tokens, and scores of tokens -> answers, which are spans of characters.

An example is a question. A context that is too long for one sequence is read in several windows, and the answer is the
best span of all of them. Evaluation and prediction both take it from Windows.answers(). data/formats/squad.py reads the
files.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.batch import IGNORE_INDEX
from data.errors import DataError
from data.examples import TextExamples, note_truncated, warn_of_part
from data.row import Row
from data.words import MARKS

CHUNK = 1_000  # questions encoded at a time; an encoding needs far more memory than its ids
NO_ANSWER = 0  # the target of a window without an answer: its first token, [CLS] or <s>


@dataclass(frozen=True)
class Candidate:
    """A span of the context, and its probability among all spans and no answer."""

    text: str
    start: int  # context[start:end] == text, in characters
    end: int
    score: float  # of its first token plus its last token
    probability: float


@dataclass(frozen=True)
class Windows:
    """The windows of N questions, S in total, and the characters of their tokens."""

    contexts: list[str]  # (N,)
    gold_answers: list[list[str]]  # (N,) the accepted answers; empty lists without labels
    spans: list[np.ndarray]  # (N,) arrays (tokens of the context, 2) int32: characters of each token
    # (S, 3) int64: position of the window's context in the sequence, its position in the context, number of tokens
    context_slices: np.ndarray
    sequences: np.ndarray  # (N + 1,) int64: where the windows of each question begin
    max_answer_length: int  # tokens
    no_answer_threshold: float

    def answers(self, index: int, logits: Sequence[np.ndarray], count: int) -> tuple[list[Candidate], float, float]:
        """Return (the best `count` spans, the score of no answer, its probability) for question `index`.

        logits: (tokens, 2) for each of its windows, the scores to be the first and the last token.
        - The score of a span is the sum of the two, the largest of all windows.
        - The score of no answer is that of the first token, the smallest of all windows (Devlin et al. 2019; their code
          for SQuAD 2).
        - Probabilities are a softmax over no answer and all spans of at most max_answer_length tokens.

        A context without tokens has no span.
        """
        spans = self.spans[index]
        empty = spans[:, 0] >= spans[:, 1]  # a token without a character, such as a space, ends no answer
        longest = min(self.max_answer_length, max(1, len(spans)))
        scores = np.full((len(spans), longest), -np.inf)  # [i, k]: from token i of the context to token i + k
        no_answer = math.inf
        for context_slice, window in zip(self.context_slices[self.sequences[index] :], logits, strict=False):
            begin, number, length = context_slice.tolist()
            inside = window[begin : begin + length].astype(np.float64)
            inside[empty[number : number + length]] = -np.inf
            lasts = np.concatenate([inside[:, 1], np.full(longest, -np.inf)])
            of_window = inside[:, :1] + np.lib.stride_tricks.sliding_window_view(lasts, longest)[:length]
            np.maximum(scores[number : number + length], of_window, out=scores[number : number + length])
            no_answer = min(no_answer, float(window[NO_ANSWER].astype(np.float64).sum()))
        flat = scores.reshape(-1)
        top = max(no_answer, flat.max(initial=-np.inf))
        weights = np.exp(flat - top)
        total = math.exp(no_answer - top) + float(weights.sum())
        found = []
        for i in np.argsort(-flat, kind="stable")[:count].tolist():
            if flat[i] > -np.inf:
                start, end = int(spans[i // longest, 0]), int(spans[i // longest + i % longest, 1])
                text = self.contexts[index][start:end]
                found.append(Candidate(text, start, end, float(flat[i]), float(weights[i]) / total))
        return found, no_answer, math.exp(no_answer - top) / total


def encode_questions(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    question: str = "question",
    context: str = "context",
    answers: str = "answers",
    max_length: int,
    doc_stride: int,
    max_answer_length: int,
    no_answer_threshold: float = 0.0,
) -> TextExamples[Windows]:
    """Return the windows of all questions: the question first, then as much of the context as max_length allows.

    - Neighbouring windows share doc_stride tokens of the context, so every answer of up to doc_stride + 1 tokens is
      whole in one of them.
    - Labels, (S, 2): the first of the row's answers where it is whole in the window, else (0, 0), the first token.
      Both are IGNORE_INDEX where the answer has no token, and, if it is whole in no window, where a part of it is: such
      a window has neither the answer nor none. answers: "" without labels.
    - No token of a context is lost. A question that leaves too little of max_length for the context loses its last
      tokens, and counts as truncated.

    The rows have been checked (data/formats/squad.py). Raises DataError where not even an empty question fits.
    """
    ids, types = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.uint8)]
    labels = [np.empty((0, 2), dtype=np.int64)]
    context_slices = [np.empty((0, 3), dtype=np.int64)]
    spans: list[np.ndarray] = []
    truncated = num_lost = num_tokens = 0
    for begin in range(0, len(rows), CHUNK):
        chunk = rows[begin : begin + CHUNK]
        encodings = tokenizer.encode_batch([(row.values[question], row.values[context]) for row in chunk])
        for row, encoding in zip(chunk, encodings, strict=True):
            spans.append(token_spans(encoding, row.values[context]))
            windows, lost = _split(encoding, len(spans[-1]), max_length, doc_stride)
            truncated += lost > 0
            num_lost += lost
            num_tokens += len(encoding.ids)
            for sequence_ids, sequence_types, _ in windows:
                ids.append(sequence_ids)
                types.append(sequence_types)
            context_slices.append(np.array([context_slice for _, _, context_slice in windows], dtype=np.int64))
            if answers:
                labels.append(_labels(row.values[answers], spans[-1], context_slices[-1]))
    record = Windows(
        contexts=[row.values[context] for row in rows],
        gold_answers=[[answer.text for answer in row.values[answers]] if answers else [] for row in rows],
        spans=spans,
        context_slices=np.concatenate(context_slices),
        sequences=np.cumsum([len(slices) for slices in context_slices], dtype=np.int64),
        max_answer_length=max_answer_length,
        no_answer_threshold=no_answer_threshold,
    )
    return TextExamples(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types),
        offsets=np.cumsum([len(sequence) for sequence in ids], dtype=np.int64),
        labels=np.concatenate(labels) if answers else None,
        ids=[row.id for row in rows],
        truncated=truncated,
        sequences=record.sequences,
        notes=(
            *note_truncated(truncated, len(rows), "questions", f"data.max_length = {max_length}", num_lost, num_tokens),
            *(_note_answers(rows, answers, record, labels[1:]) if answers else ()),
        ),
        record=record,
    )


def _note_answers(rows: Sequence[Row], column: str, record: Windows, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return notes about answers that cannot be learned or predicted; labels: (windows, 2) of each question."""
    num_answers = num_without_tokens = num_in_no_window = num_too_long = 0
    for row, spans, targets in zip(rows, record.spans, labels, strict=True):
        lengths = [len(_answer_tokens(answer, spans)) for answer in row.values[column]]
        num_answers += bool(lengths)
        num_without_tokens += bool(lengths) and not lengths[0]
        num_in_no_window += bool(lengths) and lengths[0] > 0 and not (targets > NO_ANSWER).any()
        num_too_long += bool(lengths) and min(lengths) > record.max_answer_length
    longest = f"question_answering.max_answer_length = {record.max_answer_length}"
    remedy = "raise data.max_length or question_answering.doc_stride; windows with a part of one are not learned"
    return (
        *warn_of_part(num_in_no_window, num_answers, "answers", f"are whole in no window: {remedy}"),
        *warn_of_part(num_too_long, num_answers, "answers", f"have more tokens than {longest}: never predicted"),
        *warn_of_part(num_without_tokens, num_answers, "answers", "have no token, so that they cannot be learned"),
    )


def token_spans(encoding: Encoding, context: str) -> np.ndarray:
    """Return (tokens of the context, 2) int32: the characters of each token, so that a span of tokens is a text.

    A token does not include the spaces around it. It includes the marks behind it that the tokenizer dropped: BERT's
    lower-case models drop the accent of an e + U+0301, and an answer should keep it.
    """
    pairs = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    spans = [list(offsets) for offsets, sequence in pairs if sequence == 1]
    ascii_only = context.isascii()
    for i, span in enumerate(spans):
        while span[0] < span[1] and context[span[0]].isspace():
            span[0] += 1
        while span[0] < span[1] and context[span[1] - 1].isspace():
            span[1] -= 1
        limit = spans[i + 1][0] if i + 1 < len(spans) else len(context)
        while not ascii_only and span[0] < span[1] < limit and _is_mark(context[span[1]]):
            span[1] += 1
    return np.array(spans, dtype=np.int32).reshape(-1, 2)


def _is_mark(character: str) -> bool:
    """Return whether a character belongs to the one before: a combining mark, a joiner, a variation selector."""
    return unicodedata.category(character) in MARKS


def _split(
    encoding: Encoding, tokens: int, max_length: int, doc_stride: int
) -> tuple[list[tuple[np.ndarray, np.ndarray, tuple[int, int, int]]], int]:
    """Return ([(ids, type ids, row of Windows.context_slices) per window], the tokens that the question lost)."""
    ids, types = np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.uint8)
    sequence = np.array([-1 if number is None else number for number in encoding.sequence_ids])
    # The context's first token; a context without a token would be before the last special one.
    begin = int(np.argmax(sequence == 1)) if tokens else len(ids) - 1
    of_question = np.flatnonzero(sequence == 0)
    # The minimum by which a window advances; with less there would be hundreds of windows.
    advance = max(1, max_length // 16)
    room = max_length - (len(ids) - tokens)
    missing = min(tokens, doc_stride + advance) - room
    if missing > len(of_question):
        fits = max_length - (len(ids) - tokens - len(of_question)) - advance
        hint = f"lower it to {fits} or less, or raise data.max_length" if fits >= 0 else "raise data.max_length"
        raise DataError(
            f"data.max_length = {max_length} is too short for question_answering.doc_stride = {doc_stride}: {hint}"
        )
    before = np.arange(begin)
    if missing > 0:
        before = np.setdiff1d(before, of_question[len(of_question) - missing :])
        room += missing
    windows = []
    for number in range(0, max(1, tokens - doc_stride), room - doc_stride) if tokens > room else [0]:
        length = min(room, tokens - number)
        kept = np.concatenate([before, np.arange(begin + number, begin + number + length)])
        kept = np.concatenate([kept, np.arange(begin + tokens, len(ids))])
        windows.append((ids[kept], types[kept], (len(before), number, length)))
    return windows, max(0, missing)


def _answer_tokens(answer: Any, spans: np.ndarray) -> np.ndarray:
    """Return the tokens of the context that have a character of the answer; spans: as in Windows."""
    text, start = answer
    touched = (spans[:, 0] < start + len(text)) & (spans[:, 1] > start) & (spans[:, 0] < spans[:, 1])
    return np.flatnonzero(touched)


def _labels(answers: Sequence[Any], spans: np.ndarray, context_slices: np.ndarray) -> np.ndarray:
    """Return (windows, 2): the tokens of the first answer; (0, 0) where the window does not have all of it.

    Windows with a part of an answer that none has whole are not learned, and so is an answer without tokens.
    """
    if not answers:
        return np.full((len(context_slices), 2), NO_ANSWER, dtype=np.int64)
    tokens = _answer_tokens(answers[0], spans)
    if not len(tokens):
        return np.full((len(context_slices), 2), IGNORE_INDEX, dtype=np.int64)
    begin, number, length = context_slices[:, :1], context_slices[:, 1:2], context_slices[:, 2:]
    whole = (tokens[0] >= number) & (tokens[-1] < number + length)
    touched = (tokens[-1] >= number) & (tokens[0] < number + length)
    elsewhere = np.where(touched & ~whole.any(), IGNORE_INDEX, NO_ANSWER)
    return np.where(whole, begin + tokens[[0, -1]] - number, elsewhere)
