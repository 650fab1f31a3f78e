"""Token classification: a tiny model from files to tags, entities and spans."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from support.runs import WORDS, run_training
from support.task_settings import settings_of

from data import MicroBatching, evaluation_batches, load_tokenizer
from data.tag_schemes import find_entities
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError, GenerateSettings
from engine.tasks import TASKS
from models import from_pretrained

TASK = TASKS["token-classification"]


def write(path: Path, content: str | list[dict]) -> str:
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content.encode())
    return str(path)


def spans(text: str, *found: tuple[int, int, str]) -> dict:
    return {"tokens": text, "tags": [{"start": start, "end": end, "label": label} for start, end, label in found]}


# A tiny model, from files to predictions

GOOD, BAD = WORDS[:4], WORDS[4:8]
LABELS = ["B-BAD", "B-GOOD", "I-BAD", "I-GOOD", "O"]


def problem(count: int, seed: int) -> list[dict]:
    """Return sentences in which runs of good or bad words are entities; the word before marks where one begins."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        words = [
            word for _ in range(rng.randint(1, 4)) for word in rng.choices(rng.choice([GOOD, BAD, WORDS[8:]]), k=2)
        ]
        kinds = ["GOOD" if word in GOOD else "BAD" if word in BAD else "" for word in words]
        tags = [f"{'I' if i and kinds[i - 1] == kind else 'B'}-{kind}" if kind else "O" for i, kind in enumerate(kinds)]
        rows.append({"id": f"s{seed}.{i}", "tokens": words, "tags": tags})
    return rows


def as_spans(row: dict) -> dict:
    """Return the same sentence as a text and its spans."""
    ends = np.cumsum([len(word) + 1 for word in row["tokens"]]) - 1
    found = [
        {"start": int(ends[a] - len(row["tokens"][a])), "end": int(ends[b - 1]), "label": kind}
        for a, b, kind in find_entities(row["tags"])
    ]
    return {"id": row["id"], "text": " ".join(row["tokens"]), "spans": found}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, checkpoint_folder) -> tuple[Config, Path]:
    """Return (configuration of a finished run, test file with new sentences)."""
    folder = tmp_path_factory.mktemp("tagging")
    test = Path(write(folder / "test.jsonl", problem(60, 2)))
    values = {
        "run.task": "token-classification",
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(checkpoint_folder),
        "data.train": write(folder / "train.jsonl", problem(3_000, 1)),
        "data.max_length": 32,
        "model.dropout.all": 0.0,
        "train.global_batch_size": 32,
        "train.max_steps": 160,
        "optim.lr": 5e-3,
        "eval.every_steps": 80,
    }
    config = configs.override(Config(), values)
    configs.check(config)
    assert run_training(config) is not None
    return config, test


def metrics_of(run: str, file: Path | str, capsys, *options: str) -> dict[str, float]:
    output = Path(run).parent / "metrics.json"
    assert evaluate.main([run, "--data.test", str(file), "--output", str(output), "--run.device=cpu", *options]) == 0
    return json.loads(output.read_text())


def predictions_of(run: str, file: Path | str, output: Path, *options: str) -> list[dict]:
    arguments = [run, "--input", str(file), "--output", str(output), "--run.device=cpu", *options]
    assert predict.main(arguments) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_tiny_model_learns_the_problem(learned, capsys):
    config, test = learned
    metrics = metrics_of(config.run.folder, test, capsys)
    shown = capsys.readouterr().out
    assert metrics["f1"] > 0.95
    assert metrics["accuracy"] > 0.95
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["BAD", "GOOD"]
    assert from_pretrained(Path(config.run.folder) / "best", head=TASK.head).labels == tuple(LABELS)


def test_what_is_predicted_is_what_was_evaluated(learned, tmp_path, capsys):
    config, test = learned
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    found = predictions_of(config.run.folder, test, tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["tokens"] for row in found] == [row["tokens"] for row in rows]
    true = {(i, *entity) for i, row in enumerate(rows) for entity in find_entities(row["tags"])}
    said = {(i, e["start"], e["end"], e["label"]) for i, row in enumerate(found) for e in row["entities"]}
    metrics = metrics_of(config.run.folder, test, capsys)
    assert metrics["precision"] == pytest.approx(len(true & said) / len(said))
    assert metrics["recall"] == pytest.approx(len(true & said) / len(true))
    words = [tag for row in rows for tag in row["tags"]]
    tags = [tag for row in found for tag in row["tags"]]
    assert metrics["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(words, tags, strict=True)]))
    for row in found:
        assert len(row["probabilities"]) == len(row["tokens"])
        for entity in row["entities"]:
            product = np.prod(row["probabilities"][entity["start"] : entity["end"]])
            assert entity["probability"] == pytest.approx(product)
    # Predictions are a file of the same kind; evaluated on them, the model is always right.
    again = metrics_of(config.run.folder, tmp_path / "out.jsonl", capsys, "--token_classification.tag_scheme=none")
    assert again["accuracy"] == 1.0


def test_a_text_is_answered_with_its_spans(learned, tmp_path, capsys):
    config, test = learned
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    texts = write(tmp_path / "texts.jsonl", [as_spans(row) for row in rows])
    columns = ("--data.text_column=text", "--data.label_column=spans")
    by_words = metrics_of(config.run.folder, test, capsys)
    by_text = metrics_of(config.run.folder, texts, capsys, *columns)
    for name in TASK.metrics:
        assert by_text[name] == pytest.approx(by_words[name], rel=1e-6)
    found = predictions_of(config.run.folder, texts, tmp_path / "out.jsonl", *columns)
    of_words = predictions_of(config.run.folder, test, tmp_path / "words.jsonl")
    for text, words in zip(found, of_words, strict=True):
        assert [span["text"] for span in text["spans"]] == [
            " ".join(words["tokens"][e["start"] : e["end"]]) for e in words["entities"]
        ]
        assert all(text["text"][span["start"] : span["end"]] == span["text"] for span in text["spans"])
    # Read again as true spans, all predictions are right.
    assert metrics_of(config.run.folder, tmp_path / "out.jsonl", capsys, *columns)["f1"] == 1.0


def encoded(config: Config, test: Path, **changes: object):
    folder = Path(config.run.folder) / "best"
    model = from_pretrained(folder, head=TASK.head).eval()
    settings = settings_of(configs.override(config, {f"data.{key}": value for key, value in changes.items()}))
    rows = TASK.read(str(test), settings, True)
    return model, TASK.encode(rows, load_tokenizer(folder), settings, model.labels, True)


@pytest.mark.parametrize("max_length", [32, 6])
def test_p02_p03_evaluation_is_equal_for_any_batches_and_ranks(learned, max_length):
    model, examples = encoded(*learned, max_length=max_length)
    predicted: dict[int, dict] = {}

    def metrics(size: int, world_size: int) -> dict[str, float]:
        batches = [examples.batch([])]
        for rank in range(world_size):
            limits = MicroBatching(max_examples=size, rank=rank, world_size=world_size)
            batches += [examples.batch(indices) for indices in evaluation_batches(examples, limits)]
        assert sorted(np.concatenate([batch.indices for batch in batches])) == [*range(len(examples))]
        for batch in batches:
            found = TASK.predict_batch(model, batch, examples, GenerateSettings())
            for index, row in zip(batch.indices, found, strict=True):
                assert row["tags"] == predicted.setdefault(index, row)["tags"]
        return TASK.compute_metrics(
            sum(TASK.evaluate_batch(model, b, examples, GenerateSettings()) for b in batches), model.labels
        )

    expected = metrics(len(examples), 1)
    for size, world_size in ((1, 1), (3, 2), (16, 3), (len(examples), 3)):
        assert metrics(size, world_size) == pytest.approx(expected, rel=1e-6)


def test_words_cut_off_are_wrong_and_said(learned, tmp_path, capsys):
    config, test = learned
    whole = metrics_of(config.run.folder, test, capsys)
    found = metrics_of(config.run.folder, test, capsys, "--data.max_length=6")
    assert "words count as wrong" in capsys.readouterr().out
    assert found["recall"] < whole["recall"]
    rows = predictions_of(config.run.folder, test, tmp_path / "out.jsonl", "--data.max_length=6")
    for row in rows:
        assert all(tag is None for tag in row["tags"][4:])
        assert None not in row["tags"][:4]


def test_settings_of_other_tasks_are_refused(learned):
    config, _ = learned
    with pytest.raises(ConfigError, match=r"relation_extraction\.no_relation_label"):
        run_training(
            configs.override(
                config, {"relation_extraction.no_relation_label": "none", "run.folder": config.run.folder + "2"}
            )
        )


def test_plain_tags_are_learned_by_class(tmp_path, checkpoint_folder, capsys):
    """Trains on word/tag lines without entities, and stops early by the accuracy of words."""
    lines = []
    for row in problem(200, 5):
        tags = ["JJ" if word in GOOD + BAD else "NN" if word in WORDS[8:14] else "XX" for word in row["tokens"]]
        lines.append(" ".join(f"{word}/{tag}" for word, tag in zip(row["tokens"], tags, strict=True)) + "\n")
    values = {
        "run.task": "token-classification",
        "run.folder": str(tmp_path / "run"),
        "run.device": "cpu",
        "model.name": str(checkpoint_folder),
        "data.train": write(tmp_path / "train.txt", "".join(lines)),
        "data.format": "word/tag",
        "data.max_length": 32,
        "model.dropout.all": 0.0,
        "train.global_batch_size": 16,
        "train.max_steps": 60,
        "optim.lr": 5e-3,
        "eval.metric": "accuracy",
    }
    config = configs.override(Config(), values)
    configs.check(config)
    result = run_training(config)
    assert result is not None
    assert result["best_accuracy"] > 0.95
    text = write(tmp_path / "input.txt", "good film and story\n")
    (found,) = predictions_of(config.run.folder, text, tmp_path / "out.jsonl", "--data.format=text")
    assert (found["tokens"], found["tags"]) == (["good", "film", "and", "story"], ["JJ", "NN", "XX", "NN"])
    assert "entities" not in found
