"""The logits of a teacher for distillation, as engine.predict writes them for the training file."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError, ErrorList
from data.formats.options import FileOptions
from data.formats.rows import read_rows
from data.labels import match_labels

LARGEST = torch.finfo(torch.float32).max


def read_teacher(name: str, ids: Sequence[str], labels: Sequence[str]) -> Tensor:
    """Return (N, C) fp32: the logits of each example of `ids` for each of `labels`, both in their order.

    name: a .jsonl file with "id" and "logits" on each line: {label: number}, or numbers in the order of the labels.
    It may have further ids, such as those of validation examples. A line with a "reason" and no logits, which
    engine.predict writes for a row that it left out, counts as absent.
    Raises one DataError for all bad lines, and for missing ids.
    """
    position = {example: i for i, example in enumerate(ids)}
    known = dict.fromkeys(labels)
    logits_of = torch.empty(len(ids), len(labels))
    errors, lines = ErrorList(), dict[str, int]()
    for row in read_rows(name, ["id"], FileOptions(format="jsonl", id_column=""), errors):
        value = row.values["id"]
        if "logits" not in row.values and "reason" in row.values:
            continue
        example = str(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            errors.add(name, row.line, f"an 'id' should be text or a number, not {value!r}")
        elif example in lines:
            errors.add(name, row.line, f"the id {example!r} is that of line {lines[example]} too")
        else:
            lines[example] = row.line
            try:
                logits = _logits(row.values, known)
            except DataError as error:
                errors.add(name, row.line, str(error))
            else:
                if example in position:
                    logits_of[position[example]] = torch.tensor(logits)
    errors.raise_if_any()
    if missing := [example for example in ids if example not in lines]:
        raise DataError(
            f"{name}: no logits for {len(missing):,} of the {len(ids):,} training examples, the first with the id "
            f"{missing[0]!r}; let the teacher predict the file of data.train"
        )
    return logits_of


def _logits(values: dict[str, Any], labels: Mapping[str, None]) -> list[float]:
    """Return one number for each label, in their order, of a row; DataError with the reason alone."""
    value = values.get("logits")
    if isinstance(value, list):
        if len(value) != len(labels):
            raise DataError(f"{len(value)} logits for {_quoted(labels)}")
        value = dict(zip(labels, value, strict=True))
    if value is None:
        raise DataError(f"no column 'logits'; this row has {', '.join(map(repr, values))}")
    if not isinstance(value, dict):
        raise DataError(f"'logits' should be {{label: number}}, or a list of numbers, not {reprlib.repr(value)}")
    if any(label not in labels for label in value):  # another spelling, as 1.0 for 1
        matched = match_labels(value, list(labels))
        if len(set(matched.values())) == len(value):
            value = {matched[label]: number for label, number in value.items()}
    if unknown := [label for label in value if label not in labels]:
        raise DataError(f"a logit of the unknown label {unknown[0]!r}, beside {_quoted(labels)}")
    if missing := [label for label in labels if label not in value]:
        raise DataError(f"no logit of the label {missing[0]!r}")
    for label, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
            raise DataError(f"the logit of {label!r} should be a finite number, not {number!r}")
    return [float(value[label]) for label in labels]


def _quoted(labels: Mapping[str, None]) -> str:
    return f"the {len(labels)} labels {', '.join(map(repr, labels))}"
