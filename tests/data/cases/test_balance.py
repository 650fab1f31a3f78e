"""Classes that are rare: the held-out split, what is said before training, the balanced sampler, and the metrics."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from support.cases import dry_run, evaluation, predictions, run, settings_for, write_file

from data import MicroBatching, Row, TextExamples, split_rows, training_steps
from data.order import balanced_order
from engine import imbalance
from engine.config import ConfigError, RegularizeSettings

TEXT = "the cat saw a house"
CLASSES = ["often"] * 60 + ["some"] * 8 + ["rare"] * 2 + ["once"]


def labelled(labels: list, **columns) -> list[dict]:
    return [{"text": f"{TEXT} {i}", "label": label, **columns} for i, label in enumerate(labels)]


# The held-out split


def random_label_sets(count: int, num_labels: int, seed: int) -> list[tuple[str, ...]]:
    """Return sets of labels of which some are rare."""
    rng = np.random.default_rng(seed)
    rates = 0.4 / np.arange(1, num_labels + 1)
    return [tuple(f"l{i}" for i in np.flatnonzero(rng.random(num_labels) < rates)) for _ in range(count)]


@pytest.mark.parametrize("num_groups", [0, 100])
@pytest.mark.parametrize("num_labels", [1, 6, 25])
def test_both_parts_have_every_label_that_two_have(num_labels, num_groups):
    changed = 0
    for seed in range(25):
        labels = random_label_sets(200, num_labels, seed)
        group = (lambda i: i % num_groups) if num_groups else lambda i: i
        rows = [Row(str(i), i, {"group": group(i)}) for i in range(200)]
        column = "group" if num_groups else ""
        plain = split_rows(rows, 0.2, seed, column)
        train, held_out = split_rows(rows, 0.2, seed, column, labels=labels)
        assert (train, held_out) == split_rows(rows, 0.2, seed, column, labels=labels)
        assert sorted(train + held_out, key=lambda row: row.line) == rows
        sides = [{row.values["group"] for row in part} for part in (train, held_out)]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == len({row.values["group"] for row in plain[1]})
        units = Counter(label for _, label in {(group(i), label) for i in range(200) for label in labels[i]})
        found = [{label for row in part for label in labels[row.line]} for part in (train, held_out)]
        assert found[0] == set(units)
        assert found[1] == {label for label, count in units.items() if count > 1}
        plain_found = [{label for row in part for label in labels[row.line]} for part in plain]
        assert (plain == (train, held_out)) == (plain_found == found)  # nothing moves without need
        changed += plain_found != found
    assert changed or num_labels == 1


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6])
def test_a_stratified_split_has_rare_classes_too(fraction):
    rows = [Row(str(i), i, {"label": label}) for i, label in enumerate(CLASSES)]
    for seed in range(20):
        train, held_out = (
            [row.values["label"] for row in part] for part in split_rows(rows, fraction, seed, "", "label")
        )
        assert len(held_out) == round(70 * fraction)
        assert ({*train}, {*held_out}) == ({"often", "some", "rare", "once"}, {"often", "some", "rare"})
        assert all(
            abs(held_out.count(name) - CLASSES.count(name) * fraction) < 1.5 for name in ("often", "some", "rare")
        )


def test_a_part_that_is_too_small_keeps_its_size():
    labels = [(name,) for name in "abcdefgh" for _ in range(3)]
    rows = [Row(str(i), i) for i in range(24)]
    train, held_out = split_rows(rows, 0.2, 0, labels=labels)
    assert len(held_out) == len({labels[row.line] for row in held_out}) == 5
    assert {labels[row.line] for row in train} == {*labels}


TAGS = [["O", "O"], ["B-NAME", "I-NAME"], ["O", "B-CITY"]]
TAGGED = [{"tokens": ["anna", "saw"], "tags": TAGS[1 + (i % 40 == 7) if i % 3 else 0]} for i in range(79)]
SETS = [{"text": f"{TEXT} {i}", "labels": ["red", *["blue"] * (i % 39 == 5)]} for i in range(78)]
QUESTIONS = [
    {
        "question": f"who {i} ?",
        "context": f"anna saw bob {i}",
        "answers": [] if i % 29 == 3 else [{"text": "anna", "answer_start": 0}],
    }
    for i in range(58)
]


@pytest.mark.parametrize(
    ("task", "rows", "count"),
    [
        ("text-classification", labelled(CLASSES[:-1]), "rare 1"),
        ("multi-label-classification", SETS, "blue 1"),
        ("token-classification", TAGGED, "B-CITY 1"),
        ("question-answering", QUESTIONS, ""),
    ],
)
def test_every_task_holds_out_a_rare_label(task, rows, count, tmp_path, capsys):
    for seed in range(3):
        printed = dry_run(settings_for(task, tmp_path, rows, run__seed=seed), capsys)
        validation = printed[printed.index("\nvalidation: ") :]
        assert count in validation[: validation.index("\n\n")]
        assert "no validation example" not in printed


@pytest.mark.parametrize(
    ("task", "train", "validation", "warning"),
    [
        ("text-classification", labelled(CLASSES), labelled(["often", "some"] * 4), "of 'once', 'rare'; f1 counts"),
        ("text-classification", labelled([*CLASSES, "one"], n=1), None, "of 'once', 'one'; f1 counts"),
        ("multi-label-classification", SETS, [{"text": TEXT, "labels": ["red"]}] * 2, "of 'blue'; f1 counts"),
        ("token-classification", TAGGED, TAGGED[:7], "of 'B-CITY'"),
        ("question-answering", QUESTIONS, QUESTIONS[:3], "with no answer"),
    ],
)
def test_labels_without_validation_examples_are_said(task, train, validation, warning, tmp_path, capsys):
    settings = settings_for(task, tmp_path, train)
    if validation is not None:
        settings["data.validation"] = str(write_file(tmp_path / "validation.jsonl", validation))
    assert f"warning: no validation example {warning}" in dry_run(settings, capsys)


# The balanced sampler


@pytest.mark.parametrize("sizes", [[100, 4, 16], [1, 1, 1], [7], [50, 3, 3, 3, 3], [996, 1]])
def test_a_balanced_epoch_has_all_classes_equally_often(sizes):
    names = np.repeat(2 * np.arange(len(sizes)), sizes)  # some classes have no example
    classes = np.random.default_rng(0).permutation(names)
    used, per_class = np.zeros(len(classes), dtype=int), Counter()
    orders = [balanced_order(5, epoch, classes) for epoch in range(7)]
    for epoch, order in enumerate(orders):
        assert len(order) == len(classes)
        counts = Counter(classes[order].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1
        per_class += counts
        for i in order.tolist():  # none is read again before all others of its class
            same = used[classes == classes[i]]
            assert used[i] == same.min()
            used[i] += 1
        assert np.array_equal(order, balanced_order(5, epoch, classes))
    assert max(per_class.values()) - min(per_class.values()) <= 1
    if len(classes) > 10:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], balanced_order(6, 0, classes))


def test_memory_of_a_balanced_order_of_a_large_set_is_said(monkeypatch):
    monkeypatch.setattr(imbalance, "LARGEST_PERMUTATION", 9)
    notes = [imbalance.describe_sampler(np.arange(n) % 2, ("a", "b"), RegularizeSettings())[1:] for n in (9, 10)]
    assert notes[0] == []
    assert notes[1][0].startswith("train.sampler = balanced holds the order of all examples in each process")
    assert "some 7.5e-07 GB while it is made" in notes[1][0]


def test_balanced_steps_do_not_depend_on_the_machine():
    lengths = np.arange(33) % 7 + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(offsets[-1], dtype=np.int32)
    examples = TextExamples(tokens, tokens.astype(np.uint8), offsets, lengths, [*map(str, range(33))], 0)
    classes = np.arange(33) % 7 // 5
    runs = []
    for world_size, size, start in ((1, 0, 0), (1, 3, 0), (3, 2, 0), (2, 1, 6)):
        streams = [
            training_steps(examples, 8, 0, MicroBatching(size, 0, rank, world_size), start=start, classes=classes)
            for rank in range(world_size)
        ]
        steps = [list(chain(*groups)) for groups in islice(zip(*streams, strict=True), 12 - start)]
        runs.append([sorted(i for batch in step for i in batch.indices) for step in steps][6 - start :])
    assert all(steps == runs[0] for steps in runs)


def test_the_sampler_says_how_often_it_reads(tmp_path, capsys):
    settings = settings_for("text-classification", tmp_path, labelled(CLASSES), train__sampler="balanced")
    printed = dry_run(settings | {"regularize.class_weights": ("balanced",)}, capsys)
    assert "an epoch has each of 4 classes 16 times; 'once' has 1 example, each read 16 times an epoch" in printed
    assert "class_weights = balanced weights the rare classes a second time" in printed
    settings |= {"train.max_steps": 6, "eval.every_steps": 3, "data.validation_fraction": 0.3}
    run(settings, capsys)
    assert (tmp_path / "run/best").is_dir()


def test_windows_of_a_long_text_are_read_together(tmp_path, capsys):
    rows = [{"text": " ".join([TEXT] * (1 + i % 9)), "label": "no" if i % 10 else "yes"} for i in range(60)]
    changes = {"data__long_texts": "windows", "data__window_overlap": 2, "data__max_length": 12}
    settings = settings_for("text-classification", tmp_path, rows, train__sampler="balanced", **changes)
    printed = run(settings | {"eval.metric": "roc_auc", "train.max_steps": 8}, capsys)
    assert "an epoch has each of 2 classes 27 times; 'yes' has 5 examples, each read 5.4 times an epoch" in printed
    assert "best_roc_auc" in printed


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("multi-label-classification", {"regularize__class_weights": ("balanced",)}, "regularize.pos_weight weights"),
        ("text-classification", {"regularize__pos_weight": ("2", "1")}, "regularize.class_weights weights classes"),
        ("text-regression", {"regularize__pos_weight": ("balanced",)}, "do not have several labels each: leave it out"),
        ("multi-label-classification", {"train__sampler": "balanced"}, "regularize.pos_weight weights the labels"),
        ("token-classification", {"train__sampler": "balanced"}, "does not have one class: leave it out"),
        ("causal-lm", {"train__sampler": "balanced"}, "does not have one class: leave it out"),
        ("multi-label-classification", {"regularize__pos_weight": ("2",)}, "2 numbers above 0, for 'blue', 'red'"),
        ("text-classification", {"eval__metric": "roc_auc"}, "needs two classes, and there are 4"),
    ],
)
def test_settings_that_do_not_fit_the_task_name_the_right_one(task, setting, message, tmp_path, capsys):
    rows = {"multi-label-classification": SETS, "token-classification": TAGGED}.get(task, labelled(CLASSES))
    with pytest.raises(ConfigError, match=message):
        dry_run(settings_for(task, tmp_path, rows, **setting), capsys)


def test_balanced_pos_weight_is_said(tmp_path, capsys):
    settings = settings_for("multi-label-classification", tmp_path, SETS, regularize__pos_weight=("balanced",))
    settings |= {"data.labels": ("blue", "red", "none"), "data.validation": settings["data.train"]}
    printed = run(settings, capsys)
    assert "regularize.pos_weight = balanced: blue 38, red 1, none 1\n" in printed
    assert "pos_weight is 1 for 'red', 'none', which no training example has, or all have" in printed


# Metrics


@pytest.mark.parametrize("metric", ["f1_positive", "roc_auc", "average_precision"])
def test_metrics_of_the_positive_class_choose_the_best(metric, tmp_path, capsys):
    sklearn = pytest.importorskip("sklearn.metrics")
    rows = labelled(["no", "yes", "no"] * 12)
    test = write_file(tmp_path / "test.jsonl", [row | {"text": row["text"] * (i % 4)} for i, row in enumerate(rows, 1)])
    settings = settings_for("text-classification", tmp_path, rows, eval__metric=metric)
    assert f"best_{metric} " in run(settings, capsys)
    found = evaluation(settings["run.folder"], test)
    assert "the positive class is 'yes', the second of data.labels" in capsys.readouterr().out
    predicted = {row["id"]: row for row in predictions(settings["run.folder"], test) if row["label"]}
    lines = [json.loads(line) for line in test.read_text().splitlines()]
    kept = [(row["label"] == "yes", predicted[str(i)]) for i, row in enumerate(lines, 1) if str(i) in predicted]
    truth = [is_positive for is_positive, _ in kept]
    scores = [row["probabilities"]["yes"] for _, row in kept]
    assert found["roc_auc"] == pytest.approx(sklearn.roc_auc_score(truth, scores), abs=1e-12)
    assert found["average_precision"] == pytest.approx(sklearn.average_precision_score(truth, scores), abs=1e-12)
    chosen = [row["label"] == "yes" for _, row in kept]
    assert found["f1_positive"] == pytest.approx(sklearn.f1_score(truth, chosen, zero_division=0), abs=1e-12)
