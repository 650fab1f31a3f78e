"""Metrics of tags: entities against seqeval, classes against scikit-learn."""

from __future__ import annotations

import random

import pytest
import torch
from support.wordpiece import write_vocab

from data import load_tokenizer
from data.row import Row
from data.tag_schemes import find_entities, tag_entities
from data.token_classification import encode_tagged
from engine.metrics.token_classification import NO_TAG, entity_types, tagging_metrics, tagging_statistics, type_table

TYPES = ["PER", "LOC", "ORG-X"]  # a type may have a hyphen
TAGS = {
    "IOB": ["O", *(f"{p}-{t}" for p in "BI" for t in TYPES)],
    "IOBES": ["O", *(f"{p}-{t}" for p in "BIES" for t in TYPES)],
}


def random_sentences(tags: list[str], count: int, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [[rng.choice(tags) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def statistics(true, predicted, labels, *, entities=True, loss=0.0, lost=0):
    words = sum(map(len, true))
    return tagging_statistics(torch.tensor(loss), words, lost, zip(true, predicted, strict=True), labels, entities)


# Entities and their counts, against seqeval


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS.keys())
def test_entities_are_those_of_seqeval(tags):
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    for sentence in random_sentences(tags, 2_000):
        theirs = [(start, end + 1, kind) for kind, start, end in get_entities(sentence)]
        assert find_entities(sentence) == theirs, sentence


def noisy(true: list[list[str]], tags: list[str], rate: float, seed: int = 1) -> list[list[str]]:
    rng = random.Random(seed)
    return [[rng.choice(tags) if rng.random() < rate else tag for tag in sentence] for sentence in true]


O, B, I = "O", "B-PER", "I-PER"  # noqa: E741
CASES = {
    "random": (random_sentences(TAGS["IOB"], 300), random_sentences(TAGS["IOB"], 300)),
    "iobes": (random_sentences(TAGS["IOBES"], 300), noisy(random_sentences(TAGS["IOBES"], 300), TAGS["IOBES"], 0.2)),
    "iob": (random_sentences(TAGS["IOB"], 300, 5), noisy(random_sentences(TAGS["IOB"], 300, 5), TAGS["IOB"], 0.1)),
    "perfect": ([[B, I, O]], [[B, I, O]]),
    "none-predicted": ([[B, I, O]], [[O, O, O]]),
    "none-present": ([[O, O, O]], [[B, I, O]]),
    "none-at-all": ([[O, O]], [[O, O]]),
    "wrong-type": ([[B, I]], [["B-LOC", "I-LOC"]]),
    "too-short": ([[B, I, I]], [[B, I, O]]),
    "too-long": ([[B, I, O]], [[B, I, I]]),
    "split-in-two": ([[B, I, I]], [[B, B, I]]),
    "joined": ([[B, B]], [[B, I]]),
    "begins-with-i": ([[I, I]], [[B, I]]),
    "type-changes-inside": ([[B, "I-LOC", I]], [[B, I, I]]),
    "one-word-sentences": ([[B], [O], [B]], [[B], [B], [O]]),
    "an-end-alone": ([[O, "E-PER", "S-PER"]], [["S-PER", "E-PER", O]]),
}


@pytest.mark.filterwarnings("ignore")  # seqeval warns of undefined scores
@pytest.mark.parametrize(("true", "predicted"), CASES.values(), ids=CASES.keys())
def test_metrics_are_those_of_seqeval(true, predicted):
    seqeval = pytest.importorskip("seqeval.metrics")
    labels = TAGS["IOBES"]
    found = statistics(true, predicted, labels, loss=3.0)
    metrics = tagging_metrics(found, labels)
    assert metrics["precision"] == pytest.approx(seqeval.precision_score(true, predicted, zero_division=0), abs=1e-12)
    assert metrics["recall"] == pytest.approx(seqeval.recall_score(true, predicted, zero_division=0), abs=1e-12)
    assert metrics["f1"] == pytest.approx(seqeval.f1_score(true, predicted, zero_division=0), abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(seqeval.accuracy_score(true, predicted), abs=1e-12)
    assert metrics["loss"] == pytest.approx(3.0 / sum(map(len, true)))


STRICT = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", STRICT)
def test_strict_metrics_are_those_of_seqeval(scheme):
    seqeval, schemes = pytest.importorskip("seqeval.metrics"), pytest.importorskip("seqeval.scheme")
    labels = ["O", *(f"{letter}-{kind}" for letter in STRICT[scheme] for kind in TYPES)]
    entities = [[(0, 1, "PER"), (1, 3, "PER"), (4, 7, kind)] for kind in TYPES * 50]
    true = [tag_entities(spans, 8, scheme) for spans in entities]
    predicted = noisy(true, labels, 0.2)
    words = sum(map(len, true))
    found = tagging_statistics(
        torch.tensor(0.0), words, 0, zip(true, predicted, strict=True), labels, entities=True, scheme=scheme
    )
    metrics = tagging_metrics(found, labels)
    options = {"mode": "strict", "scheme": getattr(schemes, scheme), "zero_division": 0, "average": "micro"}
    for name in ("precision", "recall", "f1"):
        theirs = getattr(seqeval, f"{name}_score")(true, predicted, **options)
        assert 0.2 < metrics[f"{name}_strict"] == pytest.approx(theirs, abs=1e-12)
    assert metrics["f1_strict"] != metrics["f1"]


def test_strict_metrics_know_the_scheme_of_the_labels(tmp_path):
    """IOB1 and IOB2 have the same labels; all words of a data set tell them apart."""
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    for scheme in ("IOB1", "IOB2", "BMES"):
        tags = [tag_entities([(0, 1, "X"), (1, 4, "X")], 4, scheme), ["O"]]
        rows = [Row(str(i), i, {"w": ["the"] * len(row), "t": row}) for i, row in enumerate(tags)]
        labels = sorted({tag for row in tags for tag in row})
        assert encode_tagged(rows, tokenizer, text="w", label="t", labels=labels, max_length=9).record.scheme == scheme


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("true", "predicted"), CASES.values(), ids=CASES.keys())
def test_the_table_of_types_is_that_of_seqeval(true, predicted):
    seqeval = pytest.importorskip("seqeval.metrics")
    report = seqeval.classification_report(true, predicted, output_dict=True, zero_division=0)
    labels = TAGS["IOBES"]
    lines = type_table(statistics(true, predicted, labels), labels).splitlines()[1:]
    assert [line.split()[0] for line in lines] == sorted(TYPES) == entity_types(labels)
    for line in lines:
        name, *values = line.split()
        theirs = report.get(name, dict.fromkeys(("precision", "recall", "f1-score", "support"), 0))
        expected = [f"{theirs[key]:.4f}" for key in ("precision", "recall", "f1-score")]
        assert values == [*expected, str(int(theirs["support"]))]


@pytest.mark.parametrize("classes", [["NN", "VB", "DT"], ["NN", "O", "VB", "DT", "never"]])
def test_plain_tags_are_classes_as_in_sklearn(classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    true = random_sentences(classes[:3], 100)
    predicted = noisy(true, classes[1:4], 0.5)
    metrics = tagging_metrics(statistics(true, predicted, classes, entities=False), classes)
    flat = [[tag for sentence in tags for tag in sentence] for tags in (true, predicted)]
    theirs = sklearn.precision_recall_fscore_support(*flat, average="macro", zero_division=0)
    for name, value in zip(("precision", "recall", "f1"), theirs[:3], strict=True):
        assert metrics[name] == pytest.approx(value, abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(*flat), abs=1e-12)
    table = type_table(statistics(true, predicted, classes, entities=False), classes).splitlines()[1:]
    assert [line.split()[0] for line in table] == classes


@pytest.mark.parametrize("entities", [True, False])
def test_p02_counts_add_over_any_parts(entities):
    labels, (true, predicted) = TAGS["IOB"], CASES["iob"]
    whole = statistics(true, predicted, labels, entities=entities, loss=8.0)
    for size in (1, 7, 299):
        parts = [slice(i, i + size) for i in range(0, 300, size)]
        added = sum(statistics(true[p], predicted[p], labels, entities=entities) for p in parts)
        torch.testing.assert_close(added[1:], whole[1:], rtol=0, atol=0)
    none = statistics([], [], labels, entities=entities)
    assert none.shape == whole.shape
    assert not none.any()


@pytest.mark.parametrize("entities", [True, False])
def test_words_that_were_not_seen_are_wrong(entities):
    true = [["B-PER", "O", "I-PER"]]
    labels = ["B-PER", "I-PER", "O"]
    found = statistics(true, [["B-PER", NO_TAG, NO_TAG]], labels, entities=entities, lost=2)
    metrics = tagging_metrics(found, labels)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["recall"] == pytest.approx(1 / 2 if entities else 1 / 3)
    assert "2 of 3 words count as wrong" in type_table(found, labels)


def test_entities_are_taken_for_classes_where_the_recipe_says_so():
    labels = ["B-PER", "I-PER", "O"]
    true, predicted = [["B-PER", "I-PER", "O"]], [["B-PER", "O", "O"]]
    as_classes = tagging_metrics(statistics(true, predicted, labels, entities=False), labels)
    assert as_classes["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert tagging_metrics(statistics(true, predicted, labels), labels)["f1"] == 0.0
