"""What is promised of every task: each test is asked of every row of TASKS, so that a new one is tested by existing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import StopAfter, assert_same_run, run_training
from support.task_data import DATA, write

import models
from data import Examples, MicroBatching, evaluation_batches
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError
from engine.tasks import TASKS
from engine.tasks.task import Task


@dataclass(frozen=True)
class Trained:
    """A run of 4 steps, its best model, and what it was validated on."""

    task: Task
    config: Config
    model: models.TaskModel
    examples: Examples
    unlabelled: Examples

    @property
    def validation(self) -> str:
        return self.config.data.validation


def config_of(folder: Path, settings: dict[str, Any], **changes: Any) -> Config:
    values = {"run.folder": str(folder), "train.max_steps": 4, "eval.every_steps": 2, **settings, **changes}
    config = configs.override(Config(), values)
    configs.check(config)
    return config


@pytest.fixture(scope="module", params=TASKS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(folder / "run", write(request.param, folder))
    assert run_training(config) is not None
    task = TASKS[request.param]
    best = folder / "run" / "best"
    model = models.from_pretrained(best, head=task.head).eval()
    data = task.columns.fill(config.data)
    labelled, unlabelled = (
        task.encode(task.read(data.validation, data, known), task.load_processor(best), data, model.labels, known)
        for known in (True, False)
    )
    return Trained(task, config, model, labelled, unlabelled)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


CUTS = [
    (MicroBatching(max_examples=1), 1),
    (MicroBatching(max_examples=5), 2),
    (MicroBatching(max_tokens=60), 3),
]  # and the number of ranks


def batches(examples: Examples, cut: MicroBatching, world: int) -> list[Any]:
    """Those of all ranks, one after the other."""
    cuts = [MicroBatching(cut.max_examples, cut.max_tokens, rank, world) for rank in range(world)]
    return [examples.batch(part) for how in cuts for part in evaluation_batches(examples, how)]


@torch.no_grad()
def statistics(trained: Trained, cut: MicroBatching, world: int) -> torch.Tensor:
    every = [trained.examples.batch([]), *batches(trained.examples, cut, world)]
    measured = [trained.task.evaluate_batch(trained.model, b, trained.examples, trained.config.generate) for b in every]
    assert all(m.dtype == torch.float64 and m.shape == measured[0].shape for m in measured)
    return torch.stack(measured).sum(0)


def test_every_metric_is_measured_and_the_watched_one_is_a_number(trained):
    metrics = trained.task.compute_metrics(statistics(trained, MicroBatching(), 1), trained.model.labels)
    assert set(metrics) >= set(trained.task.metrics)
    assert math.isfinite(metrics[trained.task.metrics[0]])
    assert metrics["loss"] > 0


def test_an_empty_batch_measures_zeros(trained):
    empty = trained.examples.batch([])
    assert not trained.task.evaluate_batch(trained.model, empty, trained.examples, trained.config.generate).any()
    assert (
        trained.task.predict_batch(trained.model, trained.unlabelled.batch([]), trained.unlabelled, trained.config.generate)
        == []
    )


def test_p02_metrics_do_not_depend_on_the_batch_or_the_ranks(trained):
    expected = trained.task.compute_metrics(statistics(trained, MicroBatching(), 1), trained.model.labels)
    for cut, world in CUTS:
        found = trained.task.compute_metrics(statistics(trained, cut, world), trained.model.labels)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True), cut


@torch.no_grad()
def test_p03_each_example_is_predicted_once_and_alike_in_any_company(trained):
    def rows(cut: MicroBatching, world: int) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for batch in batches(trained.unlabelled, cut, world):
            predicted = trained.task.predict_batch(trained.model, batch, trained.unlabelled, trained.config.generate)
            for index, row in zip(batch.indices, predicted, strict=True):
                assert index not in found
                found[index] = row
        assert sorted(found) == list(range(len(trained.unlabelled)))
        return found

    expected = rows(MicroBatching(), 1)
    for cut, world in CUTS:
        found = rows(cut, world)
        for index, row in expected.items():
            assert_alike(found[index], row)


JUDGED_WHOLE = {"text-classification", "multi-label-classification", "relation-extraction", "image-classification"}


@torch.no_grad()
def test_what_is_predicted_of_a_whole_example_has_the_logits_a_student_learns_from(trained):
    batch = trained.unlabelled.batch(range(len(trained.unlabelled)))
    rows = trained.task.predict_batch(trained.model, batch, trained.unlabelled, trained.config.generate)
    if trained.config.run.task not in JUDGED_WHOLE:
        assert not any("logits" in row for row in rows)
        return
    for row, logits in zip(rows, trained.model(batch).logits.double(), strict=True):
        assert row["logits"] == dict(zip(trained.model.labels, logits.tolist(), strict=True))
        p = logits.sigmoid() if trained.task.problem == "multi-label" else logits.softmax(-1)
        assert row["probabilities"] == pytest.approx(dict(zip(trained.model.labels, p.tolist(), strict=True)))


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal but for the rounding of floats, at any depth."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_alike(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert ours == theirs


# What the predictions of a file say of the metrics of the same file: (metric, predictions, rows of the file) -> value


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def right_tags(predictions: list[dict], rows: list[dict]) -> float:
    pairs = [
        pair for p, row in zip(predictions, rows, strict=True) for pair in zip(p["tags"], row["tags"], strict=True)
    ]
    return share([ours == theirs for ours, theirs in pairs])


def mean_rouge(predictions: list[dict], rows: list[dict]) -> float:
    from engine.metrics.summarization import rouge

    scores = [rouge(p["text"], row["summary"])["rougeL"] for p, row in zip(predictions, rows, strict=True)]
    return sum(scores) / len(scores)


def corpus_bleu(predictions: list[dict], rows: list[dict]) -> float:
    sacrebleu = pytest.importorskip("sacrebleu")
    return sacrebleu.corpus_bleu([p["text"] for p in predictions], [[row["target"] for row in rows]]).score


def equal(key: str, column: str) -> Any:
    return lambda predictions, rows: share([p[key] == r[column] for p, r in zip(predictions, rows, strict=True)])


FROM_PREDICTIONS = {
    "text-classification": ("accuracy", equal("label", "label")),
    "multi-label-classification": (
        "subset_accuracy",
        lambda ps, rows: share([set(p["labels"]) == set(r["labels"]) for p, r in zip(ps, rows, strict=True)]),
    ),
    "text-regression": (
        "mae",
        lambda ps, rows: sum(abs(p["score"] - r["score"]) for p, r in zip(ps, rows, strict=True)) / len(rows),
    ),
    "token-classification": ("accuracy", right_tags),
    "question-answering": (
        "exact_match",
        lambda ps, rows: share([p["answer"] == r["answers"][0]["text"] for p, r in zip(ps, rows, strict=True)]),
    ),
    "relation-extraction": ("accuracy", equal("relation", "relation")),
    "summarization": ("rougeL", mean_rouge),
    "translation": ("bleu", corpus_bleu),
    "image-classification": (
        "accuracy",
        lambda ps, rows: share([p["label"] == p["id"].split("/")[0] for p in ps]),
    ),
}
WRITE_FREELY = {"causal-lm", "dialogue"}  # what they write is no answer to what they are measured on


def test_the_commands_measure_and_predict_the_same_of_one_file(trained, tmp_path, capsys):
    name = trained.config.run.task
    run, file = trained.config.run.folder, trained.validation
    assert evaluate.main([run, "--data.test", file, "--output", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert predict.main([run, "--input", file, "--output", str(tmp_path / "out.jsonl")]) == 0
    predictions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [p["id"] for p in predictions] == trained.unlabelled.ids
    assert metrics["examples"] == len(trained.examples)
    if name in WRITE_FREELY:
        assert all(isinstance(p["text"], str) for p in predictions)
        return
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()] if name in DATA else []
    metric, function = FROM_PREDICTIONS[name]
    assert function(predictions, rows) == pytest.approx(metrics[metric], abs=1e-5), metric


def test_a_file_to_predict_needs_no_labels(trained, tmp_path, capsys):
    """What predict reads of a labelled file is what it reads of the same one without labels."""
    label = TASKS[trained.config.run.task].columns.fill(trained.config.data).label
    source = Path(trained.validation)
    if source.is_dir():
        bare = tmp_path / "images"
        bare.mkdir()
        for path in source.rglob("*.png"):
            (bare / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    else:
        bare = tmp_path / "bare.jsonl"
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        bare.write_text("".join(json.dumps({k: v for k, v in r.items() if k != label}) + "\n" for r in rows))
    assert predict.main([trained.config.run.folder, "--input", str(bare), "--output", str(tmp_path / "a")]) == 0
    assert predict.main([trained.config.run.folder, "--input", str(source), "--output", str(tmp_path / "b")]) == 0
    ours, theirs = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab")
    if source.is_dir():
        ours = [{**row, "id": row["id"].replace("-", "/")} for row in ours]
        ours, theirs = (sorted(rows, key=lambda row: row["id"]) for rows in (ours, theirs))
    assert len(ours) == len(trained.unlabelled)
    for one, other in zip(ours, theirs, strict=True):
        assert_alike(one, other)


def test_a_dry_run_says_what_is_trained_on_what_and_writes_nothing(task, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = write(task, tmp_path)
    assert run_training(config_of(folder, settings, **{"run.dry_run": True})) == {}
    said = capsys.readouterr().out
    for name, count in (("training", 24), ("validation", 12)):
        shown = re.search(rf"^{name}: (\d+) examples", said, re.MULTILINE)
        assert int(shown[1]) >= count  # more where a long text is several
    assert "first encoded examples" in said
    assert "4 steps of 8 examples" in said
    assert not (folder / "last").exists()


def test_p04_resume_is_exact(task, tmp_path):
    settings = write(task, tmp_path) | {"model.dropout.all": 0.1}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run_training(config_of(whole, settings))
    assert run_training(config_of(parted, settings), StopAfter(3)) is None
    assert run_training(config_of(parted, settings, **{"run.resume": "yes", "data.num_workers": 0}))
    assert_same_run(whole, parted)


NOT_CHANGED = {"causal-lm", "dialogue", "image-classification"}  # their texts are the targets, or there are none


def test_p04_training_texts_change_and_resume_is_exact_or_it_is_refused_by_name(task, tmp_path, capsys):
    synonyms = tmp_path / "synonyms.tsv"
    synonyms.write_text("word\tsynonyms\nthe\ta very\ncat\tdog,house\n")
    settings = write(task, tmp_path) | {"augment.text.synonym_file": str(synonyms), "augment.text.synonym_rate": 0.5}
    settings |= {"augment.text.mask": 0.2, "train.max_steps": 3}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    if task in NOT_CHANGED:
        with pytest.raises(ConfigError, match=r"augment\.text\.mask"):
            run_training(config_of(whole, settings))
        return
    assert run_training(config_of(whole, settings, **{"run.dry_run": True})) == {}
    said = capsys.readouterr().out
    assert "augmented samples" in said
    assert "[MASK]" in said
    assert run_training(config_of(whole, settings))
    assert run_training(config_of(parted, settings), StopAfter(2)) is None
    assert run_training(config_of(parted, settings, **{"run.resume": "yes"}))
    assert_same_run(whole, parted)
    plain = {key: value for key, value in settings.items() if not key.startswith("augment")}
    assert run_training(config_of(tmp_path / "plain", plain))
    assert losses(tmp_path / "plain") != losses(whole)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_p01_the_loss_does_not_depend_on_the_micro_batches(task, tmp_path):
    """With dropout 0, four steps whose losses and gradient norms are the same however they are cut."""
    settings = write(task, tmp_path) | {"model.dropout.all": 0.0, "eval.every_steps": 100}

    def curve(name: str, **changes: Any) -> list[tuple[float, float]]:
        assert run_training(config_of(tmp_path / name, settings, **changes))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    expected = curve("whole")
    assert len(expected) == 4
    for name, changes in (("one", {"train.micro_batch_size": 1}), ("tokens", {"train.micro_batch_tokens": 50})):
        found = curve(name, **changes)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4)
