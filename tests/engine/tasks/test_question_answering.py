"""Extractive question answering: windows and their spans (P11), the best answer against a search by hand, and a tiny
model that learns to find what a question asks for, measured and predicted by the commands."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.runs import run_training
from support.squad_rules import official_scores, official_threshold
from support.task_settings import settings_of, task_settings
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as vocabularies

import models
from data import DataError, MicroBatching, Row, TextExamples, evaluation_batches, load_tokenizer, training_steps
from data.batch import IGNORE_INDEX
from data.formats.squad import Answer
from data.question_answering import NO_ANSWER, Windows, encode_questions, token_spans
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, GenerateSettings
from engine.optim import learning_rate
from engine.tasks import TASKS

TASK = TASKS["question-answering"]

# Windows

CHARACTERS = [*map(chr, range(33, 127)), *"éßñıİ中文漢字あア안नमि"]
WORDS = ["the", "river", "black", "cafe", "naive", "1960", "##s", "##ing", "हिन"]


def bert_tokenizer(lowercase: bool) -> Tokenizer:
    """As bert-base-(un)cased has it: white space, punctuation and every Chinese character split words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = [*special, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *WORDS]
    tokenizer = Tokenizer(vocabularies.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def roberta_tokenizer(trim_offsets: bool) -> Tokenizer:
    """Bytes, so that a Chinese character is three tokens; `<s> question </s></s> context </s>`."""
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
    """Contexts of pieces that any tokenizer keeps apart, and an answer of one to four of them; or none, one in ten."""
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
            begin, number, length = windows.places[s]
            covered[number : number + length] = True
            assert len(examples.sequence(s)) <= 120
            label = examples.labels[s]
            if tuple(label) == (NO_ANSWER, NO_ANSWER):
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


def test_an_answer_that_no_window_holds_whole_is_in_none():
    text = " ".join(["river"] * 40)
    rows = [Row("a", 1, {"question": "the", "context": text, "answers": [Answer(text[:119], 0)]})]
    examples = encode(rows, TOKENIZERS["uncased"], max_length=20, doc_stride=4)
    assert len(examples.labels) == 3
    assert (examples.labels == NO_ANSWER).all()


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
        first = [tokenizer.id_to_token(i) for i in examples.sequence(0)]
        advance = 2
        assert len(first) == 15 + kept
        assert first == ["[CLS]", *["black"] * (kept - 0), "[SEP]", *first[kept + 2 :]]
        assert len(first[kept + 2 :]) == 10 + advance + 1  # and the last [SEP]
        begin, number, length = examples.record.places[0]
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
            begin, number, length = windows.places[s].tolist()
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


# A problem that a correct implementation must solve: each word of a context is of one kind, each question asks for one.

# The first, the middle and the last words of a span.
KINDS = {"who": ("film", "story", "actor"), "where": ("good", "great", "fine"), "when": ("bad", "awful", "poor")}
ASK = {"who": "plot", "where": "scene", "when": "music"}  # the word that asks for it, of those the checkpoint knows
NOISE = ["the", "a", "of", "and", "very", "so"]


def made_up(count: int, seed: int, shortest: int = 12, longest: int = 30) -> dict[str, object]:
    """A SQuAD file: contexts with a span of each kind, but now and then; a question for each kind."""
    rng = random.Random(seed)
    paragraphs = []
    for i in range(count):
        words, answers = [], {}
        kinds = rng.sample(list(KINDS), 3)
        present = kinds if rng.random() < 0.6 else kinds[:2]
        places = sorted(rng.sample(range(2, rng.randint(shortest, longest)), len(present)))
        for place, kind in zip(places, present, strict=True):
            while len(words) < place:
                words.append(rng.choice(NOISE))
            first, middle, last = KINDS[kind]
            span = [first, *[middle] * rng.randint(0, 2), last]
            answers[kind] = {"text": " ".join(span), "answer_start": len(" ".join(words)) + 1}
            words += [*span, rng.choice(NOISE)]
        qas = []
        for kind in kinds:
            entry = {"id": f"{i}-{kind}", "question": ASK[kind], "is_impossible": kind not in answers}
            qas.append(entry | {"answers": [answers[kind]] if kind in answers else []})
        paragraphs.append({"context": " ".join(words), "qas": qas})
    return {"version": "v2.0", "data": [{"title": "made up", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> tuple[Config, Path]:
    """(configuration, test file) of a run that has learned it; most contexts take several windows."""
    folder = tmp_path_factory.mktemp("answering")
    for name, count in (("train", 150), ("validation", 20), ("test", 16)):
        (folder / f"{name}.json").write_text(json.dumps(made_up(count, seed=len(name))))
    values = {
        "run.task": "question-answering",
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(checkpoint_folder),
        "model.init": "scratch",
        "model.dropout.all": 0.0,
        "data.train": str(folder / "train.json"),
        "data.validation": str(folder / "validation.json"),
        "data.max_length": 24,
        "question_answering.doc_stride": 8,
        "train.global_batch_size": 16,
        "train.max_steps": 70,
        "optim.lr": 5e-3,
        "eval.every_steps": 35,
    }
    config = configs.override(Config(), values)
    configs.check(config)
    run_training(config)
    return config, folder / "test.json"


def commands(config: Config, source: Path, folder: Path, *more: str) -> tuple[dict[str, float], list[dict]]:
    """(metrics of engine.evaluate, rows of engine.predict) on one file."""
    scores, output = folder / "scores.json", folder / "predictions.jsonl"
    assert evaluate.main([config.run.folder, "--data.test", str(source), "--output", str(scores), *more]) == 0
    assert predict.main([config.run.folder, "--input", str(source), "--output", str(output), *more]) == 0
    return json.loads(scores.read_text()), [json.loads(line) for line in output.read_text().splitlines()]


def test_answers_are_learned(answered, tmp_path):
    config, test = answered
    metrics, _ = commands(config, test, tmp_path)
    assert metrics["f1"] > 0.95
    assert metrics["exact_match"] > 0.95
    assert metrics["no_answer_accuracy"] > 0.9
    assert metrics["character_f1"] == metrics["f1"]
    assert metrics["best_f1"] >= metrics["f1"] - 1e-9


@pytest.mark.parametrize("threshold", ["0.0", "-3.0", "4.0"])
def test_what_is_measured_is_what_is_predicted(answered, tmp_path, threshold):
    """On a file with some answers that are not those which were learned, so that there is something to measure."""
    config, test = answered
    content = json.loads(test.read_text())
    for i, entry in enumerate(entry for paragraph in content["data"][0]["paragraphs"] for entry in paragraph["qas"]):
        if i % 3 == 0:
            entry["answers"] = [a | {"text": a["text"].split(" ", 1)[0]} for a in entry["answers"]]
        elif i % 5 == 0:
            entry |= {"answers": [], "is_impossible": True}
    test = tmp_path / "other.json"
    test.write_text(json.dumps(content))
    metrics, predictions = commands(config, test, tmp_path, "--question_answering.no_answer_threshold", threshold)
    assert 0 < metrics["exact_match"] < metrics["f1"] < 1
    paragraphs = json.loads(test.read_text())["data"][0]["paragraphs"]
    questions = [(paragraph["context"], entry) for paragraph in paragraphs for entry in paragraph["qas"]]
    assert [row["id"] for row in predictions] == [entry["id"] for _, entry in questions]
    exact, f1, golds = [], [], []
    for row, (context, entry) in zip(predictions, questions, strict=True):
        golds.append([answer["text"] for answer in entry["answers"]])
        for k, values in enumerate((exact, f1)):
            values.append(official_scores(row["answer"], golds[-1])[k])
        assert (row["answer"] == "") == (row["no_answer_margin"] > float(threshold))
        assert len(row["n_best"]) == 5
        for span in [row, *row["n_best"]][row["answer"] == "" :]:
            assert context[span["start"] : span["end"]] == span["answer"]
        listed = [span["probability"] for span in row["n_best"]]
        assert listed == sorted(listed, reverse=True)
        assert sum(listed) + row["no_answer_probability"] <= 1 + 1e-9
        if row["answer"]:
            assert {key: row[key] for key in row["n_best"][0]} == row["n_best"][0]
        else:
            assert (row["start"], row["end"], row["probability"]) == (None, None, row["no_answer_probability"])
    assert metrics["exact_match"] == pytest.approx(sum(exact) / len(exact), abs=1e-12)
    assert metrics["f1"] == pytest.approx(sum(f1) / len(f1), abs=1e-12)
    best = [row["n_best"][0]["answer"] for row in predictions]
    raw = [official_scores(text, gold)[1] for text, gold in zip(best, golds, strict=True)]
    margins = [row["no_answer_margin"] for row in predictions]
    expected = official_threshold(best, raw, margins, [bool(gold) for gold in golds])
    assert (metrics["best_f1"], metrics["best_f1_threshold"]) == pytest.approx(expected, rel=1e-4)


def load(config: Config, source: Path, labelled: bool = True) -> tuple[models.TaskModel, TextExamples]:
    folder = Path(config.run.folder) / "best"
    settings = settings_of(config)
    rows = TASK.read(str(source), settings, labelled)
    model = models.from_pretrained(folder, head=TASK.head).eval()
    return model, TASK.encode(rows, load_tokenizer(folder), settings, [], labelled)


@torch.no_grad()
def test_p02_p03_results_are_equal_for_any_batches_and_ranks(answered):
    model, examples = load(*answered)
    assert (np.diff(examples.sequences) > 1).mean() > 0.3
    whole = TASK.evaluate_batch(model, examples.batch(range(len(examples))), examples, GenerateSettings())
    expected = TASK.compute_metrics(whole, [])
    rows = TASK.predict_batch(model, examples.batch(range(len(examples))), examples, GenerateSettings())
    empty = TASK.evaluate_batch(model, examples.batch([]), examples, GenerateSettings())
    assert not empty.any()
    for size, world_size in ((1, 1), (3, 1), (16, 1), (5, 2), (7, 3)):
        total, seen = empty.clone(), {}
        for rank in range(world_size):
            for part in evaluation_batches(
                examples, MicroBatching(max_examples=size, rank=rank, world_size=world_size)
            ):
                batch = examples.batch(part)
                total += TASK.evaluate_batch(model, batch, examples, GenerateSettings())
                for index, row in zip(
                    batch.indices, TASK.predict_batch(model, batch, examples, GenerateSettings()), strict=True
                ):
                    assert index not in seen
                    seen[index] = row
        assert TASK.compute_metrics(total, []) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert [(seen[i]["answer"], seen[i]["start"]) for i in range(len(examples))] == [
            (row["answer"], row["start"]) for row in rows
        ]
    assert TASK.predict_batch(model, examples.batch([]), examples, GenerateSettings()) == []


def test_p01_the_loss_of_a_step_does_not_depend_on_how_it_is_cut(answered):
    model, examples = load(*answered)
    model = model.double()

    def gradients(how: list[MicroBatching]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        groups = [next(training_steps(examples, 13, 0, cut)) for cut in how]
        batches = [batch for group in groups for batch in group]
        targets = sum(batch.num_targets for batch in batches)
        losses = [model(batch).loss_sum / targets for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), [p.grad.clone() for p in model.parameters()]

    loss, grads = gradients([MicroBatching()])
    for cuts in (
        [MicroBatching(max_examples=1)],
        [MicroBatching(max_tokens=70)],
        [MicroBatching(max_examples=3, rank=r, world_size=2) for r in range(2)],
    ):
        other, others = gradients(cuts)
        assert other == pytest.approx(loss, rel=1e-12)
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_predictions_need_no_answers(answered, tmp_path):
    config, test = answered
    lines = []
    for paragraph in json.loads(test.read_text())["data"][0]["paragraphs"]:
        lines += [{"id": e["id"], "question": e["question"], "context": paragraph["context"]} for e in paragraph["qas"]]
    source, output = tmp_path / "new.jsonl", tmp_path / "new.predictions.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert predict.main([config.run.folder, "--input", str(source), "--output", str(output)]) == 0
    _, expected = commands(config, test, tmp_path)
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == [x["answer"] for x in expected]
    model, examples = load(config, source, labelled=False)
    assert examples.labels is None
    with pytest.raises(TypeError, match="only labelled examples"):
        TASK.evaluate_batch(model, examples.batch([0]), examples, GenerateSettings())


def test_held_out_contexts_are_unseen_in_training():
    assert task_settings("question-answering").data.group_column == "context"
    assert task_settings("question-answering", validation="x").data.group_column == ""


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_group_that_is_not_in_the_file_is_an_error(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(made_up(2, 0)) if name == "x.json" else '{"question": "x", "context": "x"}')
    settings = task_settings("question-answering", train=str(tmp_path / name), group_column="page")
    with pytest.raises(DataError, match=r"no column '(page|answers)'"):
        TASK.read(settings.data.train, settings, True)
    if name == "x.json":
        assert len(TASK.read(settings.data.train, settings, False)) == 6


def test_the_loss_curve_is_that_of_transformers_and_a_plain_loop(answered, tmp_path, checkpoint_folder):
    """30 steps, dropout 0: transformers' model, torch's AdamW, padded windows whose padding is left out of the softmax
    (transformers' own loss counts it), against engine.train."""
    transformers = pytest.importorskip("transformers")
    config, _ = answered
    changes = {"run.folder": str(tmp_path / "run"), "model.name": str(tmp_path / "start"), "model.init": "pretrained"}
    changes |= {
        "train.max_steps": 30,
        "eval.every_steps": 30,
        "log.every_steps": 1,
        "train.micro_batch_size": 5,
        "optim.lr": 1e-3,
    }
    config = configs.override(config, changes)
    start = models.from_pretrained(checkpoint_folder, head=TASK.head, init="scratch", seed=3, dropout=0.0)
    models.save_pretrained(start, tmp_path / "start")
    (tmp_path / "start/tokenizer.json").write_bytes((checkpoint_folder / "tokenizer.json").read_bytes())
    run_training(config)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ours = [row["loss"] for row in map(json.loads, lines) if "lr" in row]

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = transformers.BertForQuestionAnswering.from_pretrained(
        tmp_path / "start", attn_implementation="eager", **off
    ).train()
    decayed, others = ([p for p in plain.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
    settings = settings_of(config)
    rows = TASK.read(config.data.train, settings, True)
    examples = TASK.encode(rows, load_tokenizer(checkpoint_folder), settings, [], True)
    theirs, steps = [], training_steps(examples, config.train.global_batch_size, 0, MicroBatching())
    for step in range(30):
        (batch,) = next(steps)
        pad = torch.nn.utils.rnn.pad_sequence
        ids, types = (
            pad(list(flat.split(batch.lengths)), batch_first=True) for flat in (batch.input_ids, batch.token_type_ids)
        )
        mask = pad([torch.ones(n, dtype=torch.int64) for n in batch.lengths], batch_first=True)
        out = plain(input_ids=ids, attention_mask=mask, token_type_ids=types)
        scores = [x.masked_fill(mask == 0, float("-inf")) for x in (out.start_logits, out.end_logits)]
        loss = sum(F.cross_entropy(x, batch.labels[:, k]) for k, x in enumerate(scores)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 30, config.optim)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]
