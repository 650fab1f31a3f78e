"""Several labels to a text: how files write them, their names, and the targets."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data import DataError, Row, Rows
from data import multi_label_classification as label_sets
from data.errors import ErrorList
from data.examples import TextExamples


def rows_with(values: list[object]) -> Rows:
    return Rows(Row(str(i), i, {"text": "x", "labels": value}) for i, value in enumerate(values, 1))


def read(values: list[object], separator: str = "") -> tuple[Rows, ErrorList]:
    rows, errors = rows_with(values), ErrorList()
    label_sets.read_label_sets("FILE", rows, "labels", errors, separator)
    return rows, errors


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
        ({"a": 1, "b": 0, "c": True}, ["a", "c"]),
    ],
)
def test_labels_are_a_list_or_text_with_separators(value, names):
    rows, errors = read([value])
    assert (rows[0].values["labels"], errors.found, errors.notes) == (names, [], [])


def test_f13_bad_label_sets_are_reported_together():
    values = [["a"], {"a": 2}, ["a", ["b"]], "['a', b", [None], [math.nan], {}]
    _, errors = read(values)
    assert [text for _, text in errors.found] == [
        "FILE:2: labels should be a list, or text with separators between them, not {'a': 2}",
        "FILE:3: a label should be text or a number, not ['b']",
        "FILE:4: this begins like a list, and cannot be read as one: \"['a', b\"",
        "FILE:5: a label should be text or a number, not None",
        "FILE:6: a label should be text or a number, not nan",
        "FILE:7: labels should be a list, or text with separators between them, not {}",
    ]


def test_f13_unknown_labels_of_a_set_are_reported_together():
    rows, _ = read([["a", "x"], "b", "y;a;z"])
    with pytest.raises(DataError) as caught:
        label_sets.check_label_set_names("FILE", rows, "labels", ["a", "b"])
    assert str(caught.value).split("\n") == [
        f"FILE:{line}: unknown label {label!r}; the labels are 'a', 'b'"
        for line, label in [(1, "x"), (3, "y"), (3, "z")]
    ]


def test_p09_label_set_names_do_not_depend_on_the_order_of_rows():
    values: list[object] = [["b", "a"], "10;9", [], "c"]
    for _ in range(5):
        random.Random(0).shuffle(values)
        rows, _ = read(values)
        assert label_sets.find_label_set_names("FILE", rows, "labels", ()) == ["10", "9", "a", "b", "c"]
        assert label_sets.find_label_set_names("FILE", rows, "labels", ("c", "z")) == ["c", "z"]
    assert label_sets.find_label_set_names("FILE", read(["10,9", "2"])[0], "labels", ()) == ["2", "9", "10"]
    with pytest.raises(DataError, match="FILE: no row has a label in 'labels'"):
        label_sets.find_label_set_names("FILE", read([[], ""])[0], "labels", ())


def test_label_sets_become_rows_of_zeros_and_ones():
    found = label_sets.multi_hot(read(["c,a", [], ["b"]])[0], "labels", ["a", "b", "c"])
    assert found.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert found.dtype == np.float32
    assert label_sets.multi_hot([], "labels", ["a", "b"]).shape == (0, 2)


@pytest.mark.parametrize(("labels", "shown"), [(["c", "a"], "id 1  a, c"), ([], "id 1  no label")])
def test_the_first_examples_show_the_names_of_labels(labels, shown):
    targets = label_sets.multi_hot(read([labels, ["b"]])[0], "labels", ["a", "b", "c"])
    tokens, offsets = np.zeros(2, dtype=np.int32), np.arange(3)
    examples = TextExamples(tokens, tokens.astype(np.uint8), offsets, targets, ["1", "2"], 0)
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, "x"))
    assert examples.show(0, tokenizer, ("a", "b", "c"))[0] == shown
