"""data.long_texts: first and last tokens, and windows, from the encoding to the predictions of a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.cases import dry_run, evaluation, predictions, run, settings_for, write_file
from support.task_data import write_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import MicroBatching
from data.batch import IGNORE_INDEX
from data.examples import TextExamples
from data.loader import split_into_micro_batches
from data.long_texts import split_into_word_windows
from data.row import Row
from data.text_classification import encode_texts
from data.token_classification import encode_tagged
from engine.config import ConfigError, RegularizeSettings
from engine.objective import training_objective
from engine.tasks.token_classification import predict_tags
from models import from_pretrained, pack

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
NUMBERS = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS])}
PAIR = "[CLS] $A [SEP] $B:1 [SEP]:1"


def letters(pair: str = PAIR) -> Tokenizer:
    """Return a tokenizer with a token for each letter: the words of a text, or the letters of words."""
    tokenizer = Tokenizer(models.WordPiece(NUMBERS, unk_token="[UNK]", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    return tokenizer


def shown(examples: TextExamples, tokenizer: Tokenizer) -> list[str]:
    """Return the tokens of each sequence, without those around a text."""
    names = [[tokenizer.id_to_token(k) for k in examples.sequence(i)] for i in range(len(examples.offsets) - 1)]
    return ["".join(name.replace("[CLS]", "").replace("[SEP]", "|") for name in sequence) for sequence in names]


def encode(*texts: str, max_length: int = 10, **options) -> tuple[list[str], TextExamples]:
    rows = [Row(str(i), i + 1, dict(zip(("a", "b"), text.split("/"), strict=False))) for i, text in enumerate(texts)]
    rows = [Row(row.id, row.line, {k: " ".join(v) for k, v in row.values.items()}) for row in rows]
    pair = "b" if "/" in texts[0] else ""
    examples = encode_texts(rows, tokenizer := letters(), text="a", text_pair=pair, max_length=max_length, **options)
    return shown(examples, tokenizer), examples


# Encoding


@pytest.mark.parametrize(
    ("texts", "kept", "lost"),
    [
        (["abcdefghijkl", "abc"], ["abghijkl|", "abc|"], "warning: 1 of 2 texts"),  # 2 and 6 of 8
        (["abcdefghijklm/xy"], ["abklm|xy|"], "warning: 1 of 1 texts"),  # 2 and 3 of 5
        (["ab/klmnopqrst"], ["ab|klrst|"], "warning: 1 of 1 texts"),
        (["abcdefgh/stuvwxyz"], ["agh|sxyz|"], "warning: 1 of 1 texts"),  # 1 and 2 of 3; 1 and 3 of 4
        (["abcdefgh", "abc"], ["abcdefgh|", "abc|"], ""),
    ],
)
def test_head_and_tail_are_a_quarter_and_three_quarters(texts, kept, lost):
    found, examples = encode(*texts, long_texts="head+tail")
    assert found == kept
    assert "".join(examples.notes).startswith(lost)


@pytest.mark.parametrize(
    ("texts", "windows", "note"),
    [
        (["abcdefghijkl", "abc"], ["abcdefgh|", "fghijkl|", "abc|"], "1 of 2 texts is longer than data.max_length"),
        (["abcdefghi/xy"], ["abcde|xy|", "cdefg|xy|", "efghi|xy|"], "1 of 1 texts is longer"),
        (["xy/abcdefgh"], ["xy|abcde|", "xy|cdefg|", "xy|efgh|"], "1 of 1 texts is longer"),
        (["abcdefgh", "abc"], ["abcdefgh|", "abc|"], ""),
    ],
)
def test_windows_of_texts_and_over_the_longer_text_of_a_pair(texts, windows, note):
    found, examples = encode(*texts, long_texts="windows", window_overlap=3)
    assert found == windows
    assert "".join(examples.notes).startswith(note)
    truncated = encode(*texts)[1]
    assert (truncated.fingerprint() == examples.fingerprint()) == (not note)
    if note:
        assert f"read in {len(found) - len(texts) + 1} windows" in examples.notes[0]


def test_a_pair_of_long_texts_loses_tokens_of_the_shorter_one():
    found, examples = encode("abcdefgh/stuvwxyzk", long_texts="windows", window_overlap=2)
    assert found == ["abc|stuv|", "abc|uvwx|", "abc|wxyz|", "abc|yzk|"]
    assert "25.0% of all tokens lost" in examples.notes[1]


def test_windows_are_those_of_the_tokenizers_own_stride():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(LETTERS, n)) for n in rng.integers(1, 60, 40)]
    tokenizer = letters()
    for max_length, overlap in ((3, 0), (10, 0), (10, 7), (16, 5)):
        rows = [Row(str(i), i, {"text": text}) for i, text in enumerate(texts)]
        found = encode_texts(rows, tokenizer, max_length=max_length, long_texts="windows", window_overlap=overlap)
        tokenizer.enable_truncation(max_length, stride=overlap)
        encodings = tokenizer.encode_batch(texts)
        expected = [part.ids for encoding in encodings for part in (encoding, *encoding.overflowing)]
        assert [found.sequence(i) for i in range(len(found.offsets) - 1)] == expected
        tokenizer.no_truncation()


def test_truncation_is_that_of_the_tokenizer_for_texts_and_pairs():
    rng = np.random.default_rng(2)
    tokenizer = letters()
    draw = [[" ".join(rng.choice(LETTERS, n)) for n in rng.integers(1, 14, 60)] for _ in "ab"]
    rows = [Row(str(i), i, {"a": a, "b": b}) for i, (a, b) in enumerate(zip(*draw, strict=True))]
    for max_length in (6, 9, 12):
        for pair, texts in (("", draw[0]), ("b", [*zip(*draw, strict=True)])):
            found = encode_texts(rows, tokenizer, text="a", text_pair=pair, max_length=max_length)
            tokenizer.enable_truncation(max_length, strategy="longest_first")
            encodings = tokenizer.encode_batch(texts)
            tokenizer.no_truncation()
            assert [found.sequence(i) for i in range(60)] == [encoding.ids for encoding in encodings]
            assert found.token_type_ids.tolist() == [k for encoding in encodings for k in encoding.type_ids]
            assert found.truncated == sum(bool(encoding.overflowing) for encoding in encodings)


# Words


def test_every_word_is_read_once_where_it_has_the_most_context():
    rng = np.random.default_rng(1)
    for size, overlap in ((1, 0), (4, 0), (7, 6), (12, 5)) * 10:
        lengths = rng.integers(1, 9, rng.integers(1, 40))
        word_ids = np.repeat(np.flatnonzero(rng.random(80) < 0.7)[: len(lengths)], lengths[:80])[:200]
        found = split_into_word_windows(word_ids, size, overlap)
        assert found.words.tolist() == sorted({*word_ids.tolist()})
        spans = [(int(np.argmax(word_ids == k)), int((word_ids <= k).sum())) for k in found.words]
        assert found.num_cut == sum(end - begin > size for begin, end in spans)
        new = [{*range(*now)} - {*range(*before)} for before, now in pairwise([(0, 0), *found.slices])]
        assert all(new)
        assert all(end - begin <= size for begin, end in found.slices)
        assert all(before[1] - now[0] <= overlap for before, now in pairwise(found.slices))
        for (begin, end), window, first in zip(spans, found.window, found.first, strict=True):
            assert first == begin
            contexts = [min(begin - a, b - end) for a, b in found.slices]
            if end - begin <= size:
                assert contexts[window] == max(contexts) >= 0
            else:
                assert found.slices[window] == (begin, begin + size)


def tagger(tmp_path, words: list[list[str]], max_length: int, overlap: int):
    model = from_pretrained(
        write_model("token-classification", tmp_path / "tagger"), head="token-classification", init="scratch",
        labels=["O", "B-X"], seed=0, dropout=0.0,
    ).double().eval()  # fmt: skip
    rows = [
        Row(str(i), i, {"tokens": w, "tags": ["O", "B-X"] * (len(w) // 2) + ["O"] * (len(w) % 2)})
        for i, w in enumerate(words)
    ]
    options = {"text": "tokens", "label": "tags", "labels": ["O", "B-X"], "max_length": max_length}
    examples = encode_tagged(rows, letters(), **options, long_texts="windows", window_overlap=overlap)
    return model, examples


def test_a_tagged_word_counts_once_and_is_read_in_its_window(tmp_path):
    words = [["ab", "c", "d", "efg", "h", "ij", "k"], ["a", "bcdefghij", "k"], ["x"]]
    model, examples = tagger(tmp_path, words, 7, 2)
    assert shown(examples, letters()) == ["abcd|", "cdefg|", "hijk|", "a|", "bcdef|", "k|", "x|"]
    assert examples.num_targets == sum(map(len, words))
    assert examples.notes == (
        "2 of 3 texts are longer than data.max_length = 7: read in 6 windows",
        "1 word longer than a window, of which the first tokens are read",
    )
    _, tags, probabilities = predict_tags(model, examples.batch([2, 0, 1]), examples.record)
    alone = [model(examples.with_record(None, ids=["w"] * 7, sequences=None).batch([i])).logits for i in range(7)]
    places = [(6, 1), *[(0, 1), (0, 3), (1, 2), (1, 3), (2, 1), (2, 2), (2, 4)], *[(3, 1), (4, 1), (5, 1)]]
    best = [alone[window][token].softmax(-1).max(-1) for window, token in places]
    assert [p for example in probabilities for p in example] == pytest.approx([b.values.item() for b in best])
    assert [tag for example in tags for tag in example] == [model.labels[b.indices] for b in best]


# Logits and losses


PROBLEMS = {
    "single-label": np.array([2, 0, IGNORE_INDEX, 1, 2]),
    "multi-label": np.array([[1, 0, 1], [0, 0, 1], [np.nan] * 3, [1, 1, np.nan], [0, 1, 0]], dtype=np.float32),
    "regression": np.array([[0.5, 1, 2], [-1, 2, 0], [np.nan] * 3, [1, 1, np.nan], [0, 1, 0]], dtype=np.float32),
}
TEXTS = ["abcdefghijklmnopq", "abc", "xyzabcdefgh", "zyxwvutsrqponmlkjihgfedcba", "abcdefghijk"]


def classifier(tmp_path, problem: str, **options):
    folder = write_model("text-classification", tmp_path / "classifier")
    labels = ["r", "s", "t"]
    model = from_pretrained(
        folder, head="sequence-classification", init="scratch", labels=labels, problem=problem, dropout=0.0, **options
    ).double()
    _, examples = encode(*TEXTS, max_length=8, long_texts="windows", window_overlap=2)
    return model, examples.with_record(None, labels=PROBLEMS[problem])


def gradients(objective, batches):
    objective.zero_grad()
    for batch in batches:
        objective(batch).loss_sum.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_logits_of_a_long_text_are_the_mean_of_its_windows(tmp_path, problem):
    model, examples = classifier(tmp_path, problem, label_smoothing=0.1 if problem == "single-label" else 0.0)
    model.train()
    out = model(examples.batch(range(5)))
    ends = examples.sequences.tolist()
    single = examples.with_record(None, ids=["w"] * ends[-1], sequences=None, labels=None)
    windows = [single.batch([i]) for i in range(ends[-1])]
    means = [sum(model(windows[i]).logits for i in range(a, b)) / (b - a) for a, b in pairwise(ends)]
    torch.testing.assert_close(out.logits, torch.cat(means), rtol=0, atol=1e-13)
    by_hand = pack([examples.sequence(i) for i in range(ends[-1])], windows=np.diff(ends).tolist())
    assert torch.equal(model(by_hand).logits, out.logits)
    labels = torch.from_numpy(PROBLEMS[problem])
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE_INDEX
    if problem == "single-label":
        loss = torch.nn.functional.cross_entropy(
            torch.cat(means)[known], labels[known], reduction="sum", label_smoothing=0.1
        )
    else:
        function = "mse_loss" if problem == "regression" else "binary_cross_entropy_with_logits"
        loss = getattr(torch.nn.functional, function)(torch.cat(means)[known], labels[known].double(), reduction="sum")
    model.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients(model, [examples.batch(range(5))]), expected, rtol=0, atol=1e-12)
    assert not model(examples.batch([])).loss_sum


@pytest.mark.parametrize("settings", [{}, {"fgm_epsilon": 0.1}, {"distillation_weight": 0.5}])
def test_p01_micro_batches_of_windows_change_no_gradient(tmp_path, settings):
    model, examples = classifier(tmp_path, "single-label")
    model.train().head.shape = replace(model.head.shape, class_weights=(1.0, 2.0, 0.5))
    teacher = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) if "distillation_weight" in settings else None
    )
    objective = training_objective(model, RegularizeSettings(**settings), teacher)
    whole = gradients(objective, [examples.batch(range(5))])
    for limits in (MicroBatching(max_examples=2), MicroBatching(max_tokens=20)):
        parts = split_into_micro_batches(np.arange(5), examples.lengths, limits)
        assert len(parts) > 2
        found = gradients(objective, [examples.batch(part) for part in parts])
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


# Runs


WORDS = ["red", "green", "blue", "the", "a", "cat", "dog", "saw", "likes", "very", "is", "house", "in", "and", "what"]


def rows_of(task: str, rng: np.random.Generator, count: int = 16) -> list[dict]:
    """Return rows of which the first has 60 words; the others are short."""
    rows = []
    for i in range(count):
        words = rng.choice(WORDS, 60 if i == 0 else 5).tolist()
        targets = {
            "text-classification": {"label": ["p", "q"][i % 2]},
            "multi-label-classification": {"labels": [["p"], ["q", "p"], []][i % 3]},
            "text-regression": {"score": i / 4},
            "token-classification": {"tags": ["B-X" if word == "red" else "O" for word in words]},
        }
        text = {"tokens": words} if task == "token-classification" else {"text": " ".join(words)}
        rows.append({"id": f"r{i}", **text, **targets[task]})
    return rows


@pytest.mark.parametrize(
    ("task", "mode", "note"),
    [
        ("text-classification", "windows", "1 of 16 texts is longer than data.max_length = 24: read in 4 windows"),
        ("text-classification", "head+tail", "1 of 16 texts truncated to their first and last tokens"),
        ("multi-label-classification", "windows", "read in 4 windows"),
        ("text-regression", "windows", "read in 4 windows"),
        ("token-classification", "windows", "read in 4 windows"),
    ],
)
def test_a_run_evaluates_and_predicts_each_text_once(tmp_path, capsys, task, mode, note):
    rows = rows_of(task, np.random.default_rng(0))
    file = write_file(tmp_path / "all.jsonl", rows)
    overlap = {"data__window_overlap": 5} if mode == "windows" else {}
    settings = settings_for(task, tmp_path, rows, data__long_texts=mode, data__validation=str(file), **overlap)
    printed = run(settings, capsys)
    assert note in printed
    found = predictions(tmp_path / "run", file)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    if task == "token-classification":
        assert [len(row["tags"]) for row in found] == [len(row["tokens"]) for row in rows]
        assert None not in found[0]["tags"]
    assert evaluation(tmp_path / "run", file)["examples"] == 16


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("text-classification", {"data__window_overlap": 8}, "leave it out, or set data.long_texts"),
        (
            "text-classification",
            {"data__long_texts": "windows", "data__window_overlap": 22},
            "has room for 22 tokens beside 2 special; lower it to 21 or less, or raise data.max_length",
        ),
        ("token-classification", {"data__long_texts": "head+tail"}, "those in the middle would be lost: windows"),
        ("question-answering", {"data__long_texts": "windows"}, "question_answering.doc_stride"),
        ("causal-lm", {"data__long_texts": "windows"}, "concatenate_texts"),
        ("summarization", {"data__long_texts": "head+tail"}, "no source for what was left out"),
    ],
)
def test_what_a_task_cannot_read_is_refused_with_what_works(tmp_path, capsys, task, settings, message):
    rows = rows_of("text-classification", np.random.default_rng(0))
    if task == "token-classification":
        rows = rows_of(task, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        dry_run(settings_for(task, tmp_path, rows, **settings), capsys)
