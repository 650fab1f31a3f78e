"""Masks of texts: BERT's shares, whole words, functions of (seed, epoch, id) and of nothing else."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data import IGNORE_INDEX, Batch, DataError, MicroBatching, Row, TextExamples, training_steps
from data.masked_lm import (
    DynamicallyMasked,
    encode_texts_for_mlm,
    encode_texts_to_fill,
    find_continued_words,
    find_masking,
    without_masks,
)
from data.segmentation import load_segmenter

PIECES = [
    "go",
    "##od",
    "ba",
    "##d",
    "film",
    "##s",
    "the",
    "a",
    ".",
    "我",
    "来",
    "到",
    "北",
    "京",
    "清",
    "华",
    "大",
    "学",
]
WORDS = ["good", "bad", "film", "films", "the", "a", ".", "mystery"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHINESE = "我来到北京清华大学"


def word_pieces() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *PIECES])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def rows_of(count: int, seed: int = 0, longest: int = 12) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(f"r{i}", i + 1, {"text": " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))}) for i in range(count)
    ]


def encode(rows: list[Row], probability: float = 0.15, max_length: int = 16, **options) -> TextExamples:
    tokenizer = word_pieces()
    masking = find_masking(tokenizer, probability)
    return encode_texts_for_mlm(rows, tokenizer, max_length=max_length, masking=masking, **options)


def dynamic(examples: TextExamples, probability: float = 0.15, seed: int = 0) -> DynamicallyMasked:
    return DynamicallyMasked(examples, find_masking(word_pieces(), probability), seed, word_pieces())


def by_id(*batches: Batch) -> dict[str, tuple[list[int], list[int]]]:
    """Return {id: (tokens with masks, labels)}."""
    found = {}
    for batch in batches:
        parts = zip(batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths), strict=True)
        for id, (ids, labels) in zip(batch.ids, parts, strict=True):
            assert id not in found
            found[id] = (ids.tolist(), labels.tolist())
    return found


def test_shares_of_bert_and_no_special_token_is_chosen():
    """Of many tokens 15% are chosen: 80% of them are masked, 10% are random tokens, 10% stay."""
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(1_000))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    masking = find_masking(tokenizer, 0.15)
    ids = np.random.default_rng(0).integers(0, len(vocabulary), 300_000)
    masked, labels = masking.mask(ids, None, np.array([100_000, 200_000]), [[1], [2]])
    chosen, special = labels != IGNORE_INDEX, ids < len(SPECIAL)
    assert not chosen[special].any()
    assert chosen[~special].mean() == pytest.approx(0.15, rel=0.02)
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
    is_mask, stays = masked == SPECIAL.index("[MASK]"), masked == ids
    assert (is_mask & chosen).sum() / chosen.sum() == pytest.approx(0.8, rel=0.01)
    assert (stays & chosen).sum() / chosen.sum() == pytest.approx(0.1, rel=0.05)
    others = masked[chosen & ~is_mask & ~stays]
    assert len(others) / chosen.sum() == pytest.approx(0.1, rel=0.05)
    assert others.min() >= len(SPECIAL)  # a random token is a word
    assert len(np.unique(others)) > 900
    assert np.bincount(others, minlength=1_005)[5:].max() < 20  # of some 4 each


@pytest.mark.parametrize("options", [{}, {"whole_words": True}, {"concatenate": True, "whole_words": True}])
def test_masks_depend_on_the_seed_the_epoch_and_the_id_alone(options):
    """The order, the micro-batches, the ranks and the workers make no difference."""
    rows = rows_of(40)
    examples = encode(rows, **options)
    masked = dynamic(examples)
    every = np.arange(len(examples))
    expected = by_id(masked.batch(every, 3))
    assert by_id(*(masked.batch([i], 3) for i in every[::-1])) == expected
    if "concatenate" not in options:  # a block depends on the texts before it
        fewer = dynamic(encode(rows[::-3], **options))
        found = by_id(fewer.batch(np.arange(len(fewer)), 3))
        assert found == {id: expected[id] for id in found}
    for other in (by_id(masked.batch(every, 4)), by_id(dynamic(examples, seed=1).batch(every, 3))):
        assert sum(other[id] != expected[id] for id in expected) > len(expected) / 2

    def of_epoch_1(limits: MicroBatching, num_workers: int = 0) -> list[Batch]:
        steps = training_steps(masked, len(examples), 0, limits, start=1, num_workers=num_workers)
        return next(iter(steps))

    expected = by_id(masked.batch(every, 1))
    assert by_id(*of_epoch_1(MicroBatching(max_tokens=30))) == expected
    assert by_id(*of_epoch_1(MicroBatching(), num_workers=1)) == expected
    assert by_id(*(b for rank in range(2) for b in of_epoch_1(MicroBatching(3, 0, rank, 2)))) == expected


def test_evaluation_has_one_set_of_masks():
    """They depend on the id alone, so all seeds evaluate the same; the tokens below are those of the text."""
    rows = rows_of(30)
    examples = encode(rows)
    every = range(len(examples))
    assert by_id(examples.batch(every)) == by_id(dynamic(examples, seed=7).batch(every))
    assert by_id(examples.batch(every)) == by_id(encode(rows[::-1]).batch(every))
    plain = word_pieces().encode_batch([row.values["text"] for row in rows])
    expected = [list(encoding.ids[:16]) for encoding in plain if len(encoding) <= 16]
    restored = without_masks(examples)
    found = [restored.sequence(i) for i in every if "#" not in examples.ids[i] and len(restored.sequence(i)) < 16]
    assert len(found) > 20
    assert all(ids in expected for ids in found)
    for epoch in range(3):  # training restores the text before it masks it again
        batch = dynamic(examples).batch(every, epoch)
        ids, labels = batch.input_ids.numpy(), batch.labels.numpy()
        np.testing.assert_array_equal(np.where(labels == IGNORE_INDEX, ids, labels), restored.input_ids)
        assert batch.num_targets == np.count_nonzero(labels != IGNORE_INDEX)


def test_each_example_has_a_target_however_short():
    examples = encode(rows_of(200, longest=3), 0.001)
    for labels in (examples.token_labels, dynamic(examples, 0.001).batch(range(len(examples)), 0).labels.numpy()):
        counts = [np.count_nonzero(part != IGNORE_INDEX) for part in np.split(labels, examples.offsets[1:-1])]
        texts = np.split(without_masks(examples).input_ids, examples.offsets[1:-1])
        assert [count > 0 for count in counts] == [bool((ids >= len(SPECIAL)).any()) for ids in texts]
        assert max(counts) == 1


def test_a_word_is_masked_as_a_whole():
    """All pieces of a word are targets, or none is; words are chosen with the probability."""
    rows = [Row(str(i), i + 1, {"text": " ".join(["good", "bad", "films", "the"] * 25)}) for i in range(40)]
    examples = encode(rows, 0.3, 200, whole_words=True)
    labels = dynamic(examples, 0.3).batch(range(40), 0).labels.numpy().reshape(40, -1)[:, 1:-1]
    words = (labels != IGNORE_INDEX).reshape(40, 25, 7)  # go ##od ba ##d film ##s the
    for first in (0, 2, 4):
        np.testing.assert_array_equal(words[..., first], words[..., first + 1])
    assert words[..., [0, 2, 4, 6]].mean() == pytest.approx(0.3, rel=0.05)
    alone = dynamic(encode(rows, 0.3, 200), 0.3).batch(range(40), 0).labels.numpy()
    assert any(a != b for a, b in zip(alone[1:-1:7] == IGNORE_INDEX, alone[2:-1:7] == IGNORE_INDEX, strict=False))


def test_long_texts_continue_and_nothing_is_lost():
    rows = [Row("a", 1, {"text": "the film . " * 10}), Row("b", 2, {"text": "good"}), Row("c#2", 3, {"text": "a"})]
    examples = encode(rows, max_length=12)
    assert examples.ids == ["a", "a##2", "a##3", "b", "c#2"]
    restored = without_masks(examples)
    text = [k for i in range(3) for k in restored.sequence(i)[1:-1]]
    assert text == word_pieces().encode(rows[0].values["text"]).ids[1:-1]
    assert all((restored.sequence(i)[0], restored.sequence(i)[-1]) == (2, 3) for i in range(5))
    assert examples.notes == ("1 of 3 texts is longer than data.max_length = 12: read in 3 windows",)


def test_blocks_are_those_of_run_mlm():
    """The texts with their special tokens stand end to end; only the last block is shorter."""
    rows = rows_of(20)
    examples = without_masks(encode(rows, max_length=11, concatenate=True))
    texts = [k for encoding in word_pieces().encode_batch([r.values["text"] for r in rows]) for k in encoding.ids]
    assert [examples.sequence(i) for i in range(len(examples))] == [texts[i : i + 11] for i in range(0, len(texts), 11)]
    assert examples.ids[:2] == ["block 1", "block 2"]
    assert "20 texts in" in examples.notes[0]


def test_words_of_chinese(tmp_path):
    """Without a list each character is a word; a list is matched from the left, the longest word first."""
    text = CHINESE + " films"
    encoding = word_pieces().encode(text)
    assert encoding.tokens == ["[CLS]", *CHINESE, "film", "##s", "[SEP]"]
    assert find_continued_words(text, encoding).tolist() == [0] * 11 + [1, 0]
    words = tmp_path / "words.txt"
    words.write_text("来到 100 v\n北京\n清华\n清华大学 3\n大学\ngood\n", encoding="utf-8")
    found = find_continued_words(text, encoding, load_segmenter(str(words)))
    assert found.tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0]
    notes = encode([Row("a", 1, {"text": CHINESE})], whole_words=True).notes
    assert "have Chinese or Japanese, of which each character is a word: masked_lm.segmenter" in notes[0]
    assert not encode([Row("a", 1, {"text": CHINESE})], whole_words=True, segment=load_segmenter(str(words))).notes


def test_words_of_jieba(monkeypatch):
    """The package is asked for the words of each run of Chinese characters, and for nothing else."""
    asked = []
    package = SimpleNamespace(
        lcut=lambda run: asked.append(run) or [run[:1], run[1:3], run[3:]], setLogLevel=lambda level: None
    )
    monkeypatch.setitem(sys.modules, "jieba", package)
    text = CHINESE + " films"
    found = find_continued_words(text, word_pieces().encode(text), load_segmenter("jieba"))
    assert found.tolist() == [0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0]
    assert asked == [CHINESE]


@pytest.mark.slow
def test_words_of_the_real_jieba():
    pytest.importorskip("jieba")
    found = find_continued_words(CHINESE, word_pieces().encode(CHINESE), load_segmenter("jieba"))
    assert found.tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0]  # 我 来到 北京 清华大学


def test_a_segmenter_that_cannot_be_used_is_answered(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)  # as where it is not installed
    with pytest.raises(DataError, match=r"needs the package jieba: pip install jieba; or name a file"):
        load_segmenter("jieba")
    with pytest.raises(DataError, match=r"masked_lm.segmenter = 'nowhere': no such file; name a file with a word"):
        load_segmenter("nowhere")
    (tmp_path / "w").write_text("good\n好\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no line begins with a word of several Chinese or Japanese characters"):
        load_segmenter(str(tmp_path / "w"))


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=r"no mask token, \[MASK\] or <mask>, .*choose another model.name"):
        find_masking(tokenizer, 0.15)
    with pytest.raises(DataError, match=r"no mask token"):
        encode_texts_to_fill([], tokenizer, max_length=8)


@pytest.mark.parametrize("are_split", [False, True])
def test_only_the_mask_of_a_text_to_fill_is_a_special_token(are_split):
    """Whatever data.split_special_tokens says of the others."""
    tokenizer = word_pieces()
    tokenizer.encode_special_tokens = are_split
    rows = [Row("a", 1, {"text": "the [MASK] . [SEP]"}), Row("b", 2, {"text": "a film"})]
    examples = encode_texts_to_fill(rows, tokenizer, max_length=32)
    mask, separator = tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[SEP]")
    assert examples.sequence(0).count(mask) == 1
    assert examples.sequence(0).count(separator) == (1 if are_split else 2)
    assert examples.notes == ("1 of 2 texts without [MASK]: nothing is filled there",)
