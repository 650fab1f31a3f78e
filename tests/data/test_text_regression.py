"""A number to a text: what is one, and what is refused."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest

from data import Row
from data import text_regression as targets
from data.errors import ErrorList


def rows_with(column: str, values: list[object]) -> list[Row]:
    return [Row(str(i), i, {"text": "x", column: value}) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize("value", [0, -1, 2.5, "0", "-1", "2.5", " 1e3 ", "+4", ".5", 10**30, Decimal("1.5")])
def test_scores_are_numbers_or_text_that_is_one(value):
    errors, rows = ErrorList(), rows_with("score", [value])
    targets.read_scores("FILE", rows, "score", errors)
    assert (errors.found, errors.notes) == ([], [])
    assert targets.parse_scores(rows, "score").tolist() == [[np.float32(float(value))]]


BAD_SCORES = [
    "x",
    "1,5,",
    "1_000",
    "inf",
    math.nan,
    math.inf,
    None,
    [1],
    {"a": 1},
    1e39,
    10**400,
    "1e39",
]


def test_f13_bad_scores_are_reported_together():
    errors = ErrorList()
    targets.read_scores("FILE", rows_with("score", [1, *BAD_SCORES]), "score", errors)
    assert [text for _, text in errors.found] == [
        f"FILE:{line}: a score in 'score' should be a number, not {value!r}" for line, value in enumerate(BAD_SCORES, 2)
    ]
