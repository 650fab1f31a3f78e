"""Extractive question answering: a tiny model learns to find what a question asks for; the commands agree."""

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

import models
from data import DataError, MicroBatching, TextExamples, evaluation_batches, load_tokenizer, training_steps
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, GenerateSettings
from engine.optim import learning_rate
from engine.tasks import TASKS

TASK = TASKS["question-answering"]


# A problem that a correct implementation solves: each context has spans of some kinds, each question asks for one kind.
# The first, the middle and the last words of a span.

KINDS = {"who": ("film", "story", "actor"), "where": ("good", "great", "fine"), "when": ("bad", "awful", "poor")}
ASK = {"who": "plot", "where": "scene", "when": "music"}  # the word of the question that asks for the kind
NOISE = ["the", "a", "of", "and", "very", "so"]


def made_up(count: int, seed: int, shortest: int = 12, longest: int = 30) -> dict[str, object]:
    """Return a SQuAD file: most contexts have a span of each kind, with a question for each kind."""
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
    """Return (configuration, test file) of a run that has learned it; most contexts take several windows."""
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
    """Return (metrics of engine.evaluate, rows of engine.predict) on one file."""
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
    """Evaluates a file in which some answers differ from the learned ones, so that not all scores are 1."""
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
            for indices in evaluation_batches(
                examples, MicroBatching(max_examples=size, rank=rank, world_size=world_size)
            ):
                batch = examples.batch(indices)
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


def test_p01_the_loss_does_not_depend_on_micro_batches(answered):
    model, examples = load(*answered)
    model = model.double()

    def gradients(of_ranks: list[MicroBatching]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        steps = [next(training_steps(examples, 13, 0, limits)) for limits in of_ranks]
        batches = [batch for micro_batches in steps for batch in micro_batches]
        targets = sum(batch.num_targets for batch in batches)
        losses = [model(batch).loss_sum / targets for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), [p.grad.clone() for p in model.parameters()]

    loss, grads = gradients([MicroBatching()])
    for of_ranks in (
        [MicroBatching(max_examples=1)],
        [MicroBatching(max_tokens=70)],
        [MicroBatching(max_examples=3, rank=r, world_size=2) for r in range(2)],
    ):
        other, others = gradients(of_ranks)
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
    """Compares 30 steps without dropout with transformers' model, torch's AdamW and padded windows.

    The padding is left out of the softmax, which transformers' own loss counts.
    """
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
