"""Rows of text -> examples: the tokenizer's files, encoding against transformers, labels, P13 (no padding)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from support.wordpiece import VOCAB, odd_texts, write_vocab
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import DataError, Row, Rows, labels, load_tokenizer
from data import text_classification as texts
from data.errors import ErrorList
from data.text_classification import encode_texts
from engine.config import DataSettings
from engine.tasks import TASKS, TaskSettings, read_training_data

TASK = TASKS["text-classification"]


def oracle(folder: Path):
    return pytest.importorskip("transformers").BertTokenizer.from_pretrained(str(folder))


# Encoding


def rows_of(first: list[str], second: list[str] | None = None) -> list[Row]:
    values = (
        [{"a": a} for a in first] if second is None else [{"a": a, "b": b} for a, b in zip(first, second, strict=True)]
    )
    return [Row(f"r{i}", i + 1, value) for i, value in enumerate(values)]


def encode(tokenizer: Tokenizer, rows: list[Row], max_length: int = 512, labels: tuple[str, ...] = ()):
    return encode_texts(
        rows,
        tokenizer,
        text="a",
        text_pair="b" if "b" in rows[0].values else "",
        label="label" if labels else "",
        labels=labels,
        max_length=max_length,
    )


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("max_length", [4, 5, 8, 13, 40, 512])
def test_encoding_and_truncation_equal_those_of_transformers(tmp_path, pair, max_length):
    tokenizer, theirs = load_tokenizer(write_vocab(tmp_path)), oracle(tmp_path)
    first, second = odd_texts(150, seed=2), odd_texts(150, seed=3)[::-1]
    examples = encode(tokenizer, rows_of(first, second if pair else None), max_length)
    longer = 0
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        text = (a, b) if pair else (a,)
        expected = theirs(*text, truncation="longest_first", max_length=max_length)
        span = slice(examples.offsets[i], examples.offsets[i + 1])
        assert examples.input_ids[span].tolist() == expected["input_ids"]
        assert examples.token_type_ids[span].tolist() == expected["token_type_ids"]
        longer += len(theirs(*text)["input_ids"]) > max_length
    assert examples.lengths.max() <= max_length
    assert examples.truncated == longer
    assert (longer > 0) == (max_length < 40)


def test_encoding_leaves_the_tokenizer_as_it_was(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    encode(tokenizer, rows_of(["the film was good"]), max_length=4)
    assert tokenizer.truncation is None
    assert len(tokenizer.encode("the film was good").ids) == 6


def test_texts_are_encoded_in_chunks_without_a_seam(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    rows = rows_of(odd_texts(50))
    whole = encode(tokenizer, rows, max_length=9)
    for size in (1, 7, 50):
        monkeypatch.setattr(texts, "CHUNK", size)
        chunked = encode(tokenizer, rows, max_length=9)
        assert (chunked.fingerprint(), chunked.ids, chunked.truncated) == (
            whole.fingerprint(),
            whole.ids,
            whole.truncated,
        )


def test_a_chunk_is_bounded_in_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 100)
    inputs = [("x" * a, "y" * b) for a, b in ((30, 30), (40, 0), (1, 0), (500, 2), (0, 0), (99, 1), (0, 1))]
    assert [len(chunk) for chunk in texts.split_into_chunks(inputs)] == [2, 1, 1, 2, 1]
    assert [pair for chunk in texts.split_into_chunks(inputs) for pair in chunk] == inputs
    assert [len(chunk) for chunk in texts.split_into_chunks(["x" * 60] * 3)] == [1, 1, 1]
    assert list(texts.split_into_chunks([])) == []


def test_texts_without_labels_need_no_more_than_their_column(tmp_path):
    examples = encode_texts([Row("1", 1, {"text": "good film"})], load_tokenizer(write_vocab(tmp_path)), max_length=8)
    assert (len(examples), examples.labels, examples.lengths.tolist()) == (1, None, [4])


@pytest.mark.parametrize("pad", ["[PAD]", "[SEP]", "[CLS]", "film"])
def test_p13_no_id_is_taken_for_padding(tmp_path, pad):
    """Where a text ends is known from its length, so a pad token that is also the end of a text changes nothing."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, VOCAB.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_padding(pad_id=VOCAB.index(pad), pad_token=pad)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = [["film", "[SEP]", "[PAD]", "[PAD]"], ["good"], ["[PAD]"], ["was", "film", "film"]]
    examples = encode(load_tokenizer(tmp_path), rows_of([" ".join(text) for text in words]))
    batch = examples.batch([0, 1, 2, 3])
    expected = [["[CLS]", *text, "[SEP]"] for text in words]
    assert batch.lengths == tuple(map(len, expected))
    assert [VOCAB[i] for i in batch.input_ids.tolist()] == [token for text in expected for token in text]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


# Texts and labels as they are in the file


def labelled(values: list[object]) -> Rows:
    return Rows(Row(str(i), i + 1, {"a": "x", "label": value}) for i, value in enumerate(values))


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"]),
        (["10", "9", "-1", "2"], ["-1", "2", "9", "10"]),
        ([10, 9, -1, 2], ["-1", "2", "9", "10"]),
        ([2.5, 10.0, -0.5], ["-0.5", "2.5", "10.0"]),
        (["1", "1", "1.0", "01"], ["01", "1"]),
        ([True, False, True], ["false", "true"]),
        (["--1", "-", "1"], ["-", "--1", "1"]),
        (["²", "1", "٣"], ["1", "²", "٣"]),
        (["nan", "inf", "1e5"], ["1e5", "inf", "nan"]),
        ([" a", "a ", "b"], ["a", "b"]),
        (["é", "z", "Z", "中"], ["Z", "z", "é", "中"]),
    ],
)
def test_p09_label_names_do_not_depend_on_the_order_of_rows(found, names):
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(found)
        assert labels.find_label_names("FILE", labelled(found), "label", ()) == names
    labels.check_label_names("FILE", labelled(found), "label", names)


def test_p09_declared_labels_keep_their_order(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    rows = labelled(["b", " a ", "c", "b"])
    declared = labels.find_label_names("FILE", rows, "label", ("c", "b", "a", "unseen"))
    assert declared == ["c", "b", "a", "unseen"]
    assert encode(tokenizer, rows, labels=tuple(declared)).labels.tolist() == [1, 2, 0, 1]
    assert encode(tokenizer, rows[::-1], labels=tuple(declared)).labels.tolist() == [1, 0, 2, 1]
    assert encode(tokenizer, rows).labels is None


def test_one_class_is_not_enough():
    with pytest.raises(DataError, match="FILE: column 'label' has only one class, 'a'"):
        labels.find_label_names("FILE", labelled(["a", " a"]), "label", ())
    with pytest.raises(DataError, match="FILE: column 'label' has only one class, 'a'"):
        labels.find_label_names("FILE", labelled(["a", " a"]), "label", ("a", "b"))
    # One that was not declared is more likely a typing error, which check_label_names reports by its line.
    assert labels.find_label_names("FILE", labelled(["c", "c"]), "label", ("a", "b")) == ["a", "b"]


def found_in(rows: list[Row], label: str = "") -> list[str]:
    errors = ErrorList()
    texts.check_texts("FILE", rows, ["a"], label, errors)
    return [text for _, text in errors.found]


def test_f13_bad_labels_and_texts_are_reported_together():
    rows = labelled(["a", "c", "A", "b"])
    with pytest.raises(DataError) as caught:
        labels.check_label_names("FILE", rows, "label", ["a", "b", ""])
    assert str(caught.value).split("\n") == [
        "FILE:2: unknown label 'c'; the labels are 'a', 'b', ''",
        "FILE:3: unknown label 'A'; the labels are 'a', 'b', ''; 'A' and 'a' differ in case only",
    ]
    assert found_in(labelled(["a", "", "  ", [1], {"a": 1}, 0, False]), "label") == [
        "FILE:2: the label in 'label' is empty",
        "FILE:3: the label in 'label' is empty",
        "FILE:4: a label should be text or a number, not [1]",
        "FILE:5: a label should be text or a number, not {'a': 1}",
    ]
    rows = [Row(str(i), i + 1, {"a": value}) for i, value in enumerate(["x", 3, None, "", " \u3000", ["x"], True])]
    assert found_in(rows) == [
        "FILE:2: 'a' should be text, not 3",
        "FILE:3: 'a' should be text, not None",
        "FILE:4: 'a' is empty",
        "FILE:5: 'a' is empty",
        "FILE:6: 'a' should be text, not ['x']",
        "FILE:7: 'a' should be text, not True",
    ]


def test_f13_all_that_is_wrong_in_all_files_is_reported_together(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "", "label": "a"}\nnot json\n{"text": "x", "label": ""}\n')
    (tmp_path / "val.jsonl").write_text('{"text": "x", "label": []}\n')
    names = [str(tmp_path / name) for name in ("train.jsonl", "val.jsonl", "none.jsonl")]
    settings = DataSettings(train=names[0], validation=names[1], test=names[2])
    with pytest.raises(DataError) as caught:
        read_training_data(TASK, TaskSettings(TASK.columns.fill(settings)), 0)
    assert [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).split("\n")] == [
        "train.jsonl:1: 'text' is empty",
        "train.jsonl:2: not JSON: Expecting value: line 1 column 1 (char 0)",
        "train.jsonl:3: the label in 'label' is empty",
        "val.jsonl:1: a label should be text or a number, not []",
        "none.jsonl: no such file",
        '(data.bad_rows = "skip" leaves such rows out)',
    ]


def test_f13_unknown_labels_of_all_files_are_reported_together(tmp_path):
    names = [str(tmp_path / name) for name in ("train.jsonl", "val.jsonl", "test.jsonl")]
    for name, other in zip(names, "bxy", strict=True):
        Path(name).write_text("".join(f'{{"text": "x", "label": "{label}"}}\n' for label in ("a", other)))
    with pytest.raises(DataError) as caught:
        read_training_data(TASK, TaskSettings(TASK.columns.fill(DataSettings(*names))), 0)
    assert [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).split("\n")] == [
        "val.jsonl:2: unknown label 'x'; the labels are 'a', 'b'",
        "test.jsonl:2: unknown label 'y'; the labels are 'a', 'b'",
        '(data.bad_rows = "skip" leaves such rows out)',
    ]
