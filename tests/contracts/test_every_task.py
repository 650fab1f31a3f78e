"""The promises to every task: each test runs for every row of TASKS, so that a new task is tested from the start."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.runs import StopAfter, assert_same_run, assert_same_tensors, run_training
from support.task_data import write
from support.task_settings import settings_of

import engine
import models
from data import Batch, Examples, MicroBatching, evaluation_batches
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError
from engine.metrics.text_classification import POSITIVE_CLASS_METRICS
from engine.prediction_rows import KINDS, prediction_rows
from engine.report.page import page
from engine.report.predictions import examine
from engine.report.runs import open_runs
from engine.tasks import TASKS, Task

NO_LIMIT = MicroBatching()


@dataclass(frozen=True)
class Trained:
    """A run of 4 steps, its best model, and its validation examples."""

    task: Task
    config: Config
    model: models.TaskModel
    labelled: Examples
    unlabelled: Examples

    @property
    def validation(self) -> str:
        return self.config.data.validation

    def evaluate(self, batch: Batch) -> torch.Tensor:
        return self.task.evaluate_batch(self.model, batch, self.labelled, self.config.generate)

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        return self.task.predict_batch(self.model, batch, self.unlabelled, self.config.generate)

    def metrics(self, limits: MicroBatching = NO_LIMIT, world_size: int = 1) -> dict[str, float]:
        return self.task.compute_metrics(self.statistics(limits, world_size), self.model.labels)

    @torch.no_grad()
    def statistics(self, limits: MicroBatching = NO_LIMIT, world_size: int = 1) -> torch.Tensor:
        """Return the sum over all batches of all ranks, with an empty batch before them."""
        every = [self.labelled.batch([]), *batches(self.labelled, limits, world_size)]
        of_batches = [self.evaluate(batch) for batch in every]
        assert all(one.dtype == torch.float64 and one.shape == of_batches[0].shape for one in of_batches)
        return torch.stack(of_batches).sum(0)


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
    task, settings = TASKS[request.param], settings_of(config)
    best = folder / "run" / "best"
    model = models.from_pretrained(best, head=task.head).eval()
    processor = task.load_processor(best)
    labelled, unlabelled = (
        task.encode(task.read(config.data.validation, settings, known), processor, settings, model.labels, known)
        for known in (True, False)
    )
    return Trained(task, config, model, labelled, unlabelled)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


BATCHINGS = [  # (limits of a batch, number of ranks)
    (MicroBatching(max_examples=1), 1),
    (MicroBatching(max_examples=5), 2),
    (MicroBatching(max_tokens=60), 3),
]


def batches(examples: Examples, limits: MicroBatching, world_size: int) -> list[Batch]:
    """Return the evaluation batches of all ranks, one rank after the other."""
    of_ranks = [MicroBatching(limits.max_examples, limits.max_tokens, rank, world_size) for rank in range(world_size)]
    return [examples.batch(indices) for of_rank in of_ranks for indices in evaluation_batches(examples, of_rank)]


def test_every_metric_is_computed_and_the_watched_one_is_finite(trained):
    metrics = trained.metrics()
    only_for_two = set() if len(trained.model.labels) == 2 else set(POSITIVE_CLASS_METRICS)
    assert set(metrics) >= set(trained.task.metrics) - (
        only_for_two if trained.task.problem == "single-label" else set()
    )
    assert math.isfinite(metrics[trained.task.metrics[0]])
    assert metrics["loss"] > 0


def test_an_empty_batch_gives_zeros_and_no_predictions(trained):
    assert not trained.evaluate(trained.labelled.batch([])).any()
    assert trained.predict(trained.unlabelled.batch([])) == []


def test_an_unlabelled_batch_cannot_be_evaluated(trained):
    batch = trained.unlabelled.batch([0])
    with pytest.raises(TypeError, match="only labelled examples can be evaluated"):
        trained.task.evaluate_batch(trained.model, batch, trained.unlabelled, trained.config.generate)


def test_p02_metrics_do_not_depend_on_batches_or_ranks(trained):
    expected = trained.metrics()
    for limits, world_size in BATCHINGS:
        found = trained.metrics(limits, world_size)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True), limits


@torch.no_grad()
def test_rows_of_examples_give_the_metrics_of_the_sums(trained):
    """Whatever the batches, the rows of eval.confidence are those of the examples, and collect makes sums of them."""
    task, expected = trained.task, trained.metrics()
    if task.evaluate_examples is None:
        pytest.skip("it has no statistics of single examples")
    for limits, world_size in BATCHINGS:
        rows = {}
        for batch in batches(trained.labelled, limits, world_size):
            found = task.evaluate_examples(trained.model, batch, trained.labelled, trained.config.generate)
            rows |= dict(zip(batch.indices, found.double(), strict=True))
        statistics = task.collect(torch.stack([rows[i] for i in range(len(trained.labelled))]), trained.model.labels)
        found = task.compute_metrics(statistics, trained.model.labels)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True), limits
    empty = task.evaluate_examples(trained.model, trained.labelled.batch([]), trained.labelled, trained.config.generate)
    assert empty.shape == (0, len(next(iter(rows.values()))))


@torch.no_grad()
def test_predictions_in_a_file_have_the_metrics_of_the_model(trained):
    """What engine.evaluate --against computes from a file, but for the loss where that is of tokens."""
    task, settings = trained.task, settings_of(trained.config)
    if task.predicts not in KINDS or "perplexity" in task.metrics:
        pytest.skip("its predictions are not compared with what is right")
    rows, labels = task.read(trained.validation, settings, True), trained.model.labels
    task.check_labels(trained.validation, rows, settings, labels)
    made = trained.predict(trained.unlabelled.batch(range(len(rows))))
    expected = trained.metrics()
    statistics = task.collect(prediction_rows(task, made, rows, labels, settings, Path("p.jsonl")), labels)
    for name, value in task.compute_metrics(statistics, labels).items():
        if name != "loss" or not math.isnan(value):
            assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-5, nan_ok=True), name


def test_a_report_has_the_metrics_of_the_evaluation(trained):
    """The page loads nothing, and its tables are those of engine.evaluate; the worst examples are there."""
    folder = trained.config.run.folder
    found = examine(folder, {}, None)
    html = page(open_runs([folder]), [found])
    assert not re.search(r"<script|https?://|@import|url\(|src=\"(?!data:)", html)
    expected = {name: value for name, value in trained.metrics().items() if name in found.metrics}
    assert expected.keys() >= set(trained.task.metrics) & trained.metrics().keys() - {"loss"}
    assert found.metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)
    tables = trained.task.tables(trained.statistics(), trained.model.labels)
    for name, table in tables.items():
        assert_alike(found.tables[name], table)
    results = dict(re.findall(r"<tr><td>([^<]*)</td>(.*?)</tr>", html))
    for name, value in found.metrics.items():
        assert re.findall("<td>([^<]*)</td>", results[name])[-1] == f"{value:.4g}"
    assert (len(found.lengths), found.total) == (len(trained.labelled), 12)
    assert bool(found.worst) == (trained.task.evaluate_examples is not None)


@torch.no_grad()
def test_p03_each_example_is_predicted_once_alike_in_any_batch(trained):
    def rows(limits: MicroBatching, world_size: int) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for batch in batches(trained.unlabelled, limits, world_size):
            for index, row in zip(batch.indices, trained.predict(batch), strict=True):
                assert index not in found
                found[index] = row
        assert sorted(found) == list(range(len(trained.unlabelled)))
        return found

    expected = rows(NO_LIMIT, 1)
    for limits, world_size in BATCHINGS:
        found = rows(limits, world_size)
        for index, row in expected.items():
            assert_alike(found[index], row)


# Tasks that predict one distribution over the labels for a whole example.
HAVE_LOGITS = {"text-classification", "multi-label-classification", "relation-extraction", "image-classification"}
HAVE_LOGITS |= {"multi-label-image-classification"}


@torch.no_grad()
def test_predictions_of_classes_have_the_logits_for_a_student(trained):
    batch = trained.unlabelled.batch(range(len(trained.unlabelled)))
    rows = trained.predict(batch)
    if trained.config.run.task not in HAVE_LOGITS:
        assert not any("logits" in row for row in rows)
        return
    for row, logits in zip(rows, trained.model(batch).logits.double(), strict=True):
        assert row["logits"] == dict(zip(trained.model.labels, logits.tolist(), strict=True))
        p = logits.sigmoid() if trained.task.problem == "multi-label" else logits.softmax(-1)
        assert row["probabilities"] == pytest.approx(dict(zip(trained.model.labels, p.tolist(), strict=True)))


def assert_alike(ours: Any, theirs: Any) -> None:
    """Assert that both are equal, floats up to rounding, at any depth."""
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


# Metrics computed again from the predictions of a file and its rows: task -> (metric, function)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def right_tags(predictions: list[dict], rows: list[dict]) -> float:
    pairs = [
        pair for p, row in zip(predictions, rows, strict=True) for pair in zip(p["tags"], row["tags"], strict=True)
    ]
    return mean([ours == theirs for ours, theirs in pairs])


def mean_rouge(predictions: list[dict], rows: list[dict]) -> float:
    from engine.metrics.summarization import rouge

    return mean([rouge(p["text"], row["summary"])["rougeL"] for p, row in zip(predictions, rows, strict=True)])


def corpus_bleu(predictions: list[dict], rows: list[dict]) -> float:
    sacrebleu = pytest.importorskip("sacrebleu")
    return sacrebleu.corpus_bleu([p["text"] for p in predictions], [[row["target"] for row in rows]]).score


def equal(key: str, column: str) -> Any:
    return lambda predictions, rows: mean([p[key] == r[column] for p, r in zip(predictions, rows, strict=True)])


SAME_SETS = (
    "subset_accuracy",
    lambda ps, rows: mean([set(p["labels"]) == set(r["labels"]) for p, r in zip(ps, rows, strict=True)]),
)
FROM_PREDICTIONS = {
    "text-classification": ("accuracy", equal("label", "label")),
    "multi-label-classification": SAME_SETS,
    "multi-label-image-classification": SAME_SETS,
    "text-regression": (
        "mae",
        lambda ps, rows: mean([abs(p["score"] - r["score"]) for p, r in zip(ps, rows, strict=True)]),
    ),
    "token-classification": ("accuracy", right_tags),
    "question-answering": (
        "exact_match",
        lambda ps, rows: mean([p["answer"] == r["answers"][0]["text"] for p, r in zip(ps, rows, strict=True)]),
    ),
    "relation-extraction": ("accuracy", equal("relation", "relation")),
    "multiple-choice": ("accuracy", equal("choice", "label")),
    "summarization": ("rougeL", mean_rouge),
    "translation": ("bleu", corpus_bleu),
    "image-classification": ("accuracy", lambda ps, rows: mean([p["label"] == p["id"].split("/")[0] for p in ps])),
}
WRITE_TEXTS = {
    "masked-lm",
    "span-corruption",
    "causal-lm",
    "dialogue",
}  # their metrics are not computed from the texts they write
WRITE_VECTORS = {"sentence-embedding"}  # of anchors alone; tests/engine/tasks/test_sentence_embedding.py


def test_the_commands_evaluate_and_predict_one_file_alike(trained, tmp_path, capsys):
    name = trained.config.run.task
    run, file = trained.config.run.folder, trained.validation
    assert evaluate.main([run, "--data.test", file, "--output", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert predict.main([run, "--input", file, "--output", str(tmp_path / "out.jsonl")]) == 0
    predictions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [p["id"] for p in predictions] == trained.unlabelled.ids
    assert metrics["examples"] == len(trained.labelled)
    if name in WRITE_TEXTS:
        assert all(isinstance(p["text"], str) for p in predictions)
        return
    if name in WRITE_VECTORS:
        assert all(math.hypot(*p["embedding"]) == pytest.approx(1, rel=1e-6) for p in predictions)
        return
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()] if Path(file).is_file() else []
    metric, function = FROM_PREDICTIONS[name]
    assert function(predictions, rows) == pytest.approx(metrics[metric], abs=1e-5), metric


def rows_in_memory(source: str) -> list[dict[str, Any]]:
    """Return the rows of a file, or of a folder of images, as a program would have them."""
    if Path(source).is_file():
        return [json.loads(line) for line in Path(source).read_text().splitlines()]
    paths = sorted(Path(source).rglob("*.png"))
    rows = [{"path": Image.open(path), "label": path.parent.name} for path in paths]
    return [row | {"id": f"{path.parent.name}/{path.name}"} for row, path in zip(rows, paths, strict=True)]


def test_rows_in_memory_are_evaluated_and_predicted_as_files(trained, tmp_path, capsys):
    run, file, out = trained.config.run.folder, trained.validation, tmp_path / "out"
    rows = rows_in_memory(file)
    assert evaluate.main([run, "--data.test", file, "--output", str(out), "--run.device", "cpu"]) == 0
    of_file = json.loads(out.read_text())
    of_rows = engine.evaluate_rows(run, rows, **{"run.device": "cpu"})
    assert of_rows == {name: value for name, value in of_file.items() if name in of_rows}
    assert predict.main([run, "--input", file, "--output", str(out), "--run.device", "cpu"]) == 0
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(json.dumps(engine.predict_rows(run, rows, **{"run.device": "cpu"}))) == predictions


def test_rows_in_memory_train_the_run_of_their_files(trained, tmp_path):
    config = trained.config
    rows, held_out = (rows_in_memory(name) for name in (config.data.train, config.data.validation))
    result = engine.run_training(config, rows, held_out, run__folder=str(tmp_path / "run"))
    assert result
    name = "last/model.safetensors"
    assert_same_tensors(tmp_path / "run" / name, Path(config.run.folder) / name)


def test_windows_of_rows_are_predicted_as_the_whole_file(trained, tmp_path, capsys):
    """Sampled texts too: the number of a row in the file decides, not that in its window."""
    more = ["--run.device=cpu", *(["--generate.do_sample=true"] if trained.task.generates else [])]
    found = []
    for size in ("7", "1000"):
        output = tmp_path / f"{size}.jsonl"
        command = [trained.config.run.folder, "--input", trained.validation, "--output", str(output)]
        assert predict.main([*command, "--window", size, *more]) == 0
        found.append([json.loads(line) for line in output.read_text().splitlines()])
    assert len(found[0]) > 7
    assert_alike(*found)


def test_a_file_to_predict_needs_no_labels(trained, tmp_path, capsys):
    """A labelled file is predicted as the same file without its labels."""
    label = settings_of(trained.config).data.label_column
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


def test_a_dry_run_describes_the_run_and_writes_nothing(task, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = write(task, tmp_path)
    assert run_training(config_of(folder, settings, **{"run.dry_run": True})) == {}
    printed = capsys.readouterr().out
    for name, count in (("training", 24), ("validation", 12)):
        shown = re.search(rf"^{name}: (\d+) examples", printed, re.MULTILINE)
        assert int(shown[1]) >= count  # more where a long text is several
    assert "first encoded examples" in printed
    assert "4 steps of 8 examples" in printed
    assert not (folder / "last").exists()


def test_p04_resume_is_exact(task, tmp_path):
    settings = write(task, tmp_path) | {"model.dropout.all": 0.1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_training(config_of(whole, settings))
    assert run_training(config_of(stopped, settings), StopAfter(3)) is None
    assert run_training(config_of(stopped, settings, **{"run.resume": "yes", "data.num_workers": 0}))
    assert_same_run(whole, stopped)


# The texts are targets, or there are none.
REFUSE_TEXT_CHANGES = {"masked-lm", "sentence-embedding", "causal-lm", "dialogue", "image-classification"}
REFUSE_TEXT_CHANGES |= {"span-corruption", "multi-label-image-classification"}


def test_p04_resume_is_exact_with_augmented_texts(task, tmp_path, capsys):
    """Training texts change and resume is exact; tasks that cannot change texts refuse by the setting's name."""
    synonyms = tmp_path / "synonyms.tsv"
    synonyms.write_text("word\tsynonyms\nthe\ta very\ncat\tdog,house\n")
    settings = write(task, tmp_path) | {"augment.text.synonym_file": str(synonyms), "augment.text.synonym_rate": 0.5}
    settings |= {"augment.text.mask": 0.2, "train.max_steps": 3}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    if task in REFUSE_TEXT_CHANGES:
        with pytest.raises(ConfigError, match=r"augment\.text\.mask"):
            run_training(config_of(whole, settings))
        return
    assert run_training(config_of(whole, settings, **{"run.dry_run": True})) == {}
    printed = capsys.readouterr().out
    assert "augmented samples" in printed
    assert "[MASK]" in printed
    assert run_training(config_of(whole, settings))
    assert run_training(config_of(stopped, settings), StopAfter(2)) is None
    assert run_training(config_of(stopped, settings, **{"run.resume": "yes"}))
    assert_same_run(whole, stopped)
    plain = {key: value for key, value in settings.items() if not key.startswith("augment")}
    assert run_training(config_of(tmp_path / "plain", plain))
    assert losses(tmp_path / "plain") != losses(whole)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_p01_the_loss_does_not_depend_on_micro_batches(task, tmp_path):
    """With dropout 0, four steps have equal losses and gradient norms for any micro-batches."""
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
