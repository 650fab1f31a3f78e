"""Relation extraction: labels of its files, and a tiny model from files to predictions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import run_training
from support.task_settings import settings_of, task_settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data import DataError, MicroBatching, evaluation_batches, load_tokenizer
from data.relation_extraction import ROLES
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError, GenerateSettings
from engine.metrics.counts import precision_recall_f1
from engine.tasks import TASKS
from models import from_pretrained

TASK = TASKS["relation-extraction"]
GOOD = {"text": "Ann lives in Ulm.", "subject": {"start": 0, "end": 3, "type": "person"}, "relation": "lives_in"}
GOOD |= {"object": {"start": 13, "end": 16, "type": "city"}}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_unknown_labels_are_reported_by_line(tmp_path):
    path = write(tmp_path / "x.jsonl", [GOOD | {"relation": name} for name in ("a", "b", "c", "a", "d")])
    settings = task_settings("relation-extraction")
    rows = TASK.read(str(path), settings, True)
    assert TASK.find_labels(str(path), rows, settings) == ["a", "b", "c", "d"]
    with pytest.raises(DataError) as caught:
        TASK.check_labels(str(path), rows, settings, ["a", "b"])
    lines = [line.partition("; ")[0] for line in str(caught.value).split("\n")]
    assert lines == [f"{path}:3: unknown label 'c'", f"{path}:5: unknown label 'd'"]


def test_a_negative_label_that_is_none_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [GOOD | {"relation": name} for name in ("a", "NA")])
    rows = TASK.read(str(path), task_settings("relation-extraction"), True)
    for negative in ("no_relation", "NA", ""):
        TASK.check_labels(
            str(path), rows, task_settings("relation-extraction", no_relation_label=negative), ["NA", "a"]
        )
    with pytest.raises(
        ConfigError, match=r"relation_extraction.no_relation_label = 'N/A' is not a label: choose from NA, a"
    ):
        TASK.check_labels(str(path), rows, task_settings("relation-extraction", no_relation_label="N/A"), ["NA", "a"])


# A tiny model, from files to predictions

NAMES = ["ann", "bob", "ulm", "rom"]  # two persons, two cities
WORDS = ["saw", "the", "old", "in", "met", "and"]
LABELS = ["home_of", "lives_in", "no_relation"]


def problem(count: int, seed: int) -> list[dict]:
    """Return texts in which a person lives in a city, or a city is home of a person.

    Only the marks tell which of many names are meant, and which of them is the subject.
    """
    rng, rows = random.Random(seed), []
    for i in range(count):
        words = rng.choices(NAMES + WORDS, k=rng.randint(2, 8))
        subject, obj = rng.sample(range(len(words)), 2)
        words[subject], words[obj] = rng.choices(NAMES, k=2)
        spans = {}
        for role, place in (("subject", subject), ("object", obj)):
            start = len(" ".join([*words[:place], ""]))
            spans[role] = {"start": start, "end": start + 3}
        a, b = NAMES.index(words[subject]), NAMES.index(words[obj])
        relation = "lives_in" if a < 2 <= b else "home_of" if b < 2 <= a else "no_relation"
        rows.append({"id": f"s{i}", "text": " ".join(words), **spans, "relation": relation})
    return rows


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Return (configuration, test file) of a run that should have learned the problem."""
    folder = tmp_path_factory.mktemp("relations")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"@#", *NAMES, *WORDS]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape |= {"vocab_size": len(tokens), "max_position_embeddings": 32, "initializer_range": 0.05}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **shape}))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    test = write(folder / "test.jsonl", problem(131, seed=1))
    values = {
        "run.task": "relation-extraction",
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(folder),
        "model.init": "scratch",
        "model.dropout.all": 0.0,
        "data.train": str(write(folder / "train.jsonl", problem(2000, seed=0))),
        "data.test": str(test),
        "data.max_length": 28,
        "train.global_batch_size": 32,
        "train.max_steps": 300,
        "optim.lr": 3e-3,
        "eval.every_steps": 100,
    }
    config = configs.override(Config(), values)
    configs.check(config)
    run_training(config)
    return config, test


def test_a_tiny_model_learns_the_problem(learned):
    config, _ = learned
    rows = [json.loads(line) for line in (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test_f1"] > 0.95
    assert rows[-1]["test_accuracy"] > 0.95


def predicted(config: Config, source: Path, output: Path) -> list[dict]:
    assert predict.main([config.run.folder, "--input", str(source), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_what_is_predicted_is_what_was_evaluated(learned, tmp_path, capsys):
    config, test = learned
    assert evaluate.main([config.run.folder, "--data.test", str(test), "--output", str(tmp_path / "m.json")]) == 0
    metrics, printed = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr().out
    truth = [json.loads(line) for line in test.read_text().splitlines()]
    rows = predicted(config, test, tmp_path / "p.jsonl")
    confusion = torch.zeros(3, 3, dtype=torch.float64)
    for row, true in zip(rows, truth, strict=True):
        assert [*row] == ["id", "subject", "relation", "object", "probabilities", "logits"]
        assert row["id"] == true["id"]
        for role in ROLES:
            assert row[role] == true["text"][true[role]["start"] : true[role]["end"]]
        assert [*row["probabilities"]] == LABELS
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["relation"] == max(LABELS, key=row["probabilities"].get)
        confusion[LABELS.index(true["relation"]), LABELS.index(row["relation"])] += 1
    hits, counted = confusion.diagonal()[:2].sum(), confusion[:2].sum() + confusion[:, :2].sum()
    assert metrics["f1"] == pytest.approx((2 * hits / counted).item())
    assert metrics["accuracy"] == pytest.approx((confusion.diagonal().sum() / len(rows)).item())
    f1 = precision_recall_f1(confusion.diagonal(), confusion.sum(0), confusion.sum(1))["f1"]
    assert all(f"{value:.4f}" in printed for value in f1.tolist())


def test_data_negative_says_what_is_not_counted(learned, tmp_path):
    config, test = learned

    def f1(negative: str) -> float:
        arguments = [
            "--data.test",
            str(test),
            "--relation_extraction.no_relation_label",
            negative,
            "--output",
            str(tmp_path / "m.json"),
        ]
        assert evaluate.main([config.run.folder, *arguments]) == 0
        metrics = json.loads((tmp_path / "m.json").read_text())
        return metrics["f1"] - metrics["accuracy"]

    assert f1("") == pytest.approx(0, abs=1e-12)  # micro-F1 of all classes is their accuracy
    with pytest.raises(ConfigError, match=r"relation_extraction.no_relation_label = 'none' is not a label"):
        f1("none")


def test_predictions_need_no_labels_and_ignore_the_order(learned, tmp_path):
    config, test = learned
    truth = [json.loads(line) for line in test.read_text().splitlines()]
    expected = {row["id"]: row for row in predicted(config, test, tmp_path / "p.jsonl")}
    bare = [{k: v for k, v in row.items() if k != "relation"} for row in truth[::-1]]
    rows = predicted(config, write(tmp_path / "bare.jsonl", bare), tmp_path / "q.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in bare]
    for row in rows:
        assert row["relation"] == expected[row["id"]]["relation"]
        assert row["probabilities"] == pytest.approx(expected[row["id"]]["probabilities"], abs=1e-5)


@torch.no_grad()
def test_p02_p03_evaluation_is_equal_for_any_batches_and_ranks(learned):
    config, test = learned
    model = from_pretrained(Path(config.run.folder) / "best", head=TASK.head).eval()
    settings = settings_of(config)
    tokenizer = load_tokenizer(Path(config.run.folder) / "best")
    examples = TASK.encode(TASK.read(str(test), settings, True), tokenizer, settings, model.labels, True)

    def metrics(size: int, world_size: int) -> dict[str, float]:
        batches = [examples.batch([])]
        for rank in range(world_size):
            limits = MicroBatching(max_examples=size, rank=rank, world_size=world_size)
            batches += [examples.batch(indices) for indices in evaluation_batches(examples, limits)]
        assert sorted(np.concatenate([batch.indices for batch in batches])) == [*range(len(examples))]
        total = sum(TASK.evaluate_batch(model, batch, examples, GenerateSettings()) for batch in batches)
        return TASK.compute_metrics(total, model.labels)

    expected = metrics(len(examples), 1)
    for size in (1, 3, 16):
        for world_size in (1, 2, 3):
            assert metrics(size, world_size) == pytest.approx(expected, rel=1e-6)
