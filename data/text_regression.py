"""Targets of texts with a number each. The texts are encoded by data/text_classification.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.errors import ErrorList
from data.row import Row


def check_scores(name: str, rows: Sequence[Row], column: str, errors: ErrorList) -> None:
    """Add to `errors` every row whose score is not a number, or text of a number, that is finite in fp32."""
    for row in rows:
        if math.isnan(_parse_score(row.values[column])):
            errors.add(name, row.line, f"a score in {column!r} should be a number, this is {row.values[column]!r}")


def parse_scores(rows: Sequence[Row], column: str) -> np.ndarray:
    """Return the scores, (N, 1) float32. The rows have been checked."""
    return np.array([[_parse_score(row.values[column])] for row in rows], dtype=np.float32).reshape(-1, 1)


def _parse_score(value: Any) -> float:
    """Return the number; NaN for a value that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "_" in str(value):
        return math.nan  # Python would read 1_000 as a number
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= float(np.finfo(np.float32).max) else math.nan
