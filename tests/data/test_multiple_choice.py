"""Choices as sequences: pairs of texts as transformers' scripts make them, truncation, and choices that look alike."""

from __future__ import annotations

import random

import pytest
from support.task_data import WORDS, choice, write_model

from data import Row, load_tokenizer
from data.multiple_choice import encode_choices, pair_texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_model("multiple-choice", tmp_path_factory.mktemp("model")))


def row_of(number: int, values: dict) -> Row:
    return Row(str(number), number, values)


@pytest.mark.parametrize(
    ("context", "question", "pair"),
    [
        ("He sat.", "Then he", ("He sat.", "Then he ate.")),
        ("He sat.", "Then he _ again", ("He sat.", "Then he ate. again")),
        ("He sat.", "Then he ____", ("He sat.", "Then he ate.")),
        ("He sat.", "", ("He sat.", "ate.")),
        ("", "Then he _", ("Then he _", "ate.")),
        ("他坐。", "然后他？", ("他坐。", "然后他？ate.")),
    ],
)
def test_the_two_texts_of_a_choice(context, question, pair):
    assert pair_texts(context, question, ["ate."]) == [pair]


@pytest.mark.parametrize("max_length", [7, 9, 24, 64])
def test_only_the_context_is_truncated_as_the_library_does(tokenizer, max_length):
    """transformers calls this truncation="only_first"; it refuses a choice that leaves no room for the context."""
    rng = random.Random(0)
    rows = [row_of(i, choice(rng)) for i in range(30)]
    found = encode_choices(rows, tokenizer, max_length=max_length)
    tokenizer.enable_truncation(max_length, strategy="only_first")
    texts = [pair_texts(*(row.values[key] for key in ("context", "question", "choices"))) for row in rows]
    expected = [tokenizer.encode(*pair) for of_row in texts for pair in of_row]
    tokenizer.no_truncation()
    whole = [tokenizer.encode(*pair) for of_row in texts for pair in of_row]
    assert [found.sequence(i) for i in range(len(expected))] == [encoding.ids for encoding in expected]
    assert found.token_type_ids.tolist() == [kind for encoding in expected for kind in encoding.type_ids]
    assert found.truncated == sum(len(encoding.ids) > max_length for encoding in whole)
    assert [bool(found.notes), found.truncated > 0] in ([True, True], [False, False])
    assert [len(of_row) for of_row in texts] == (found.sequences[1:] - found.sequences[:-1]).tolist()
    assert found.record.choices == [row.values["choices"] for row in rows]
    batch = found.batch([3, 0])
    assert batch.sequences == (len(texts[3]), len(texts[0]))
    assert (batch.num_targets, batch.labels.tolist()) == (2, [rows[3].values["label"], rows[0].values["label"]])


def test_a_choice_that_is_too_long_by_itself_is_shortened(tokenizer):
    choices = [" ".join(WORDS[:9]), "cat"]
    rows = [row_of(1, {"context": "the house", "question": "is", "choices": choices, "label": 0})]
    found = encode_choices(rows, tokenizer, max_length=8)
    assert [len(found.sequence(i)) for i in range(2)] == [8, 7]
    assert tokenizer.decode(found.sequence(0), skip_special_tokens=True) == " ".join(["is", *WORDS[:4]])


def test_the_first_and_last_tokens_of_the_context(tokenizer):
    rows = [row_of(1, {"context": " ".join(WORDS[:12]), "question": "is", "choices": ["cat", "dog"], "label": 0})]
    found = encode_choices(rows, tokenizer, max_length=9, long_texts="head+tail")
    assert tokenizer.decode(found.sequence(1)) == f"{WORDS[0]} {' '.join(WORDS[9:12])} is dog"


def test_choices_that_the_model_reads_alike_are_counted(tokenizer):
    values = {"context": "the house", "question": "is", "label": 0}
    rows = [row_of(i, values | {"choices": texts}) for i, texts in enumerate((["cat", "dog"], ["Ulm", "Rome"]))]
    (note,) = encode_choices(rows, tokenizer, max_length=20).notes
    assert note == "warning: 1 of 2 examples have choices with the same tokens, which cannot be told apart"


def test_the_right_choice_is_shown(tokenizer):
    rows = [row_of(1, {"context": "the house", "question": "is", "choices": ["cat", "dog", "red"], "label": 1})]
    shown = encode_choices(rows, tokenizer, max_length=20).show(0, tokenizer, ())
    assert shown[0] == "id 1  the right choice, 2 of 3"
    assert shown[1] == "[CLS] the house [SEP] is dog [SEP]"
