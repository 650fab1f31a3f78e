"""Properties of spans in random texts: what is read is in its place, and what is predicted is a part of the text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from support.language import byte_tokenizer
from tokenizers import processors

from data import Row
from data.formats.squad import Answer, read_questions
from data.question_answering import encode_questions
from data.relation_extraction import ROLES, Entity, encode_relations, mark_entities, read_relations

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FAST = settings(max_examples=25, derandomize=True, deadline=None, database=None)
# Letters, an accent of its own, an emoji of two UTF-16 units, spaces, Han, a right-to-left letter, a joiner.
PIECES = st.sampled_from(["a", "B", "e\u0301", "é", "\U0001f600", " ", "\u3000", "  ", "中", "א", "\u200d", "<s>", '"'])
TEXTS = st.lists(PIECES, min_size=4, max_size=40).map("".join).filter(lambda text: len(text.split()) > 1)


@st.composite
def texts_with_spans(draw: st.DrawFn, count: int) -> tuple[str, list[tuple[int, int]]]:
    """Return a text and `count` spans of it that do not overlap, none of them empty."""
    text = draw(TEXTS)
    places = draw(st.lists(st.integers(0, len(text)), min_size=2 * count, max_size=2 * count, unique=True).map(sorted))
    spans = list(zip(places[::2], places[1::2], strict=True))
    hypothesis.assume(all(text[start:end].strip() for start, end in spans))
    return text, spans


def tokenizer_of_bytes():
    tokenizer = byte_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>",
        pair="<|endoftext|> $A <|endoftext|> $B:1 <|endoftext|>:1",
        special_tokens=[("<|endoftext|>", end)],
    )
    return tokenizer


TOKENIZER = tokenizer_of_bytes()


def read_one(read, row: dict, **more) -> Row:
    """Return what `read` makes of a file with this row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        (found,) = read(str(path), **more)
    return found


@FAST
@given(texts_with_spans(1))
def test_gold_answers_equal_their_texts_in_file_and_tokens(drawn):
    context, [(start, end)] = drawn
    answers = {"text": [context[start:end]], "answer_start": [start]}
    row = read_one(read_questions, {"question": "where", "context": context, "answers": answers})
    assert row.values["answers"] == [Answer(context[start:end], start)]
    examples = encode_questions([row], TOKENIZER, max_length=64, doc_stride=20, max_answer_length=200)
    spans, slices = examples.record.spans[0], examples.record.context_slices
    for label, (begin, number, length) in zip(examples.labels.tolist(), slices.tolist(), strict=True):
        if min(label) > 0:
            first, last = (position - begin + number for position in label)
            assert number <= first <= last < number + length
            # Bytes of one character are several tokens, and spaces around an answer belong to no token.
            assert context[spans[first, 0] : spans[last, 1]].strip() == context[start:end].strip()


@FAST
@given(TEXTS, st.integers(0, 2**32 - 1))
def test_predicted_spans_are_parts_of_the_context(context, seed):
    row = Row("1", 1, {"question": "where", "context": context, "answers": []})
    examples = encode_questions([row], TOKENIZER, max_length=48, doc_stride=12, max_answer_length=9)
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=(len(examples.sequence(s)), 2)) for s in range(len(examples.offsets) - 1)]
    found, _, no_answer = examples.record.answers(0, logits, 5)
    for candidate in found:
        assert context[candidate.start : candidate.end] == candidate.text
        assert 0 <= candidate.start < candidate.end <= len(context)
    assert sum(candidate.probability for candidate in found) + no_answer <= 1 + 1e-9


@FAST
@given(texts_with_spans(2), st.booleans())
def test_entities_equal_their_texts_and_are_marked_once(drawn, is_swapped):
    text, spans = drawn
    spans = spans[::-1] if is_swapped else spans
    entities = [{"start": start, "end": end, "text": text[start:end]} for start, end in spans]
    row = read_one(read_relations, {"text": text, **dict(zip(ROLES, entities, strict=True))})
    assert [row.values[role] for role in ROLES] == [Entity(start, end) for start, end in spans]
    marked, places = mark_entities(text, *(row.values[role] for role in ROLES))
    for mark, (start, end), (first, last) in zip("@#", spans, places, strict=True):
        assert marked[first:last] == f"{mark} {text[start:end].strip()} {mark}"
    examples = encode_relations([row], TOKENIZER, max_length=24)
    begins = [TOKENIZER.id_to_token(examples.sequence(0)[marker]) for marker in examples.markers[0].tolist()]
    assert begins == ["@", "#"]
