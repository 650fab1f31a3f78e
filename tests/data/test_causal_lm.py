"""Texts for a causal language model: files, targets and bytes, prompts."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from support.language import END, TEXTS, byte_tokenizer, rows_of
from support.task_data import tiny_gpt2
from tokenizers import Tokenizer
from tokenizers.models import BPE

from data import DataError
from data.batch import IGNORE_INDEX
from data.causal_lm import (
    encode_prompts,
    encode_texts_for_lm,
    find_end_token,
    read_texts,
    split_at_texts,
    split_into_blocks,
)
from data.formats.options import FileOptions
from data.row import Row


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    return byte_tokenizer()


# What is predicted


WAYS = {
    "each text": {},
    "blocks": {"concatenate": True},
    "document mask": {"concatenate": True, "document_mask": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_length", [1, 2, 7, 64])
def test_each_token_and_each_end_is_a_target_once(by_bytes, way, max_length):
    examples = encode_texts_for_lm(rows_of(TEXTS), by_bytes, max_length=max_length, **WAYS[way])
    assert by_bytes.decode(examples.token_labels.tolist(), skip_special_tokens=False) == END.join([*TEXTS, ""])
    assert examples.lengths.max() <= max_length
    assert examples.truncated == 0
    before = 0
    for begin, end in itertools.pairwise(examples.offsets.tolist()):
        labels = examples.token_labels[begin:end].tolist()
        # the first of a continued text is the last target of what it continues
        assert examples.input_ids[begin:end].tolist() == [before, *labels[:-1]]
        before = labels[-1]
        if way == "document mask":  # a part of one text
            assert END not in by_bytes.decode(labels[:-1], skip_special_tokens=False)
    if way != "each text":
        assert set(examples.lengths[:-1]) <= {max_length}


@pytest.mark.parametrize("way", WAYS)
def test_ids_say_which_part_of_which_text(by_bytes, way):
    examples = encode_texts_for_lm(rows_of(["abc", "abcdefg", "a"]), by_bytes, max_length=4, **WAYS[way])
    alone = way == "each text"
    assert examples.ids == (["1", "2", "2#2", "3"] if alone else ["block 1", "block 2", "block 3", "block 4"])
    assert examples.lengths.tolist() == [4, 4, 4, 2]
    if alone:  # the second part of one text does not take the id of another
        rows = [Row(name, i, {"text": text}) for i, (name, text) in enumerate([("1", "abcdefg"), ("1#2", "a")])]
        assert encode_texts_for_lm(rows, by_bytes, max_length=4).ids == ["1", "1##2", "1#2"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_bytes_of_all_examples_are_those_of_the_texts(by_bytes, way, max_length):
    rng = random.Random(max_length)
    characters = "ab é床😀\u0301\t" + END[0]
    texts = TEXTS + ["".join(rng.choices(characters, k=rng.randint(1, 30))) for _ in range(200)]
    examples = encode_texts_for_lm(rows_of(texts), by_bytes, max_length=max_length, **WAYS[way])
    assert len(examples.record.num_bytes) == len(examples)
    assert examples.record.num_bytes.sum() == sum(len(text.encode()) for text in texts)
    assert (examples.record.num_bytes >= 0).all()
    if way == "each text" and max_length == 50:
        whole = [i for i, name in enumerate(examples.ids) if "#" not in name and f"{name}#2" not in examples.ids]
        assert [examples.record.num_bytes[i] for i in whole] == [
            len(texts[int(examples.ids[i]) - 1].encode()) for i in whole
        ]


# Blocks of several texts


def test_a_document_mask_only_divides_the_blocks(by_bytes):
    texts = ["abc", "abcdefghij", "a", "b"]
    across, within = (
        encode_texts_for_lm(rows_of(texts), by_bytes, max_length=6, **WAYS[way]) for way in ("blocks", "document mask")
    )
    for name in ("input_ids", "token_labels", "lengths"):
        assert np.array_equal(getattr(across, name), getattr(within, name))
    assert within.ids == across.ids
    assert np.array_equal(within.record.num_bytes, across.record.num_bytes)
    assert within.num_targets == across.num_targets == len("".join(texts)) + len(texts)
    assert within.fingerprint() != across.fingerprint()
    assert [[*within.batch([i]).lengths] for i in range(4)] == [[4, 2], [6], [3, 2, 1], [1]]
    batch = within.batch([3, 0, 2])
    assert (batch.lengths, batch.sequences, batch.num_targets) == ((1, 4, 2, 3, 2, 1), (1, 2, 3), 13)
    assert torch.equal(batch.input_ids, across.batch([3, 0, 2]).input_ids)
    assert torch.equal(batch.labels, across.batch([3, 0, 2]).labels)
    assert within.batch([]).num_tokens == 0
    note = "4 texts in 4 blocks of data.max_length = 6 tokens; 2 of them continue in the next block"
    assert within.notes == across.notes == (note,)
    assert within.show(2, by_bytes, ())[:2] == ["id block 3  first of 3 sequences", "h i j"]


@pytest.mark.parametrize("seed", range(20))
def test_blocks_and_their_texts_are_those_found_by_token(seed):
    """The oracle walks token by token."""
    rng = random.Random(seed)
    max_length = rng.choice([1, 2, 5, 16])
    lengths = [rng.choice([1, 2, 3, max_length, 40]) for _ in range(rng.randint(0, 60))]
    text_of = [i for i, length in enumerate(lengths) for _ in range(length)]
    blocks = [text_of[i : i + max_length] for i in range(0, len(text_of), max_length)]
    counts = np.array(lengths, dtype=np.int64)
    borders = split_into_blocks(counts, max_length)
    offsets, first = split_at_texts(borders, counts)
    assert np.array_equal(offsets[first], borders)
    found = [np.diff(offsets[a : b + 1]).tolist() for a, b in itertools.pairwise(first.tolist())]
    assert found == [[len([*part]) for _, part in itertools.groupby(block)] for block in blocks]


def test_no_rows_make_no_examples(by_bytes):
    for examples in (encode_texts_for_lm([], by_bytes, max_length=4), encode_prompts([], by_bytes, max_length=4)):
        assert len(examples) == 0
        assert examples.batch([]).num_tokens == 0


def test_p13_end_of_text_is_learned_although_it_is_the_pad(by_bytes, tmp_path):
    model = tiny_gpt2(tmp_path, pad_token_id=0)
    examples = encode_texts_for_lm(rows_of(["ab", "abcd"]), by_bytes, max_length=64)
    assert (examples.token_labels == 0).sum() == 2
    assert not (examples.token_labels == IGNORE_INDEX).any()
    batch = examples.batch([0, 1])
    out = model(batch)
    (gradient,) = torch.autograd.grad(out.loss_sum, out.logits)
    ends = batch.labels == 0
    assert (gradient[ends, 0] < -0.5).all()  # p - 1: what only the target's own logit can have


def test_a_tokenizer_without_an_end_of_text_says_what_is_needed():
    with pytest.raises(DataError, match="no token that ends a text"):
        find_end_token(Tokenizer(BPE({"a": 0}, [])))


# Files


def test_lines_of_text_are_texts(tmp_path):
    file = tmp_path / "poems.txt"
    file.write_bytes("\ufeff床前明月光\r\n\r\n  \nsecond line \n".encode())
    rows = read_texts(str(file), "text")
    assert [(row.id, row.line, row.values["text"]) for row in rows] == [
        ("1", 1, "床前明月光"),
        ("4", 4, "second line "),
    ]
    renamed = file.rename(tmp_path / "poems")
    assert len(read_texts(str(renamed), "text", options=FileOptions(format="text"))) == 2
    with pytest.raises(DataError, match=r"have no column 'poet'; leave data\.group_column out"):
        read_texts(str(renamed), "text", group="poet", options=FileOptions(format="text"))


BAD = {
    "not UTF-8": (b"good\n\xff\xfe\n", ".txt", "2: not UTF-8"),
    "NUL": (b"good\nno\0t\n", ".txt", "2: a NUL character"),
    "no line": (b"\n \n", ".txt", "no lines of text"),
    "too long": (b"x" * 1_000_001, ".txt", "1: 1,000,001 characters in one line"),
    "no column": (b'{"text": "a"}\n{"txt": "a"}\n', ".jsonl", "2: no column 'text'"),
    "empty": (b'{"text": "a"}\n{"text": " "}\n', ".jsonl", "2: 'text' is empty"),
    "number": (b'{"text": 3}\n', ".jsonl", "1: 'text' should be text, not 3"),
    "null": (b'{"text": null}\n', ".jsonl", "1: column 'text' is null"),
    "twice": (b'{"text": "a", "id": 1}\n{"text": "a", "id": 1}\n', ".jsonl", "2: the id '1' is that of line 1 too"),
}


@pytest.mark.parametrize(("content", "suffix", "reason"), BAD.values(), ids=BAD)
def test_f13_a_bad_line_is_named(tmp_path, content, suffix, reason):
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts(str(file), "text")
    assert f"{file}:" in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(("name", "reason"), [("none.txt", "no such file"), ("", "cannot be read: Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path, name, reason):
    with pytest.raises(DataError, match=reason):
        read_texts(str(tmp_path / name), "text", options=FileOptions(format="text"))
