"""Metrics of classes against scikit-learn, and their sums over batches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from data.batch import IGNORE_INDEX
from engine.errors import TrainingError
from engine.metrics import image_classification, relation_extraction
from engine.metrics.counts import precision_recall_f1
from engine.metrics.text_classification import (
    POSITIVE_CLASS_METRICS,
    class_counts,
    classification_metrics,
    classification_statistics,
    confusion_matrix,
    per_class_table,
)
from engine.tasks import TASKS


def statistics(logits, labels, indices=None, count=0):
    indices = range(len(labels)) if indices is None else indices
    return classification_statistics(
        F.cross_entropy(logits, labels, reduction="sum"), logits, labels, tuple(indices), count
    )


def predicting(classes, num_labels):
    """Return logits that predict these classes."""
    return F.one_hot(torch.tensor(classes), num_labels).float() * 3


def random_case(count, num_labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, num_labels, generator=generator)
    return logits, torch.randint(0, num_labels, (count,), generator=generator)


CASES = {
    "random-2": random_case(200, 2, 0),
    "random-5": random_case(137, 5, 1),
    "more-classes-than-examples": random_case(4, 9, 2),
    "never-predicted": (predicting([0, 0, 1, 1, 0], 3), torch.tensor([0, 2, 1, 2, 1])),
    "absent": (predicting([0, 2, 1, 2, 0], 3), torch.tensor([0, 0, 1, 1, 0])),
    "neither": (predicting([0, 1, 0], 4), torch.tensor([0, 0, 1])),
    "one-right": (predicting([1], 2), torch.tensor([1])),
    "one-wrong": (predicting([1], 2), torch.tensor([0])),
    "all-wrong": (predicting([1, 2, 0], 3), torch.tensor([0, 1, 2])),
    "all-one-class": (predicting([1] * 6, 2), torch.tensor([1] * 6)),
}


@pytest.mark.parametrize(("logits", "labels"), CASES.values(), ids=CASES.keys())
def test_metrics_are_those_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted = labels.numpy(), logits.argmax(-1).numpy()
    found = classification_metrics(statistics(logits, labels, count=len(labels)))
    options = {"average": "macro", "zero_division": 0}
    every = range(logits.shape[1])
    macro = sklearn.precision_recall_fscore_support(true, predicted, labels=every, **options)
    expected = dict(zip(("precision", "recall", "f1"), macro[:3], strict=True))
    expected |= {"accuracy": sklearn.accuracy_score(true, predicted), "loss": F.cross_entropy(logits, labels).item()}
    expected["f1_present"] = sklearn.f1_score(true, predicted, **options)
    for average in ("micro", "weighted"):
        expected[f"f1_{average}"] = sklearn.f1_score(true, predicted, average=average, zero_division=0)
    expected["mcc"] = sklearn.matthews_corrcoef(true, predicted)
    if logits.shape[1] == 2:
        for name in ("precision", "recall", "f1"):
            function = getattr(sklearn, f"{name}_score")
            expected[f"{name}_positive"] = function(true, predicted, average="binary", zero_division=0)
        scores = logits.double().softmax(-1)[:, 1].numpy()
        expected["roc_auc"] = sklearn.roc_auc_score(true, scores) if len({*true}) == 2 else math.nan
        expected["average_precision"] = sklearn.average_precision_score(true, scores)
    assert found.keys() == expected.keys()
    assert {*TASKS["text-classification"].metrics} - {*found} == ({*POSITIVE_CLASS_METRICS} - {*expected})
    for name, value in expected.items():
        rel = 1e-6 if name == "loss" else 1e-12
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), name


def test_a_declared_class_that_never_occurs_counts_as_zero():
    found = classification_metrics(statistics(predicting([0, 2, 2, 0], 3), torch.tensor([0, 2, 2, 0])))
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx([2 / 3] * 3)
    assert found["accuracy"] == found["f1_present"] == 1


def test_scores_keep_the_confusion_matrix_readable():
    """A plugin calls confusion_matrix(statistics) alone, so the length has to tell two classes with scores apart."""
    for count in range(1, 60):
        labels = torch.arange(count) % 2
        found = statistics(predicting(labels.tolist(), 2), labels, count=count)
        assert confusion_matrix(found).tolist() == [[(count + 1) // 2, 0], [0, count // 2]]


@pytest.mark.parametrize(("logits", "labels"), CASES.values(), ids=CASES.keys())
def test_the_table_of_classes_is_that_of_sklearn(logits, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    true, predicted, classes = labels.numpy(), logits.argmax(-1).numpy(), list(range(logits.shape[-1]))
    confusion = confusion_matrix(statistics(logits, labels))
    expected = torch.from_numpy(sklearn.confusion_matrix(true, predicted, labels=classes)).double()
    torch.testing.assert_close(confusion, expected, rtol=0, atol=0)
    table = precision_recall_f1(*class_counts(statistics(logits, labels)))
    theirs = sklearn.precision_recall_fscore_support(true, predicted, labels=classes, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), theirs[:3], strict=True):
        torch.testing.assert_close(table[name], torch.from_numpy(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(confusion.sum(1), torch.from_numpy(theirs[3]).double(), rtol=0, atol=0)


@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("sizes", [[1] * 137, [64, 64, 9], [0, 130, 0, 7], [136, 1]])
def test_p02_metrics_are_the_same_for_every_split(sizes, num_labels):
    logits, labels = random_case(137, num_labels, 3)
    logits = (logits * 2).round() / 2  # with ties
    labels[::6] = IGNORE_INDEX
    whole, order = statistics(logits, labels, count=137), torch.randperm(137)
    pieces = ((logits[i], labels[i], i.tolist()) for i in order.split(sizes))
    added = torch.stack([statistics(*piece, count=137) for piece in pieces]).sum(0)
    torch.testing.assert_close(added[1:], whole[1:], rtol=0, atol=0)  # counts and scores: exact
    torch.testing.assert_close(added[0], whole[0], rtol=1e-5, atol=0)
    of_sum, of_whole = classification_metrics(added), classification_metrics(whole)
    assert {k: v for k, v in of_sum.items() if k != "loss"} == {k: v for k, v in of_whole.items() if k != "loss"}
    if num_labels == 2:
        sklearn = pytest.importorskip("sklearn.metrics")
        is_target = labels >= 0
        truth, scores = labels[is_target].numpy(), (logits[:, 1] - logits[:, 0])[is_target].numpy()
        assert len({*scores.tolist()}) < 30
        assert of_sum["roc_auc"] == pytest.approx(sklearn.roc_auc_score(truth, scores), rel=1e-12)
        assert of_sum["average_precision"] == pytest.approx(sklearn.average_precision_score(truth, scores), rel=1e-12)


def test_ignored_labels_are_not_counted():
    logits, labels = random_case(60, 3, 4)
    some = labels.clone()
    some[::4] = IGNORE_INDEX
    kept = some != IGNORE_INDEX
    found = statistics(logits, some)
    torch.testing.assert_close(found[1:], statistics(logits[kept], labels[kept])[1:], rtol=0, atol=0)
    assert confusion_matrix(found).sum() == kept.sum()
    expected = F.cross_entropy(logits[kept], labels[kept]).item()
    assert classification_metrics(found)["loss"] == pytest.approx(expected, rel=1e-5)


def test_counts_stay_exact_where_fp32_would_not():
    cell = torch.zeros(5, dtype=torch.float64)
    cell[1] = 2.0**25  # fp32 cannot add 1 to this count
    added = cell + statistics(predicting([0], 2), torch.tensor([0]))
    assert confusion_matrix(added)[0, 0] == 2**25 + 1


def test_rows_are_true_classes_and_columns_predicted_ones():
    confusion = confusion_matrix(statistics(predicting([1, 1, 0], 2), torch.tensor([0, 0, 0])))
    assert confusion.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("num_labels", [3, 5, 26])
@pytest.mark.parametrize("kind", ["classes", "images", "relations"])
def test_counts_of_many_classes_give_the_same_metrics(monkeypatch, kind, num_labels):
    """To the bit, although the confusion matrix is not kept; and over batches as in one."""
    logits, labels = random_case(137, num_labels, 4)
    labels[::6] = -1 if kind == "images" else IGNORE_INDEX
    labels = labels.clamp_min(0) if kind != "classes" else labels
    loss_sum = torch.tensor(12.5)

    def found(rows):
        rows = slice(None) if rows is None else rows
        if kind == "relations":
            return relation_extraction.relation_statistics(loss_sum, logits[rows], labels[rows], no_relation=1)
        function = image_classification.image_statistics if kind == "images" else classification_statistics
        return function(loss_sum, logits[rows], labels[rows])

    metrics = {"classes": classification_metrics, "images": image_classification.image_metrics}
    compute = metrics.get(kind, relation_extraction.relation_metrics)
    expected = compute(found(None))
    monkeypatch.setattr("engine.metrics.text_classification.MAX_MATRIX", 2)
    counts = found(None)
    assert compute(counts) == expected
    assert len(counts) <= 4 * num_labels + 3
    added = found(slice(0, 50)) + found(slice(50, 50)) + found(slice(50, 137))
    without_loss = {name: value for name, value in compute(added).items() if name != "loss"}
    assert without_loss == {name: value for name, value in expected.items() if name != "loss"}


def test_many_classes_have_no_matrix_but_a_table():
    found = classification_statistics(torch.tensor(1.0), predicting([0, 1, 1, 29_999], 30_000), torch.arange(4))
    assert len(found) == 4 * 30_000
    lines = per_class_table(found, [f"class{i}" for i in range(30_000)]).splitlines()
    assert (len(lines), lines[-1]) == (22, "and 29,980 more classes")
    assert lines[2].split() == ["class1", "0.5000", "1.0000", "0.6667", "1"]
    with pytest.raises(TrainingError, match="of 30,000 classes is not kept, only that of up to 1,000; class_counts"):
        confusion_matrix(found)
