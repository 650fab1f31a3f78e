"""Windows of long contexts and their spans (P11), and the best answer against a search by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as vocabularies

from data import DataError, Row, TextExamples
from data.batch import IGNORE_INDEX
from data.formats.squad import Answer
from data.question_answering import NO_ANSWER, Windows, encode_questions, token_spans

# Windows

CHARACTERS = [*map(chr, range(33, 127)), *"éßñıİ中文漢字あア안नमि"]
WORDS = ["the", "river", "black", "cafe", "naive", "1960", "##s", "##ing", "हिन"]


def bert_tokenizer(lowercase: bool) -> Tokenizer:
    """Return a tokenizer like bert-base-(un)cased's: spaces, punctuation and Chinese characters split words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = [*special, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *WORDS]
    tokenizer = Tokenizer(vocabularies.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def roberta_tokenizer(trim_offsets: bool) -> Tokenizer:
    """Return a tokenizer of bytes (a Chinese character is three tokens): `<s> question </s></s> context </s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", *alphabet, "Ġt", "he", "Ġthe"])}
    tokenizer = Tokenizer(vocabularies.BPE(vocab, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets, False)
    return tokenizer


TOKENIZERS = {
    "uncased": bert_tokenizer(True),
    "cased": bert_tokenizer(False),
    "bytes": roberta_tokenizer(True),
    "bytes-with-their-spaces": roberta_tokenizer(False),
}
PIECES = ["the", "river", "Black", "cafe\u0301", "café", "naïve"]
PIECES += ["1960s", "don't", "中文", "漢字", "かな", "हिन्दी", "안녕"]
PIECES += ["İstanbul", "👩‍👩‍👧", "🇩🇪", "❤️", "1,642", "(five)", "e\u0301\u0323", "STRAẞE", "x" * 9, "Å", "ﬁne", "नमि्"]
GAPS = [" ", " ", " ", "  ", "\n", "\t ", "\u3000", "，", "。", "\xa0", "/"]


def random_questions(count: int, seed: int, most: int = 60) -> list[Row]:
    """Return contexts of pieces that any tokenizer separates, with answers of 1 to 4 pieces; 1 in 10 has none."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        text, spans = rng.choice(["", " ", "\n  "]), []
        for _ in range(rng.randint(1, most)):
            piece = rng.choice(PIECES)
            spans.append((len(text), len(text) + len(piece)))
            text += piece + rng.choice(GAPS)
        first = rng.randrange(len(spans))
        last = min(len(spans) - 1, first + rng.randrange(4))
        start, end = spans[first][0], spans[last][1]
        answers = [] if rng.random() < 0.1 else [Answer(text[start:end], start)]
        question = " ".join(rng.choice(PIECES) for _ in range(rng.randint(1, 3)))
        rows.append(Row(f"q{i}", i + 1, {"question": question, "context": text, "answers": answers}))
    return rows


def encode(rows: list[Row], tokenizer: Tokenizer, max_length: int = 96, doc_stride: int = 24, **more) -> TextExamples:
    settings = {"max_answer_length": 30} | more
    return encode_questions(rows, tokenizer, max_length=max_length, doc_stride=doc_stride, **settings)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_p11_the_gold_span_of_every_window_is_the_answer(tokenizer):
    rows = random_questions(300, seed=0)
    examples = encode(rows, tokenizer, max_length=120)
    windows: Windows = examples.record
    found = split = 0
    for i, row in enumerate(rows):
        spans, context = windows.spans[i], row.values["context"]
        covered = np.zeros(len(spans), dtype=bool)
        whole = 0
        for s in range(windows.sequences[i], windows.sequences[i + 1]):
            begin, number, length = windows.context_slices[s]
            covered[number : number + length] = True
            assert len(examples.sequence(s)) <= 120
            label = examples.labels[s]
            if tuple(label) in ((NO_ANSWER, NO_ANSWER), (IGNORE_INDEX, IGNORE_INDEX)):
                continue
            (answer,) = row.values["answers"]
            first, last = label - begin + number
            assert 0 <= first <= last < number + length
            assert context[spans[first, 0] : spans[last, 1]] == answer.text
            assert spans[first, 0] == answer.start
            whole += 1
        assert covered.all()  # nothing of a context is lost
        if row.values["answers"]:
            (answer,) = row.values["answers"]
            tokens = ((spans[:, 1] > answer.start) & (spans[:, 0] < answer.start + len(answer.text))).sum()
            assert whole or tokens > 25
            found += bool(whole)
            split += windows.sequences[i + 1] - windows.sequences[i] > 1
        else:
            assert not whole
    assert found > 200
    assert split > 80


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(("max_length", "doc_stride"), [(64, 0), (64, 24), (64, 41), (2000, 24)])
def test_windows_are_those_of_the_tokenizers_library(tokenizer, max_length, doc_stride):
    rows = [row.updated({"question": "the"}) for row in random_questions(60, seed=1)]
    examples = encode(rows, tokenizer, max_length, doc_stride)
    tokenizer.enable_truncation(max_length, stride=doc_stride, strategy="only_second")
    expected_ids, expected_types, counts = [], [], []
    for row in rows:
        whole = tokenizer.encode(row.values["question"], row.values["context"])
        parts = [whole, *whole.overflowing]
        counts.append(len(parts))
        expected_ids += [part.ids for part in parts]
        expected_types += [part.type_ids for part in parts]
    tokenizer.no_truncation()
    assert np.diff(examples.sequences).tolist() == counts
    assert [examples.sequence(s) for s in range(len(expected_ids))] == expected_ids
    assert examples.token_type_ids.tolist() == [kind for part in expected_types for kind in part]
    assert examples.truncated == 0
    assert examples.labels.shape == (len(expected_ids), 2)


def test_windows_with_a_part_of_an_answer_that_none_has_whole():
    """They are not learned. A window without any of it has no answer; where one has it whole, all others have none."""
    text = " ".join(["river"] * 40)
    rows = [
        Row(name, 1, {"question": "the", "context": text, "answers": [Answer(text[:end], 0)]})
        for name, end in (("long", 119), ("short", 89))
    ]
    examples = encode(rows, TOKENIZERS["uncased"], max_length=20, doc_stride=4, max_answer_length=17)
    assert examples.labels[:3].tolist() == [[IGNORE_INDEX] * 2, [IGNORE_INDEX] * 2, [NO_ANSWER] * 2]
    assert examples.labels[3:].tolist() == [[3, 17], [NO_ANSWER] * 2, [NO_ANSWER] * 2]
    assert [note.rpartition(":")[0] for note in examples.notes] == [
        "warning: 1 of 2 answers are whole in no window",
        "warning: 1 of 2 answers have more tokens than question_answering.max_answer_length = 17",
    ]


def test_answer_without_tokens_is_no_target():
    text = "the \u200b river"
    rows = [Row("a", 1, {"question": "the", "context": text, "answers": [Answer("\u200b", 4)]})]
    examples = encode(rows, TOKENIZERS["uncased"])
    assert examples.labels.tolist() == [[IGNORE_INDEX, IGNORE_INDEX]]
    assert examples.num_targets == examples.batch([0]).num_targets == 0


@pytest.mark.parametrize("context", ["\u200b", "\x07\u200b"])
def test_context_without_tokens_has_no_answer(context):
    rows = [Row("a", 1, {"question": "the river", "context": context, "answers": []})]
    examples = encode(rows, TOKENIZERS["uncased"])
    assert examples.labels.tolist() == [[NO_ANSWER, NO_ANSWER]]
    windows: Windows = examples.record
    found, score, probability = windows.answers(0, [np.ones((len(examples.input_ids), 2), np.float32)], 5)
    assert (found, score, probability) == ([], 2.0, 1.0)


def test_long_question_is_truncated_and_counted():
    tokenizer = TOKENIZERS["uncased"]
    question, context = " ".join(["black"] * 50 + ["1960"]), " ".join(["the", "river", "cafe"] * 20)
    values = {"question": question, "context": context, "answers": [Answer("cafe", context.index("cafe"))]}
    short = Row("b", 2, values | {"question": "the"})
    for kept in (24, 25):
        examples = encode([Row("a", 1, values), short], tokenizer, max_length=40 + kept - 25, doc_stride=10)
        assert examples.truncated == 1
        limit, lost = 40 + kept - 25, f"{(51 - kept) / 178:.1%} of all tokens lost"
        assert examples.notes == (f"warning: 1 of 2 questions truncated to data.max_length = {limit}, {lost}",)
        first = [tokenizer.id_to_token(i) for i in examples.sequence(0)]
        advance = 2
        assert len(first) == 15 + kept
        assert first == ["[CLS]", *["black"] * (kept - 0), "[SEP]", *first[kept + 2 :]]
        assert len(first[kept + 2 :]) == 10 + advance + 1  # and the last [SEP]
        begin, number, length = examples.record.context_slices[0]
        assert (begin, number, length) == (kept + 2, 0, 12)
    fits = encode([Row("a", 1, values)], tokenizer, max_length=128)
    assert (fits.truncated, len(fits.labels)) == (0, 1)


@pytest.mark.parametrize(
    ("max_length", "doc_stride", "hint"),
    [
        (40, 64, "question_answering.doc_stride = 64: lower it to 35 or less"),
        (3, 0, "question_answering.doc_stride = 0: raise data.max_length"),
    ],
)
def test_windows_that_cannot_move_on_are_an_error(max_length, doc_stride, hint):
    rows = [Row("a", 1, {"question": "the", "context": "river " * 100, "answers": []})]
    with pytest.raises(DataError, match=hint):
        encode(rows, TOKENIZERS["uncased"], max_length, doc_stride)
    if max_length > 3:
        encode(rows, TOKENIZERS["uncased"], max_length, 35)


def test_marks_that_a_tokenizer_drops_stay_with_their_letter():
    context = "  Cafe\u0301 हिन्दी e\u0301\u0323, \u0301x"
    encoding = TOKENIZERS["uncased"].encode("the", context)
    texts = [context[a:b] for a, b in token_spans(encoding, context)]
    assert texts[0] == "Cafe\u0301"
    assert "".join(texts).replace(" ", "") == "Cafe\u0301हिन्दीe\u0301\u0323,x"


# From scores to answers


@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.parametrize("seed", range(4))
def test_best_answers_equal_a_search_over_all_spans(seed, longest):
    rows = random_questions(12, seed=seed, most=25)
    examples = encode(rows, TOKENIZERS["uncased"], max_length=40, doc_stride=9, max_answer_length=longest)
    windows: Windows = examples.record
    rng = np.random.default_rng(seed)
    for i, row in enumerate(rows):
        sequences = range(windows.sequences[i], windows.sequences[i + 1])
        logits = [rng.normal(0, 2, (len(examples.sequence(s)), 2)).astype(np.float32) for s in sequences]
        scores: dict[tuple[int, int], float] = {}
        for s, window in zip(sequences, logits, strict=True):
            begin, number, length = windows.context_slices[s].tolist()
            for a in range(length):
                for b in range(a, min(length, a + longest)):
                    key = (number + a, number + b)
                    score = float(window[begin + a, 0]) + float(window[begin + b, 1])
                    scores[key] = max(scores.get(key, -np.inf), score)
        no_answer = min(float(window[0, 0]) + float(window[0, 1]) for window in logits)
        total = np.exp([no_answer, *scores.values()]).sum()
        expected = sorted(scores.items(), key=lambda item: -item[1])[:5]
        found, ours, probability = windows.answers(i, logits, 5)
        assert ours == pytest.approx(no_answer)
        assert probability == pytest.approx(np.exp(no_answer) / total)
        assert len(found) == min(5, len(scores))
        for candidate, ((first, last), score) in zip(found, expected, strict=True):
            assert candidate.score == pytest.approx(score)
            assert candidate.probability == pytest.approx(np.exp(score) / total)
            assert (candidate.start, candidate.end) == (windows.spans[i][first, 0], windows.spans[i][last, 1])
            assert candidate.text == row.values["context"][candidate.start : candidate.end]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([Answer("中文", 10)], "id q1  answer: 中 文 (tokens 14 to 19)"),
        ([Answer("r", 4)], "id q1  answer: r (token 8)"),
        ([], "id q1  no answer in this window"),
    ],
)
def test_the_first_examples_show_the_answer_itself(answers, expected):
    row = Row("q1", 1, {"question": "the", "context": "the river 中文", "answers": answers})
    assert encode([row], roberta_tokenizer(True)).show(0, roberta_tokenizer(True), ())[0].startswith(expected)
