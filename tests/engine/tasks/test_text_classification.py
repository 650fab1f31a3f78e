"""Classes, label sets and scores of texts and pairs: labels as files have them, metrics against scikit-learn and scipy,
what tiny models learn, and what `engine.evaluate` and `engine.predict` say of one file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.runs import WORDS, run_training

import models
from benchmarks.prepare.chinese_sentiment import vocabulary
from benchmarks.prepare.package_tags import read_packages
from data import DataError, MicroBatching, evaluation_batches, load_tokenizer, training_steps
from data import labels as label_sets
from data.errors import ErrorList
from data.formats.rows import Row
from engine import config as configs
from engine import evaluate, predict
from engine.config import Config, ConfigError, GenerateSettings
from engine.metrics.text_classification import multi_label_metrics, multi_label_statistics, per_label_table
from engine.metrics.text_regression import average_ranks, pearson, regression_metrics, regression_statistics
from engine.model import build_model
from engine.optim import learning_rate
from engine.tasks import TASKS, read_training_data

# Metrics against their oracles


def multi_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return multi_label_statistics(F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), logits, labels)


def random_label_sets(count: int, num_labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, num_labels, generator=generator)
    return logits, (torch.rand(count, num_labels, generator=generator) < 0.3).float()


def label_set_case(predicted: list[list[int]], labels: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(predicted).float() * 6 - 3, torch.tensor(labels).float()


LABEL_SETS = {
    "random": random_label_sets(97, 7, 0),
    "one-label": random_label_sets(40, 1, 1),
    "more-labels-than-examples": random_label_sets(3, 25, 2),
    "perfect": label_set_case([[1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [1, 1]]),
    "all-wrong": label_set_case([[1, 0], [0, 1]], [[0, 1], [1, 0]]),
    "nothing-predicted": label_set_case([[0, 0], [0, 0]], [[1, 0], [1, 1]]),
    "nothing-there": label_set_case([[1, 0], [1, 1]], [[0, 0], [0, 0]]),
    "one-never-there": label_set_case([[1, 0, 0], [1, 0, 1]], [[1, 0, 0], [1, 0, 0]]),
    "one-example": label_set_case([[1, 0, 1]], [[1, 1, 0]]),
}


@pytest.mark.parametrize(("logits", "labels"), LABEL_SETS.values(), ids=LABEL_SETS.keys())
def test_metrics_of_label_sets_are_those_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy().astype(int), (logits.sigmoid() > 0.5).numpy().astype(int)
    found = multi_label_metrics(multi_label(logits, labels))
    occurs = (true.sum(0) + predicted.sum(0)) > 0
    assert occurs.any()
    expected = {
        "loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
        "subset_accuracy": (true == predicted).all(1).mean(),
    }
    if true.shape[1] > 1:  # scikit-learn takes one column for classes
        assert expected["subset_accuracy"] == sklearn.accuracy_score(true, predicted)
    for name, function in (
        ("precision", sklearn.precision_score),
        ("recall", sklearn.recall_score),
        ("f1", sklearn.f1_score),
    ):
        one = {"average": "binary"} if true.shape[1] == 1 else {"average": "micro"}
        expected[f"{name}_micro"] = function(true, predicted, zero_division=0, **one)
        if occurs.sum() > 1:
            average = function(true[:, occurs], predicted[:, occurs], average="macro", zero_division=0)
        else:
            average = function(true[:, occurs][:, 0], predicted[:, occurs][:, 0], zero_division=0)
        expected[name] = average
    assert found.keys() == expected.keys() == {*TASKS["multi-label-classification"].metrics}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6 if name == "loss" else 1e-12, abs=1e-12), name


@pytest.mark.parametrize(("logits", "labels"), LABEL_SETS.values(), ids=LABEL_SETS.keys())
def test_the_table_of_labels_is_that_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy().astype(int), (logits > 0).numpy().astype(int)
    names = [f"label{i}" for i in range(true.shape[1])]
    header, *lines = per_label_table(multi_label(logits, labels), names).splitlines()
    assert header.split() == ["precision", "recall", "f1", "count", "predicted"]
    counts = []
    for line in lines:
        name, *values = line.split()
        i = names.index(name)
        theirs = sklearn.precision_recall_fscore_support(true[:, i], predicted[:, i], average="binary", zero_division=0)
        assert [*map(float, values[:3])] == pytest.approx(theirs[:3], abs=5.1e-5)
        assert [*map(int, values[3:])] == [true[:, i].sum(), predicted[:, i].sum()]
        counts.append(true[:, i].sum())
    assert len(lines) == len(names)
    assert counts == sorted(counts, reverse=True)


def test_the_table_shows_the_most_frequent_of_many_labels():
    logits, labels = torch.zeros(1, 60), torch.zeros(1, 60)
    labels[0, 55] = 1
    lines = per_label_table(multi_label(logits, labels), [f"l{i}" for i in range(60)]).splitlines()
    assert lines[1].split()[0] == "l55"
    assert (len(lines), lines[-1]) == (52, "and 10 more labels")


def test_a_probability_of_a_half_is_not_predicted():
    assert multi_label(torch.zeros(1, 1), torch.ones(1, 1))[4] == 0


@pytest.mark.parametrize("parts", [[1] * 97, [64, 33], [0, 90, 0, 7]])
def test_p02_label_sets_are_measured_the_same_for_every_split(parts):
    logits, labels = LABEL_SETS["random"]
    added = torch.stack([multi_label(*p) for p in zip(logits.split(parts), labels.split(parts), strict=True)]).sum(0)
    torch.testing.assert_close(added, multi_label(logits, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(added[1:], multi_label(logits, labels)[1:], rtol=0, atol=0)


RNG = np.random.default_rng(0)
SCORES = {
    "random": (RNG.normal(size=200), RNG.normal(size=200)),
    "correlated": (x := RNG.normal(size=50), x + 0.1 * RNG.normal(size=50)),
    "ties": (RNG.integers(0, 4, 60).astype(float), RNG.integers(0, 3, 60).astype(float)),
    "exact": (np.arange(5.0), 3 * np.arange(5.0) + 1),
    "reversed": (np.arange(5.0), -np.arange(5.0)),
    "monotone": (np.arange(9.0), np.exp(np.arange(9.0))),
    "far-from-zero": (1e6 + RNG.normal(size=30), -1e6 + RNG.normal(size=30)),
    "outlier": (np.array([0.0, 0, 0, 1e4]), np.array([1.0, 2, 3, 4])),
    "two": (np.array([1.0, 2]), np.array([5.0, 3])),
    "constant": (np.full(6, 0.1), np.arange(6.0)),
    "one": (np.array([1.0]), np.array([2.0])),
}


@pytest.mark.parametrize(("predicted", "truth"), SCORES.values(), ids=SCORES.keys())
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_metrics_of_scores_are_those_of_scipy_and_sklearn(predicted, truth):
    stats, sklearn = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    p, t = torch.from_numpy(predicted), torch.from_numpy(truth)
    found = regression_metrics(regression_statistics(p, t, tuple(range(len(p))), len(p)))
    mse = sklearn.mean_squared_error(truth, predicted)
    expected = {"loss": mse, "mse": mse, "mae": sklearn.mean_absolute_error(truth, predicted)}
    enough = len(predicted) > 1
    expected["pearson"] = stats.pearsonr(predicted, truth)[0] if enough else math.nan
    expected["spearman"] = stats.spearmanr(predicted, truth)[0] if enough else math.nan
    assert found.keys() == expected.keys() == {*TASKS["text-regression"].metrics}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


def test_ranks_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for size in range(1, 30):
        values = RNG.integers(0, size, size).astype(float)
        assert average_ranks(values).tolist() == stats.rankdata(values).tolist()
    assert np.isnan(average_ranks(np.array([1.0, math.nan]))).all()


def test_a_nan_among_the_predictions_is_a_nan_of_every_metric():
    rows = regression_statistics(torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 2.0, 3.0]), (0, 1, 2), 3)
    assert all(math.isnan(value) for value in regression_metrics(rows).values())
    assert math.isnan(pearson(np.array([]), np.array([])))


@pytest.mark.parametrize("size", [1, 3, 16, 50])
def test_p02_scores_are_measured_the_same_in_every_order_and_split(size):
    predicted, truth = (torch.from_numpy(values) for values in SCORES["correlated"])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(size))
    total = regression_statistics(predicted[:0], truth[:0], (), 50)
    for part in order.split(size):
        total += regression_statistics(predicted[part], truth[part], tuple(part.tolist()), 50)
    assert torch.equal(total, regression_statistics(predicted, truth, tuple(range(50)), 50))


# Labels as files have them


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["a", "b"], ["a", "b"]),
        ([], []),
        ("", []),
        ("  ", []),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("b; a ;c", ["b", "a", "c"]),
        ("a, b; c", ["a", "b", "c"]),
        (["a, b", "c;"], ["a, b", "c;"]),  # in a list, names are names
        (["中文", "é"], ["中文", "é"]),
        ("中文,é", ["中文", "é"]),
        ([1, 2.5, True], ["1", "2.5", "true"]),
        (7, ["7"]),
        ([" a ", "b"], ["a", "b"]),
    ],
)
def test_labels_are_a_list_or_text_with_separators(value, names):
    assert label_sets.label_set(value) == names


def rows_with(column: str, values: list[object]) -> list[Row]:
    return [Row(str(i), i, {"text": "x", column: value}) for i, value in enumerate(values, 1)]


def test_f13_bad_label_sets_are_reported_together():
    values = [["a"], {"a": 1}, ["a", ["b"]], "a,,b", "a,", ["a", ""], ["a", "a "], [None], [math.nan]]
    errors = ErrorList()
    label_sets.check_label_sets("FILE", rows_with("labels", values), "labels", errors)
    assert [text for _, text in errors.found] == [
        "FILE:2: labels should be a list, or text with commas or semicolons between them, this is {'a': 1}",
        "FILE:3: a label should be text or a number, this is ['b']",
        "FILE:4: an empty label in ['a', '', 'b']",
        "FILE:5: an empty label in ['a', '']",
        "FILE:6: an empty label in ['a', '']",
        "FILE:7: the label 'a' twice",
        "FILE:8: a label should be text or a number, this is None",
        "FILE:9: a label should be text or a number, this is nan",
    ]


def test_f13_unknown_labels_of_a_set_are_reported_together():
    rows = rows_with("labels", [["a", "x"], "b", "y;a;z"])
    with pytest.raises(DataError) as caught:
        label_sets.check_known_labels("FILE", rows, "labels", ["a", "b"])
    assert str(caught.value).split("\n") == [
        f"FILE:{line}: unknown label {label!r}; the labels are 'a', 'b'"
        for line, label in [(1, "x"), (3, "y"), (3, "z")]
    ]


def test_p09_names_of_label_sets_are_sorted_or_declared_whatever_the_order_of_the_rows():
    values: list[object] = [["b", "a"], "10;9", [], "c"]
    for _ in range(5):
        random.Random(0).shuffle(values)
        rows = rows_with("labels", values)
        assert label_sets.label_set_names("FILE", rows, "labels", ()) == ["10", "9", "a", "b", "c"]
        assert label_sets.label_set_names("FILE", rows, "labels", ("c", "z")) == ["c", "z"]
    assert label_sets.label_set_names("FILE", rows_with("labels", ["10,9", "2"]), "labels", ()) == ["2", "9", "10"]
    with pytest.raises(DataError, match="FILE: no row has a label in 'labels'"):
        label_sets.label_set_names("FILE", rows_with("labels", [[], ""]), "labels", ())


def test_label_sets_become_rows_of_zeros_and_ones():
    found = label_sets.multi_hot(rows_with("labels", ["c,a", [], ["b"]]), "labels", ["a", "b", "c"])
    assert found.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert found.dtype == np.float32
    assert label_sets.multi_hot([], "labels", ["a", "b"]).shape == (0, 2)


@pytest.mark.parametrize("value", [0, -1, 2.5, "0", "-1", "2.5", " 1e3 ", "+4", ".5", 10**30])
def test_scores_are_numbers_or_text_that_is_one(value):
    errors = ErrorList()
    label_sets.check_scores("FILE", rows_with("score", [value]), "score", errors)
    assert not errors
    assert label_sets.scores(rows_with("score", [value]), "score").tolist() == [[np.float32(float(value))]]


BAD_SCORES = [
    "",
    "x",
    "1,5",
    "1_000",
    "nan",
    "inf",
    math.nan,
    math.inf,
    True,
    None,
    [1],
    {"a": 1},
    1e39,
    10**400,
    "1e39",
]


def test_f13_bad_scores_are_reported_together():
    errors = ErrorList()
    label_sets.check_scores("FILE", rows_with("score", [1, *BAD_SCORES]), "score", errors)
    assert [text for _, text in errors.found] == [
        f"FILE:{line}: a score in 'score' should be a number, this is {value!r}"
        for line, value in enumerate(BAD_SCORES, 2)
    ]


def test_a_regression_has_one_score(tiny, tmp_path):
    task = TASKS["text-regression"]
    settings = task.columns.fill(configs.DataSettings(labels=("a", "b")))
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
    """Which of the two texts says that it is good?"""
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
    """(the configuration, a test file) of a run that should have learned its problem."""
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


def test_predictions_need_no_labels_and_do_not_depend_on_the_order(learned, tmp_path):
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
    data = task.columns.fill(config.data)
    model = models.from_pretrained(f"{config.run.folder}/best", head=task.head).eval()
    processor = task.load_processor(Path(config.run.folder) / "best")
    examples = task.encode(task.read(str(test), data, True), processor, data, model.labels, True)
    with torch.no_grad():
        whole = task.evaluate_batch(model, examples.batch(range(len(examples))), examples, GenerateSettings())
        total = torch.zeros_like(whole)
        for rank in range(world_size):
            total += task.evaluate_batch(model, examples.batch([]), examples, GenerateSettings())  # zeros
            for part in evaluation_batches(examples, MicroBatching(max_examples=size, rank=rank, world_size=world_size)):
                total += task.evaluate_batch(model, examples.batch(part), examples, GenerateSettings())
    assert total.dtype == torch.float64
    expected = task.compute_metrics(whole, model.labels)
    for name, value in task.compute_metrics(total, model.labels).items():
        assert value == pytest.approx(expected[name], rel=1e-5), name


def test_csv_and_json_lists_are_the_same_labels(checkpoint_folder, tmp_path):
    """The same rows as a JSON list, with semicolons in csv, with commas in tsv."""
    task, found = TASKS["multi-label-classification"], {}
    rows = topic_rows(20, seed=3)
    write(tmp_path / "rows.jsonl", rows)
    for suffix, comma, separator in (("csv", ",", ";"), ("tsv", "\t", ", ")):
        lines = [comma.join(["id", "text", "labels"])]
        lines += [comma.join([row["id"], row["text"], separator.join(row["labels"])]) for row in rows]
        (tmp_path / f"rows.{suffix}").write_text("\n".join(lines))
    tokenizer = load_tokenizer(checkpoint_folder)
    for suffix in ("jsonl", "csv", "tsv"):
        data = task.columns.fill(configs.DataSettings())
        name = str(tmp_path / f"rows.{suffix}")
        read = task.read(name, data, True)
        labels = task.find_labels(name, read, data)
        task.check_labels(name, read, data, labels)
        found[suffix] = task.encode(read, tokenizer, data, labels, True)
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
            "rows.jsonl:5: 'text' should be text, this is 1",
            "rows.jsonl:5: labels should be a list, or text with commas or semicolons between them, this is {}",
        ],
        "text-regression": [
            "rows.jsonl:1: 'text' is empty",
            "rows.jsonl:2: not JSON: Expecting value: line 1 column 1 (char 0)",
            "rows.jsonl:3: a score in 'score' should be a number, this is '?'",
            "rows.jsonl:4: column 'score' is null",
            "rows.jsonl:5: 'text' should be text, this is 1",
            "rows.jsonl:5: a score in 'score' should be a number, this is []",
        ],
    }
    for task, expected in wrong.items():
        with pytest.raises(DataError) as caught:
            TASKS[task].read(name, TASKS[task].columns.fill(configs.DataSettings()), True)
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
    data = TASKS[task].columns.fill(config.data)
    rows, _, _, labels = read_training_data(TASKS[task], data, 0)
    model, _ = build_model(config.model, TASKS[task], labels, 0.0, 0, None)
    start = tmp_path / "start"
    models.save_pretrained(model, start)  # both begin with this head
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
    examples = TASKS[task].encode(rows, load_tokenizer(start), data, labels, True)
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


# Data that is prepared


def test_packages_are_read_from_the_index_of_apt():
    index = (
        "Package: libfoo1\nSource: foo (1.2-3)\nVersion: 1\nDescription: does foo: well\n"
        "Tag: role::shared-lib, devel::library,\n implemented-in::c\nSize: 3\n\n"
        "Package: bar\nDescription: no tags\n\n"
        "Package: baz\nDescription: itself\nTag: role::program\n"
    )
    tags = ["devel::library", "implemented-in::c", "role::shared-lib"]
    assert list(read_packages(index)) == [
        {"id": "libfoo1", "text": "does foo: well", "labels": tags, "source": "foo"},
        {"id": "baz", "text": "itself", "labels": ["role::program"], "source": "baz"},
    ]


def test_the_vocabulary_of_characters_encodes_chinese_and_english(tmp_path):
    texts = ["我爱北京。Good 5!"] * 3 + ["一"]
    vocab = vocabulary(texts)
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(vocab) == len(set(vocab))
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokens = load_tokenizer(tmp_path).encode("我 爱北京，一 good。").tokens
    assert tokens == ["[CLS]", "我", "爱", "北", "京", "[UNK]", "[UNK]", "g", "##o", "##o", "##d", "。", "[SEP]"]
