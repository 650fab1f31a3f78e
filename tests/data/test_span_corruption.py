"""Span corruption: the spans against T5's own code, written here once more, and what becomes of texts."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import DataError, Row
from data.seq2seq import PairTokenizer
from data.span_corruption import (
    Corruption,
    DynamicallyCorrupted,
    encode_texts_for_spans,
    encode_texts_with_sentinels,
    fill_spans,
    find_corruption,
)

SENTINELS = [900 + i for i in range(100)][::-1]
END = 1


def t5_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """As in random_spans_noise_mask, and never more spans than tokens that stay."""
    length = max(length, 2)
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    return noise, max(int(np.round(noise / mean)), 1)


def t5_mask(length: int, density: float, mean: float, shuffle: random.Random) -> list[bool]:
    """Do what random_spans_noise_mask does, number by number."""

    def segment(items: int, segments: int) -> list[int]:
        firsts = [i < segments - 1 for i in range(items - 1)]
        shuffle.shuffle(firsts)
        sizes = [1]
        for first in firsts:
            if first:
                sizes.append(0)
            sizes[-1] += 1
        return sizes

    noise, spans = t5_counts(length, density, mean)
    cut = segment(noise, spans)
    kept = segment(max(length, 2) - noise, spans)
    mask = [is_cut for k, c in zip(kept, cut, strict=True) for is_cut in [False] * k + [True] * c]
    return mask[:length]


def t5_replace(ids: list[int], hidden: list[bool]) -> list[int]:
    """As noise_span_to_unique_sentinel, with the end token."""
    out, number = [], 0
    for i, (token, is_hidden) in enumerate(zip(ids, hidden, strict=True)):
        if not is_hidden:
            out.append(token)
        elif i == 0 or not hidden[i - 1]:
            out.append(SENTINELS[number])
            number += 1
    return [*out, END]


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.3, 8.0)])
def test_pairs_are_those_of_t5_for_the_same_mask(density, mean):
    corruption = Corruption(density, mean, np.array(SENTINELS), END)
    for length in [*range(1, 60), 511, 600]:
        ids = np.arange(2, 2 + length)
        mask = corruption.draw_mask(length, [length])
        source, target = corruption.corrupt(ids, [length])
        assert source.tolist() == t5_replace(ids.tolist(), mask.tolist())
        assert target.tolist() == t5_replace(ids.tolist(), (~mask).tolist())
        assert corruption.restore(source, target).tolist() == ids.tolist()
        noise, spans = t5_counts(length, density, mean)
        if length > 1:
            assert mask.sum() == noise
            assert (np.diff(mask.astype(int)) == 1).sum() == spans
            assert len(source) + len(target) == length + 2 * spans + 2
        assert not mask[0]
        assert mask[-1] or length == 1


@pytest.mark.parametrize(
    ("length", "density", "mean"), [(9, 0.45, 2.0), (7, 0.3, 1.0), (2, 0.15, 3.0), (12, 0.15, 3.0)]
)
def test_masks_are_as_probable_as_those_of_t5(length, density, mean):
    corruption = Corruption(density, mean, np.array(SENTINELS), END)
    ours = Counter(tuple(corruption.draw_mask(length, [seed]).tolist()) for seed in range(4000))
    shuffle = random.Random(0)
    theirs = Counter(tuple(t5_mask(length, density, mean, shuffle)) for _ in range(4000))
    assert ours.keys() == theirs.keys()
    for mask, count in theirs.items():
        assert abs(ours[mask] - count) < 5 * (2 * count) ** 0.5, mask


def test_dense_texts_have_as_many_spans_as_fit():
    """T5's own code fails there, since each span is between two tokens that stay."""
    corruption = Corruption(0.9, 1.0, np.array(SENTINELS), END)
    mask = corruption.draw_mask(10, [0])
    assert (mask.sum(), (np.diff(mask.astype(int)) == 1).sum()) == (9, 1)
    assert Corruption(1.0, 1.0, np.array(SENTINELS), END).draw_mask(10, [0]).sum() == 9


# Texts


def words_tokenizer(sentinels: int = 20) -> PairTokenizer:
    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    names += [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([name for name in names if name[0] == "<"])
    return PairTokenizer(tokenizer, 0)


def rows_of(*counts: int) -> list[Row]:
    return [Row(f"t{n}", n, {"text": " ".join(f"w{i % 40}" for i in range(count))}) for n, count in enumerate(counts)]


def dynamic(counts, max_length=12, seed=3, concatenate=False):
    processor = words_tokenizer()
    corruption = find_corruption(processor.tokenizer, 0.3, 2.0)
    examples = encode_texts_for_spans(
        rows_of(*counts),
        processor,
        column="text",
        max_length=max_length,
        corruption=corruption,
        concatenate=concatenate,
    )
    return DynamicallyCorrupted(examples, corruption, seed, processor.tokenizer)


def texts_of(batch, corruption):
    """The text of each example of a micro-batch, and its source."""
    sources, targets = batch.input_ids.split(batch.lengths), batch.labels.split(batch.decoder_lengths)
    pairs = [(s.numpy(), t.numpy()) for s, t in zip(sources, targets, strict=True)]
    return [corruption.restore(*pair).tolist() for pair in pairs], [source.tolist() for source, _ in pairs]


def test_spans_are_a_function_of_seed_epoch_and_id():
    examples = dynamic([9, 20, 1, 12, 5])
    count = len(examples)
    whole = examples.batch(range(count), 1)
    texts, sources = texts_of(whole, examples.corruption)
    for i in range(count):  # in any micro-batch
        assert texts_of(examples.batch([i], 1), examples.corruption)[1] == [sources[i]]
    assert texts_of(examples.batch(range(count), 2), examples.corruption)[0] == texts
    others = [examples.batch(range(count), 2), dynamic([9, 20, 1, 12, 5], seed=4).batch(range(count), 1)]
    others.append(examples.batch(range(count)))
    assert all(texts_of(batch, examples.corruption)[1] != sources for batch in others)
    lengths = np.diff(examples.examples.offsets) + np.diff(examples.examples.target_offsets)
    assert lengths.tolist() == [a + b for a, b in zip(whole.lengths, whole.decoder_lengths, strict=True)]
    fixed = dynamic([9, 20, 1, 12, 5], seed=8).batch(range(count))  # validation does not depend on the seed
    assert fixed.input_ids.tolist() == examples.batch(range(count)).input_ids.tolist()
    starts = np.cumsum([0, *whole.decoder_lengths])[:-1]
    assert whole.decoder_input_ids[starts].tolist() == [0] * count
    assert whole.num_targets == sum(whole.decoder_lengths)


def test_long_texts_continue_in_further_examples():
    examples = dynamic([25, 3])
    assert list(examples.ids) == ["t0", "t0#2", "t0#3", "t1"]
    assert examples.notes == (
        "1 of 2 texts are longer than data.max_length = 12 and continue in further examples, 4 in all",
    )
    texts, _ = texts_of(examples.batch(range(4), 0), examples.corruption)
    assert [len(text) for text in texts] == [11, 11, 3, 3]
    assert [token - 3 for text in texts[:3] for token in text] == list(range(25))


def test_texts_end_to_end_make_blocks():
    examples = dynamic([25, 3, 9], concatenate=True)
    texts, _ = texts_of(examples.batch(range(len(examples)), 5), examples.corruption)
    assert [len(text) for text in texts] == [11, 11, 11, 7]
    assert [token for text in texts for token in text].count(END) == 3
    assert examples.notes[0].startswith("3 texts in 4 blocks of 11 tokens, which the end token makes data.max_length")


def test_sentinels_in_texts_are_left_out_and_counted():
    processor = words_tokenizer()
    corruption = find_corruption(processor.tokenizer, 0.3, 2.0)
    rows = [Row("a", 1, {"text": "w1 <extra_id_0> w2"}), Row("b", 2, {"text": "w3"})]
    examples = encode_texts_for_spans(rows, processor, column="text", max_length=12, corruption=corruption)
    assert examples.notes == ("1 of 2 texts contain sentinels of their own, which are left out",)
    texts, _ = texts_of(examples.batch([0, 1]), corruption)
    assert texts == [[4, 5], [6]]


def test_texts_to_fill_keep_their_sentinels():
    processor = words_tokenizer()
    processor.tokenizer.encode_special_tokens = True
    corruption = find_corruption(processor.tokenizer, 0.3, 2.0)
    texts = ["w1 <extra_id_0> w2 <extra_id_1>", "w3", "w1 w2 w3 w4 <extra_id_0> w5"]
    rows = [Row(str(i), i, {"text": text}) for i, text in enumerate(texts)]
    examples = encode_texts_with_sentinels(rows, processor, column="text", max_length=6, corruption=corruption)
    first, second = (int(corruption.sentinels[k]) for k in (0, 1))
    assert [examples.sequence(i) for i in range(3)] == [[4, first, 5, second, 1], [6, 1], [4, 5, 6, 7, first, 1]]
    assert examples.notes == (
        "warning: 1 of 3 texts truncated to data.max_length = 6, 7.1% of all tokens lost",
        "1 of 3 texts without <extra_id_0>: nothing is filled there",
    )


@pytest.mark.parametrize(
    ("written", "filled", "spans"),
    [
        ([90, 5, 6, 91, 7, 1], [2, 5, 6, 3, 7, 1, 1], [[5, 6], [7, 1]]),
        ([90, 5], [2, 5, 3, 1], [[5], []]),
        ([8, 91, 7, 90, 5, 91, 9, 92, 4], [2, 5, 3, 7, 1], [[5], [7]]),
        ([], [2, 3, 1], [[], []]),
    ],
)
def test_written_spans_replace_their_sentinels(written, filled, spans):
    assert fill_spans([2, 90, 3, 91, 1], written, [90, 91, 92]) == (filled, spans)


def test_tokenizers_without_enough_sentinels_are_refused():
    with pytest.raises(DataError, match=r"no sentinels <extra_id_0>, .* choose another model.name, such as a T5's"):
        find_corruption(words_tokenizer(0).tokenizer, 0.15, 3.0)
    corruption = find_corruption(words_tokenizer().tokenizer, 0.15, 3.0)
    corruption.check_sentinels(400)
    with pytest.raises(
        DataError, match=r"a text of 511 tokens makes 26 spans, and the tokenizer has 20 sentinels: lower"
    ):
        corruption.check_sentinels(511)
