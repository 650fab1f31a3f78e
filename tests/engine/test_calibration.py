"""Temperature, thresholds and the calibration error: oracles, and what a run keeps and applies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from support.cases import evaluation, predictions
from support.runs import (
    StopAfter,
    arguments_of,
    assert_same_run,
    logged_rows,
    run_module,
    run_training,
    tiny_config,
    write_reviews,
)

import models
from data.errors import DataError
from engine import evaluate, judging
from engine.calibration import (
    Calibration,
    calibration_error,
    fit_temperature,
    read_calibration,
    reliability_bins,
    set_calibration,
)
from engine.config import ConfigError, override
from engine.metrics import bootstrap
from engine.metrics.by_example import class_rows, collect_classes
from engine.metrics.text_classification import classification_metrics
from engine.tasks import TASKS
from engine.thresholds import MEASURES, tune_threshold, tune_thresholds
from engine.validate import check_thresholds, task_settings
from models import ModelError


def logits_and_labels(problem: str, seed: int = 0, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits that are far too sure, and labels that agree with them to some degree."""
    generator = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(count, 4, generator=generator)
    noise = torch.randn(count, 4, generator=generator)
    if problem == "single-label":
        return logits, (logits / 6 + 0.7 * noise).argmax(-1)
    return logits, (logits / 6 + 0.7 * noise > 0.5).float()


@pytest.mark.parametrize("problem", ["single-label", "multi-label"])
def test_the_temperature_has_the_smallest_log_loss(problem):
    logits, labels = logits_and_labels(problem)

    def loss(scale: float) -> float:
        scaled = scale * logits.double()
        if problem == "single-label":
            return F.cross_entropy(scaled, labels).item()
        return F.binary_cross_entropy_with_logits(scaled, labels.double()).item()

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.01, 10), method="bounded", options={"xatol": 1e-9}).x
    assert fit_temperature(logits, labels, problem) == pytest.approx(1 / best, rel=1e-5)


def test_always_right_or_wrong_the_temperature_is_a_bound():
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(logits, torch.tensor([0, 1]), "single-label") == 0.01
    assert fit_temperature(logits, torch.tensor([1, 0]), "single-label") == 100
    assert fit_temperature(logits, torch.tensor([-100, -100]), "single-label") == 1


def test_the_calibration_error_by_hand_and_its_bins_add():
    logits, labels = logits_and_labels("single-label")
    confidence, chosen = (x.numpy() for x in logits.double().softmax(-1).max(-1))
    right = chosen == labels.numpy()
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    bins = reliability_bins(logits, labels, "single-label")
    assert calibration_error(bins) == pytest.approx(error, rel=1e-12)
    parts = sum(reliability_bins(logits[k::3], labels[k::3], "single-label") for k in range(3))
    assert torch.allclose(parts, bins, rtol=1e-12)


@pytest.mark.parametrize("measure", ["f1", "f1_positive", "accuracy", "mcc"])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_cuts_is_found(seed, measure):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 12, 30) / 11 if seed % 2 else rng.random(30)  # with ties, and without
    is_positive = rng.random(30) < 0.2 + 0.5 * p
    function = MEASURES["single-label"][measure]

    def value(threshold: float) -> float:
        chosen = p > threshold
        tp, fp = (chosen & is_positive).sum(), (chosen & ~is_positive).sum()
        return float(function(*map(np.float64, (tp, fp, is_positive.sum() - tp, (~is_positive).sum() - fp))))

    tuned = tune_threshold(p, is_positive, function)
    assert tuned.value == max(map(value, [*p, *(p - 1e-9).clip(0)])) == value(tuned.threshold)
    assert tuned.before == value(0.5)
    if measure == "f1":
        assert tuned.value == pytest.approx(f1_score(is_positive, p > tuned.threshold, average="macro"))


def test_one_half_stays_where_nothing_is_better_or_known():
    p = np.array([0.1, 0.4, 0.6, 0.9])
    assert tune_threshold(p, p > 0.5, MEASURES["multi-label"]["f1"]).threshold == 0.5
    for all_alike in (np.zeros(4, bool), np.ones(4, bool)):
        tuned = tune_threshold(p, all_alike, MEASURES["multi-label"]["f1"])
        assert tuned.is_degenerate
        assert tuned.threshold == 0.5
    close = np.nextafter(0.7, 1)
    tuned = tune_threshold(np.array([0.7, close]), np.array([False, True]), MEASURES["multi-label"]["f1"])
    assert (np.array([0.7, close]) > tuned.threshold).tolist() == [False, True]  # neighbours in fp64
    p = np.array([[0.3, 0.2], [0.4, 0.1], [0.1, 0.9]])
    labels = np.array([[1.0, np.nan], [1.0, 0.0], [0.0, 1.0]])  # what is no target does not count
    assert tune_thresholds(p, labels, "multi-label", "f1")[0] == pytest.approx((0.2, 0.5))


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    before, bootstrap.RESAMPLES = bootstrap.RESAMPLES, 40
    yield
    bootstrap.RESAMPLES = before


@pytest.fixture(scope="module")
def judged(checkpoint_folder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the run folder, the validation file) of a run with everything that [eval] can judge by."""
    folder = tmp_path_factory.mktemp("judged")
    validation = write_reviews(folder / "validation.jsonl", 40, seed=7)
    given = {
        "data.validation": str(validation),
        "data.test": str(validation),
        "train.max_steps": 10,
        "eval.at_start": True,
        "eval.confidence": 0.9,
        "eval.fit_temperature": True,
        "eval.tune_thresholds": "accuracy",
    }
    config = tiny_config(checkpoint_folder, reviews, folder / "run", given)
    result = run_training(config)
    assert {"test_accuracy", "test_accuracy_low", "test_accuracy_high"} <= result.keys()
    return folder / "run", validation


def test_a_run_keeps_what_it_fitted_in_best_alone(judged):
    run, _ = judged
    best, last = (json.loads((run / name / "config.json").read_text()) for name in ("best", "last"))
    assert best["calibration_temperature"] > 0
    assert list(best["thresholds"]) == ["positive"]
    assert not {"calibration_temperature", "thresholds"} & last.keys()


def test_step_0_is_logged_with_intervals_and_is_not_the_best(judged):
    rows = [row for row in logged_rows(judged[0]) if "evaluation" in row]
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert rows[0]["best"] is False
    for row in rows:
        low, high = row["intervals"]["accuracy"]
        assert 0 <= low <= row["evaluation"]["accuracy"] <= high <= 1


def test_evaluation_and_prediction_apply_them(judged):
    run, validation = judged
    kept = json.loads((run / "best" / "config.json").read_text())
    result, rows = evaluation(run, validation), predictions(run, validation)
    truth = [json.loads(line)["label"] for line in validation.read_text().splitlines()]
    for row in rows:
        above = row["probabilities"]["positive"] > kept["thresholds"]["positive"]
        assert row["label"] == ("positive" if above else "negative")
        logits = torch.tensor([*row["logits"].values()], dtype=torch.float64)
        expected = (logits / kept["calibration_temperature"]).softmax(0).tolist()
        assert [*row["probabilities"].values()] == pytest.approx(expected, rel=1e-9)
    right = np.mean([row["label"] == label for row, label in zip(rows, truth, strict=True)])
    assert result["accuracy"] == pytest.approx(right)
    assert result["intervals"]["accuracy"][0] <= right <= result["intervals"]["accuracy"][1]
    assert result["confusion_matrix"]["labels"] == ["negative", "positive"]
    assert sum(map(sum, result["confusion_matrix"]["counts"])) == len(truth)
    assert result["per_class"]["positive"]["count"] == truth.count("positive")
    calibration = result["calibration"]
    assert sum(one["count"] for one in calibration["bins"]) == len(truth)
    assert calibration["temperature"] == kept["calibration_temperature"]
    assert result["accuracy"] >= evaluation(run / "last", validation)["accuracy"] - 0.2


@pytest.mark.parametrize(("fitted", "kept", "note"), [(0.01, None, "it stays 1, since all"), (100.0, 100.0, "largest")])
def test_validation_data_that_sets_no_temperature(
    fitted, kept, note, monkeypatch, checkpoint_folder, reviews, tmp_path, capsys
):
    monkeypatch.setattr(judging, "fit_temperature", lambda *_: fitted)
    given = {"train.max_steps": 1, "eval.every_steps": 1, "eval.fit_temperature": True}
    run_training(tiny_config(checkpoint_folder, reviews, tmp_path / "run", given))
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert config.get("calibration_temperature") == kept
    assert note in capsys.readouterr().out


@pytest.mark.oracle
def test_transformers_ignores_them_and_keeps_them(judged, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    best, validation = judged[0] / "best", judged[1]
    theirs, tokenizer = AutoModelForSequenceClassification.from_pretrained(best), AutoTokenizer.from_pretrained(best)
    text = json.loads(validation.read_text().splitlines()[0])["text"]
    logits = theirs.eval()(**tokenizer(text, return_tensors="pt")).logits[0].tolist()
    assert logits == pytest.approx([*predictions(best, validation)[0]["logits"].values()], abs=1e-5)
    theirs.save_pretrained(tmp_path)
    saved, kept = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, best))
    for key in ("calibration_temperature", "thresholds"):
        assert saved[key] == kept[key]


def test_a_temperature_of_generation_is_no_calibration(judged):
    model = models.from_pretrained(judged[0] / "last", head="sequence-classification")
    model.spec = replace(model.spec, config=dict(model.spec.config) | {"temperature": 0.7})
    assert read_calibration(model) == Calibration()


def test_training_goes_on_without_them(judged, checkpoint_folder, reviews, tmp_path, capsys):
    run, _ = judged
    given = {"model.name": str(run / "best"), "train.max_steps": 1, "eval.every_steps": 1}
    run_training(tiny_config(checkpoint_folder, reviews, tmp_path / "run", given))
    assert "calibration_temperature and thresholds in config.json" in capsys.readouterr().out
    assert "thresholds" not in json.loads((tmp_path / "run" / "best" / "config.json").read_text())


def test_a_config_that_cannot_be_meant_is_refused(judged):
    model = models.from_pretrained(judged[0] / "last", head="sequence-classification")
    assert read_calibration(model) == Calibration()
    set_calibration(model, Calibration(2.0, (0.25,)))
    assert read_calibration(model) == Calibration(2.0, (0.25,))
    wrong_thresholds = ({"thresholds": {"positive": 2}}, {"thresholds": {"x": 0.1}}, {"thresholds": 0.3})
    for wrong in ({"calibration_temperature": 0}, {"calibration_temperature": "2"}, *wrong_thresholds):
        model.spec.config.clear()
        model.spec.config.update(wrong)
        with pytest.raises(ModelError, match=r"config\.json: (calibration_temperature|thresholds)"):
            read_calibration(model)


def test_settings_without_effect_are_refused(judged, checkpoint_folder, reviews, tmp_path):
    config = tiny_config(checkpoint_folder, reviews, tmp_path, {"eval.tune_thresholds": "f1"})
    with pytest.raises(ConfigError, match="needs two classes, and there are 3"):
        check_thresholds(config, TASKS["text-classification"], ["a", "b", "c"])
    for task, key, value in (
        ("text-regression", "eval.fit_temperature", True),
        ("relation-extraction", "eval.tune_thresholds", "f1"),
        ("multi-label-classification", "eval.tune_thresholds", "f1_positive"),
    ):
        with pytest.raises(ConfigError, match=key):
            task_settings(override(config, {"eval.tune_thresholds": "none", "run.task": task, key: value}), TASKS[task])


def test_a_comparison_of_runs_is_that_of_their_predictions(judged, tmp_path, capsys):
    """Two checkpoints, and the files that engine.predict writes for them: equal numbers, and McNemar's counts."""
    run, validation = judged
    files = []
    for name in ("best", "last"):
        predictions(run / name, validation)
        files.append(validation.with_suffix(".predictions.jsonl").rename(tmp_path / f"{name}.jsonl"))
    pairs = {"runs": [run / "best", run / "last"], "files": files, "mixed": [run / "best", files[1]]}
    results = {}
    for kind, (a, b) in pairs.items():
        output = tmp_path / f"{kind}.json"
        given = ["--run.task=text-classification"] if kind == "files" else []
        argv = [str(a), "--against", str(b), "--data.test", str(validation), "--output", str(output), *given]
        assert evaluate.main([*argv, "--run.device=cpu", "--eval.confidence=0.9"]) == 0
        results[kind] = json.loads(output.read_text())["metrics"]
    assert "McNemar" in capsys.readouterr().out
    for kind in ("files", "mixed"):
        for name, one in results["runs"].items():
            assert results[kind][name]["difference"] == pytest.approx(one["difference"], abs=1e-6), (kind, name)
            assert results[kind][name]["interval"] == pytest.approx(one["interval"], abs=1e-6)
            assert results[kind][name]["p_value"] == pytest.approx(one["p_value"], abs=0.02)


def test_other_examples_are_counted_and_refused(judged, tmp_path):
    run, validation = judged
    rows = predictions(run, validation)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in [*rows[3:], {"id": "x", "label": "positive"}]))
    argv = [str(run), "--against", str(other), "--data.test", str(validation), "--run.device=cpu"]
    with pytest.raises(ValueError, match=r"3 of 40 examples have no prediction .*; 1 predictions are of other ids"):
        evaluate.main(argv)


def test_a_file_of_predictions_may_have_other_forms(judged, tmp_path, capsys):
    """A mark of its encoding, empty lines and another order; what is wrong is named with its line or its id."""
    run, validation = judged
    rows = predictions(run / "last", validation)
    other, output = tmp_path / "other.jsonl", tmp_path / "pair.json"
    argv = [str(run), "--against", str(other), "--data.test", str(validation), "--run.device=cpu"]

    def write(rows: list[dict[str, object]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        other.write_text(f"{lines}\n", encoding="utf-8-sig")

    write(rows[::-1])
    assert evaluate.main([*argv, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["confidence"] == 0.9  # of the recipe
    wrong = {
        "the prediction with id '.*' has no 'label'": [*rows[1:], {"id": rows[0]["id"]}],
        "has the label 'neutral', and the classes are negative, positive": [*rows[1:], rows[0] | {"label": "neutral"}],
    }
    for sentence, changed in wrong.items():
        write(changed)
        with pytest.raises(DataError, match=sentence):
            evaluate.main(argv)
    other.write_text("id,label\n1,positive\n")
    with pytest.raises(DataError, match=r"other.jsonl:1: 'id,label' is no prediction, .*: name the .jsonl file that"):
        evaluate.main(argv)
    with pytest.raises(ConfigError, match=r"run.task = 'masked-lm', and .* is a model of text-classification"):
        evaluate.main([*argv, "--run.task", "masked-lm"])


def test_rows_of_two_classes_keep_the_threshold():
    logits, labels = torch.randn(9, 2), torch.randint(0, 2, (9,))
    predicted = (logits.softmax(-1)[:, 1] > 0.3).long()
    metrics = classification_metrics(collect_classes(class_rows(logits, labels, predicted), ["a", "b"]))
    assert metrics["accuracy"] == pytest.approx((predicted == labels).double().mean().item())


def test_p04_a_judged_run_resumes_exactly(checkpoint_folder, reviews, tmp_path):
    given = {"train.max_steps": 8, "eval.every_steps": 4, "eval.at_start": True, "eval.confidence": 0.5}
    given |= {"eval.tune_thresholds": "f1", "eval.fit_temperature": True}
    run_training(tiny_config(checkpoint_folder, reviews, tmp_path / "whole", given))
    for stop in (0, 4):
        config = tiny_config(checkpoint_folder, reviews, tmp_path / f"part{stop}", given)
        assert run_training(config, StopAfter(stop)) is None
        run_training(override(config, {"run.resume": "yes"}))
        assert_same_run(tmp_path / "whole", tmp_path / f"part{stop}")


@pytest.mark.slow
def test_two_ranks_judge_as_one_does(judged, tmp_path):
    run, validation = judged
    given = ["--eval.confidence=0.9", "--run.device=cpu", "--data.test", validation]
    results = []
    for ranks in (1, 2):
        done = run_module("engine.evaluate", run, *given, "--output", tmp_path / f"{ranks}.json", ranks=ranks)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    one, two = results
    assert two["confusion_matrix"] == one["confusion_matrix"]
    for name in one["intervals"]:
        assert two["intervals"][name] == pytest.approx(one["intervals"][name], abs=1e-6), name
    assert two["calibration"]["ece"] == pytest.approx(one["calibration"]["ece"], abs=1e-6)
    arguments = [run / "best", "--against", run / "last", *given[1:], "--output", tmp_path / "pair.json"]
    done = run_module("engine.evaluate", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "pair.json").read_text())["examples"] == 40


@pytest.mark.slow
def test_two_ranks_with_shards_fit_what_one_does(checkpoint_folder, reviews, tmp_path):
    """On the averaged weights, which are gathered for it; so is the evaluation before the first step."""
    given = {"train.max_steps": 4, "eval.every_steps": 4, "eval.at_start": True, "regularize.ema_decay": 0.5}
    given |= {"eval.tune_thresholds": "f1", "eval.fit_temperature": True, "model.dropout.all": 0.0}
    one = tiny_config(checkpoint_folder, reviews, tmp_path / "one", given)
    run_training(one)
    two = override(one, {"run.folder": str(tmp_path / "two"), "distributed.strategy": "fsdp"})
    done = run_module("engine.train", *arguments_of(two, tmp_path / "two.toml"), ranks=2)
    assert done.returncode == 0, done.stderr
    configs = [json.loads((tmp_path / name / "best/config.json").read_text()) for name in ("one", "two")]
    assert configs[1]["calibration_temperature"] == pytest.approx(configs[0]["calibration_temperature"], rel=1e-4)
    assert configs[1]["thresholds"] == pytest.approx(configs[0]["thresholds"], abs=1e-4)
    starts = [logged_rows(tmp_path / name)[0] for name in ("one", "two")]
    assert starts[0]["step"] == starts[1]["step"] == 0
    assert starts[1]["evaluation"]["loss"] == pytest.approx(starts[0]["evaluation"]["loss"], rel=1e-5)
