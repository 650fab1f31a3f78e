"""Several labels to a text: how files write them, their names, and the targets."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from data import DataError, Row
from data import multi_label_classification as label_sets
from data.errors import ErrorList


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
    assert label_sets.parse_label_set(value) == names


def rows_with(column: str, values: list[object]) -> list[Row]:
    return [Row(str(i), i, {"text": "x", column: value}) for i, value in enumerate(values, 1)]


def test_f13_bad_label_sets_are_reported_together():
    values = [["a"], {"a": 1}, ["a", ["b"]], "a,,b", "a,", ["a", ""], ["a", "a "], [None], [math.nan]]
    errors = ErrorList()
    label_sets.check_label_sets("FILE", rows_with("labels", values), "labels", errors)
    assert [text for _, text in errors.found] == [
        "FILE:2: labels should be a list, or text with commas or semicolons between them, this is {'a': 1}",
        "FILE:3: a label should be text or a number, this is ['b']",
        "FILE:4: ['a', '', 'b'] has an empty label",
        "FILE:5: ['a', ''] has an empty label",
        "FILE:6: ['a', ''] has an empty label",
        "FILE:7: the label 'a' occurs twice",
        "FILE:8: a label should be text or a number, this is None",
        "FILE:9: a label should be text or a number, this is nan",
    ]


def test_f13_unknown_labels_of_a_set_are_reported_together():
    rows = rows_with("labels", [["a", "x"], "b", "y;a;z"])
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
        rows = rows_with("labels", values)
        assert label_sets.find_label_set_names("FILE", rows, "labels", ()) == ["10", "9", "a", "b", "c"]
        assert label_sets.find_label_set_names("FILE", rows, "labels", ("c", "z")) == ["c", "z"]
    assert label_sets.find_label_set_names("FILE", rows_with("labels", ["10,9", "2"]), "labels", ()) == ["2", "9", "10"]
    with pytest.raises(DataError, match="FILE: no row has a label in 'labels'"):
        label_sets.find_label_set_names("FILE", rows_with("labels", [[], ""]), "labels", ())


def test_label_sets_become_rows_of_zeros_and_ones():
    found = label_sets.multi_hot(rows_with("labels", ["c,a", [], ["b"]]), "labels", ["a", "b", "c"])
    assert found.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert found.dtype == np.float32
    assert label_sets.multi_hot([], "labels", ["a", "b"]).shape == (0, 2)
