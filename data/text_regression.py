"""Targets of texts with a number each. The texts are encoded by data/text_classification.py."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from data.errors import ErrorList
from data.label_spelling import label_name
from data.label_warnings import MISSING
from data.row import Row

LARGEST = float(np.finfo(np.float32).max)
# Groups of thousands with a space or an apostrophe between them, which can mean nothing else.
_SPACED = re.compile(r"([+-]?[0-9]{1,3})((?:[\s'\u2019][0-9]{3})+)([.,][0-9]+)?")
# Numbers with a comma or point, by what it is: the first pattern that fits is right. 1,500 may be 1.5 or 1500; so may
# 1.500 in a file with decimal commas.
SEPARATED = {
    "either": re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}"),
    "point": re.compile(r"[+-]?[1-9][0-9]{0,2}\.[0-9]{3}"),
    "decimal": re.compile(r"[+-]?(?:[0-9]{1,3}(?:\.[0-9]{3})+|[0-9]*),[0-9]+"),
    "thousands": re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?"),
}


def read_scores(name: str, rows: Sequence[Row], column: str, errors: ErrorList) -> None:
    """Make the score of each row a number; add the rows whose score is none, or not finite in fp32, to `errors`.

    A number as text may have a decimal comma, or separators between thousands. 1,500 is read only where the other
    numbers of the file show what its comma is.
    """
    by_kind: dict[str, list[Row]] = {kind: [] for kind in (*SEPARATED, "spaced")}
    for row in rows:
        value = row.values[column]
        text = _clean(value) if isinstance(value, str) else ""
        if spaced := _SPACED.fullmatch(text):
            by_kind["spaced"].append(row)
            text = spaced[1] + re.sub(r"\D", "", spaced[2]) + (spaced[3] or "")
        if kind := _separator_kind(text):
            by_kind["decimal" if spaced and kind == "either" else kind].append(row)
            row.values[column] = text
            continue
        row.values[column] = parse_score(text or value)
        if math.isnan(row.values[column]):
            errors.add(name, row.line, f"a score in {column!r} should be a number, not {value!r}{_hint(value)}")
    _read_separated(name, by_kind, column, errors)


def _separator_kind(text: str) -> str:
    """Return the key of SEPARATED whose pattern a number as text has; "" for other texts."""
    if "," not in text and text[-4:-3] != ".":
        return ""
    return next((kind for kind, pattern in SEPARATED.items() if pattern.fullmatch(text)), "")


def _read_separated(name: str, by_kind: dict[str, list[Row]], column: str, errors: ErrorList) -> None:
    """Make texts with a comma or point numbers, and note them; those that may mean two numbers are errors."""
    decimal, thousands, unclear, points = (by_kind[kind] for kind in ("decimal", "thousands", "either", "point"))
    if bool(decimal) != bool(thousands):
        (decimal or thousands).extend(unclear)
        unclear = []
    if decimal:
        unclear, points = unclear + points, []
    for row in unclear:
        reason = "its comma or point may be decimal or stand between thousands; write the number without separators"
        errors.add(name, row.line, f"the score {row.values[column]!r} in {column!r} is unclear: {reason}")
    for rows, what in (
        (decimal, "a decimal comma"),
        (thousands, "commas between thousands"),
        (by_kind["spaced"], "spaces or apostrophes between thousands"),
    ):
        if rows:
            first = min(row.line for row in rows)
            errors.notes.append(f"{column!r} has {len(rows):,} numbers with {what}, first in line {first}")
    for rows, removed in ((decimal, "."), (thousands, ","), (points, ",")):
        for row in rows:
            row.values[column] = parse_score(row.values[column].replace(removed, "").replace(",", "."))


def parse_scores(rows: Sequence[Row], column: str) -> np.ndarray:
    """Return the scores, (N, 1) float32. The rows have been checked."""
    return np.array([[row.values[column]] for row in rows], dtype=np.float32).reshape(-1, 1)


def parse_score(value: Any) -> float:
    """Return the number that Python reads; NaN for a value that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal) or "_" in str(value):
        return math.nan  # Python would read 1_000 as a number
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= LARGEST else math.nan


def _clean(text: str) -> str:
    """Return a text without quotes around it, and with the minus sign of a keyboard."""
    return label_name(text).strip("\"'").replace("\u2212", "-")


def _hint(value: Any) -> str:
    """Return what would work instead of a value that is not a score, or ""."""
    if isinstance(value, bool):
        return '; run.task = "text-classification" learns true and false'
    text = value.strip().lower() if isinstance(value, str) else "x"
    if not text or text in MISSING:
        return "; the score is missing"
    if re.fullmatch(r"[0-9.,\s]+(%|/[0-9.,\s]+)", text):
        return "; write the number alone, without % or /"
    return ""
