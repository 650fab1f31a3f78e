"""Classes, label sets and scores of texts and pairs: tiny models learn them, and the commands agree on one file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import WORDS, run_training
from support.task_settings import settings_of, task_settings

import models
from data import DataError, MicroBatching, evaluation_batches, load_tokenizer, training_steps
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError, GenerateSettings
from engine.model import build_model
from engine.optim import learning_rate
from engine.tasks import TASKS, read_training_data


def test_a_regression_has_one_score(tiny, tmp_path):
    task = TASKS["text-regression"]
    settings = task_settings("text-regression", labels=("a", "b"))
    with pytest.raises(ConfigError, match=r"data.labels = a, b: a regression has one score"):
        task.find_labels("FILE", [], settings)


# Tiny models, from files to predictions


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentences(count: int, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [[rng.choice(WORDS) for _ in range(rng.randint(2, 8))] for _ in range(count)]


TOPICS = {"story": "plot", "music": "sound", "good": "praise"}  # word -> label


def topic_rows(count: int, seed: int) -> list[dict]:
    return [
        {"id": f"t{i}", "text": " ".join(words), "labels": [TOPICS[w] for w in TOPICS if w in words]}
        for i, words in enumerate(sentences(count, seed))
    ]


def score_rows(count: int, seed: int) -> list[dict]:
    return [
        {"id": f"s{i}", "text": " ".join(words), "score": 2 * ("good" in words) - ("bad" in words) + 0.5}
        for i, words in enumerate(sentences(count, seed))
    ]


def pair_rows(count: int, seed: int) -> list[dict]:
    """Rows of two texts; the label names those with the word `good`."""
    names = {(True, True): "both", (True, False): "first", (False, True): "second", (False, False): "neither"}
    pairs = zip(sentences(count, seed), sentences(count, seed + 100), strict=True)
    return [
        {"id": f"p{i}", "text": " ".join(a), "other": " ".join(b), "label": names["good" in a, "good" in b]}
        for i, (a, b) in enumerate(pairs)
    ]


PROBLEMS = {
    "multi-label-classification": (topic_rows, "subset_accuracy", {}),
    "text-regression": (score_rows, "pearson", {}),
    "text-classification": (pair_rows, "accuracy", {"data.text_pair_column": "other"}),
}


@pytest.fixture(scope="module", params=PROBLEMS)
def learned(request, checkpoint_folder: Path, tmp_path_factory) -> tuple[Config, Path]:
    """Return (configuration, test file) of a run that should have learned its problem."""
    make, _, more = PROBLEMS[request.param]
    folder = tmp_path_factory.mktemp("learned")
    test = write(folder / "test.jsonl", make(61, seed=1))
    values = {
        "run.task": request.param,
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(checkpoint_folder),
        "model.pooling": "mean" if request.param != "text-classification" else "cls",
        "data.train": str(write(folder / "train.jsonl", make(400, seed=0))),
        "data.test": str(test),
        "data.max_length": 24,
        "train.global_batch_size": 32,
        "train.max_steps": 150,
        "optim.lr": 3e-3,
        "eval.every_steps": 50,
    }
    config = configs.override(Config(), values | more)
    configs.check(config)
    run_training(config)
    return config, test


def test_a_tiny_model_learns_the_problem(learned):
    config, _ = learned
    metric = PROBLEMS[config.run.task][1]
    rows = [json.loads(line) for line in (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1][f"test_{metric}"] > 0.95


def test_p09_the_label_names_are_those_of_the_checkpoint(learned):
    config, _ = learned
    saved = json.loads((Path(config.run.folder) / "best" / "config.json").read_text())
    names = {
        "multi-label-classification": ["plot", "praise", "sound"],
        "text-regression": ["score"],
        "text-classification": ["both", "first", "neither", "second"],
    }
    assert list(saved["id2label"].values()) == names[config.run.task]
    kinds = {"multi-label": "multi_label_classification", "single-label": "single_label_classification"}
    assert saved["problem_type"] == kinds.get(TASKS[config.run.task].problem, "regression")


def predicted(config: Config, source: Path, output: Path) -> list[dict]:
    assert predict.main([config.run.folder, "--input", str(source), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_what_is_predicted_is_what_was_evaluated(learned, tmp_path, capsys):
    config, test = learned
    assert evaluate.main([config.run.folder, "--data.test", str(test), "--output", str(tmp_path / "m.json")]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    printed = capsys.readouterr().out
    truth = [json.loads(line) for line in test.read_text().splitlines()]
    rows = predicted(config, test, tmp_path / "p.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    if config.run.task == "text-classification":
        right = [a["label"] == b["label"] for a, b in zip(rows, truth, strict=True)]
        assert np.mean(right) == pytest.approx(metrics["accuracy"])
        assert "predicted as both, first, neither, second" in printed
    elif config.run.task == "multi-label-classification":
        right = [set(a["labels"]) == set(b["labels"]) for a, b in zip(rows, truth, strict=True)]
        assert np.mean(right) == pytest.approx(metrics["subset_accuracy"])
        for row in rows:
            above = {name: p for name, p in row["probabilities"].items() if p > 0.5}
            assert row["labels"] == sorted(above, key=lambda name: -above[name])
        assert "predicted" in printed
    else:
        scores, true = (np.array([row["score"] for row in part]) for part in (rows, truth))
        assert np.mean((scores - true) ** 2) == pytest.approx(metrics["mse"], rel=1e-5)
        assert np.corrcoef(scores, true)[0, 1] == pytest.approx(metrics["pearson"], rel=1e-6)


def test_predictions_need_no_labels_and_ignore_the_order(learned, tmp_path):
    config, test = learned
    truth = [json.loads(line) for line in test.read_text().splitlines()]
    expected = {row["id"]: row for row in predicted(config, test, tmp_path / "p.jsonl")}
    bare = [{k: v for k, v in row.items() if k not in ("label", "labels", "score")} for row in truth[::-1]]
    for row in predicted(config, write(tmp_path / "bare.jsonl", bare), tmp_path / "q.jsonl"):
        first = expected[row["id"]]
        assert row.get("labels") == first.get("labels")
        assert row.get("label") == first.get("label")
        if "score" in row:
            assert row["score"] == pytest.approx(first["score"], abs=1e-5)
        else:
            assert row["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 16, 61])
def test_p02_metrics_do_not_depend_on_batches_or_ranks(learned, size, world_size):
    config, test = learned
    task = TASKS[config.run.task]
    settings = settings_of(config)
    model = models.from_pretrained(f"{config.run.folder}/best", head=task.head).eval()
    processor = task.load_processor(Path(config.run.folder) / "best")
    examples = task.encode(task.read(str(test), settings, True), processor, settings, model.labels, True)
    with torch.no_grad():
        whole = task.evaluate_batch(model, examples.batch(range(len(examples))), examples, GenerateSettings())
        total = torch.zeros_like(whole)
        for rank in range(world_size):
            total += task.evaluate_batch(model, examples.batch([]), examples, GenerateSettings())  # zeros
            for indices in evaluation_batches(
                examples, MicroBatching(max_examples=size, rank=rank, world_size=world_size)
            ):
                total += task.evaluate_batch(model, examples.batch(indices), examples, GenerateSettings())
    assert total.dtype == torch.float64
    expected = task.compute_metrics(whole, model.labels)
    for name, value in task.compute_metrics(total, model.labels).items():
        assert value == pytest.approx(expected[name], rel=1e-5), name


def test_csv_and_json_lists_are_the_same_labels(checkpoint_folder, tmp_path):
    """Reads the same rows with labels as a JSON list, with semicolons in csv, and with commas in tsv."""
    task, found = TASKS["multi-label-classification"], {}
    rows = topic_rows(20, seed=3)
    write(tmp_path / "rows.jsonl", rows)
    for suffix, comma, separator in (("csv", ",", ";"), ("tsv", "\t", ", ")):
        lines = [comma.join(["id", "text", "labels"])]
        lines += [comma.join([row["id"], row["text"], separator.join(row["labels"])]) for row in rows]
        (tmp_path / f"rows.{suffix}").write_text("\n".join(lines))
    tokenizer = load_tokenizer(checkpoint_folder)
    for suffix in ("jsonl", "csv", "tsv"):
        settings = task_settings("multi-label-classification")
        name = str(tmp_path / f"rows.{suffix}")
        rows = task.read(name, settings, True)
        labels = task.find_labels(name, rows, settings)
        task.check_labels(name, rows, settings, labels)
        found[suffix] = task.encode(rows, tokenizer, settings, labels, True)
    assert found["csv"].labels.tolist() == found["tsv"].labels.tolist() == found["jsonl"].labels.tolist()
    assert found["jsonl"].label_counts(3).tolist() == found["jsonl"].labels.sum(0).tolist()
    assert found["jsonl"].num_targets == 60


def test_f13_all_that_is_wrong_in_a_file_is_reported_together(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "", "labels": ["a"], "score": 1}\nnot json\n{"text": "x", "labels": 0, "score": "?"}\n'
        '{"text": "x", "labels": null, "score": null}\n{"text": 1, "labels": {}, "score": []}\n'
    )
    name = str(tmp_path / "rows.jsonl")
    wrong = {
        "multi-label-classification": [
            "rows.jsonl:1: 'text' is empty",
            "rows.jsonl:2: not JSON: Expecting value: line 1 column 1 (char 0)",
            "rows.jsonl:4: column 'labels' is null",
            "rows.jsonl:5: 'text' should be text, not 1",
            "rows.jsonl:5: labels should be a list, or text with separators between them, not {}",
        ],
        "text-regression": [
            "rows.jsonl:1: 'text' is empty",
            "rows.jsonl:2: not JSON: Expecting value: line 1 column 1 (char 0)",
            "rows.jsonl:3: a score in 'score' should be a number, not '?'; the score is missing",
            "rows.jsonl:4: column 'score' is null",
            "rows.jsonl:5: 'text' should be text, not 1",
            "rows.jsonl:5: a score in 'score' should be a number, not []",
        ],
    }
    for task, expected in wrong.items():
        with pytest.raises(DataError) as caught:
            TASKS[task].read(name, task_settings(task), True)
        assert [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).split("\n")] == expected


@pytest.mark.parametrize("task", ["multi-label-classification", "text-regression"])
def test_the_loss_curve_is_that_of_transformers_and_a_plain_loop(task, tiny, tmp_path, checkpoint_folder):
    """30 steps, dropout 0: transformers' model and loss, torch's AdamW, padded batches, against engine.train."""
    transformers = pytest.importorskip("transformers")
    train = str(write(tmp_path / "train.jsonl", PROBLEMS[task][0](64, seed=5)))
    values = {
        "run.task": task,
        "data.train": train,
        "data.validation": train,
        "train.max_steps": 30,
        "eval.every_steps": 30,
    }
    values["data.label_column"] = TASKS[task].columns.label
    config = tiny(**values | {"model.dropout.all": 0.0, "train.micro_batch_size": 5})
    settings = settings_of(config)
    rows, _, _, labels, _ = read_training_data(TASKS[task], settings, 0)
    model, _ = build_model(config.model, TASKS[task], labels, 0.0, 0, None)
    start = tmp_path / "start"
    models.save_pretrained(model, start)  # both start from this head
    (start / "tokenizer.json").write_bytes((checkpoint_folder / "tokenizer.json").read_bytes())
    run_training(configs.override(config, {"model.name": str(start)}))
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    ours = [row["loss"] for row in map(json.loads, lines) if "lr" in row]

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain = transformers.BertForSequenceClassification.from_pretrained(
        start, attn_implementation="eager", **off
    ).train()
    decayed, others = ([p for p in plain.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
    examples = TASKS[task].encode(rows, load_tokenizer(start), settings, labels, True)
    theirs, steps = [], training_steps(examples, config.train.global_batch_size, 0, MicroBatching())
    for step in range(30):
        (batch,) = next(steps)
        sequences = list(batch.input_ids.split(batch.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 30, config.optim)
        loss = plain(input_ids=ids, attention_mask=mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]
