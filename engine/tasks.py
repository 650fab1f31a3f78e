"""One row per task: how its rows are read and encoded, which head learns it, how it is measured and predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples, read_rows, split_rows
from data import text as texts
from data.errors import DataError, ErrorList
from engine import metrics
from engine.config import ConfigError, Data, choose_from
from models import Output


@dataclass(frozen=True)
class Task:
    head: str  # a key of models.HEADS
    metrics: tuple[str, ...]  # names; the first is watched unless eval.metric names another
    read: Callable[[str, Data, bool], list[Row]]  # (file, settings, with labels); all that is bad is one DataError
    find_labels: Callable[[str, list[Row], Data], list[str]]
    check_labels: Callable[[str, list[Row], Data, Sequence[str]], None]
    encode: Callable[[list[Row], Tokenizer, Data, Sequence[str], bool], TextExamples]
    statistics: Callable[[Output, Batch], Tensor]  # of one batch: a vector that adds over batches and ranks
    summarize: Callable[[Tensor], dict[str, float]]
    predict: Callable[[Tensor, Sequence[str]], list[dict[str, Any]]]  # logits -> one output row per example


def _read_texts(name: str, settings: Data, labelled: bool) -> list[Row]:
    columns = [settings.text, *([settings.text_pair] if settings.text_pair else [])]
    extra = [settings.label] if labelled else []
    if labelled and name == settings.train and not settings.validation:  # the one file that is split
        extra += [settings.group] if settings.group else []
    errors = ErrorList()
    rows = read_rows(name, columns + extra, settings.id, errors)
    texts.check_rows(name, rows, columns, settings.label if labelled else "", errors)
    errors.raise_if_any()
    return rows


def _find_labels(name: str, rows: list[Row], settings: Data) -> list[str]:
    return texts.label_names(name, rows, settings.label, settings.labels)


def _check_labels(name: str, rows: list[Row], settings: Data, labels: Sequence[str]) -> None:
    texts.check_labels(name, rows, settings.label, labels)


def _encode_texts(
    rows: list[Row], tokenizer: Tokenizer, settings: Data, labels: Sequence[str], labelled: bool
) -> TextExamples:
    return texts.encode_texts(
        rows,
        tokenizer,
        text=settings.text,
        text_pair=settings.text_pair,
        label=settings.label if labelled else "",
        labels=labels,
        max_length=settings.max_length,
    )


def _count_classes(out: Output, batch: Batch) -> Tensor:
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    return metrics.classification_statistics(out.loss_sum, out.logits, batch.labels)


def _predict_classes(logits: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    probabilities = torch.softmax(logits.double(), -1).cpu().numpy()
    best = np.argmax(probabilities, -1)
    return [
        {"label": labels[k], "probabilities": {label: float(x) for label, x in zip(labels, p, strict=True)}}
        for k, p in zip(best, probabilities, strict=True)
    ]


TASKS = {
    "text-classification": Task(
        head="sequence-classification",
        metrics=("accuracy", "precision", "recall", "f1", "loss"),
        read=_read_texts,
        find_labels=_find_labels,
        check_labels=_check_labels,
        encode=_encode_texts,
        statistics=_count_classes,
        summarize=metrics.classification_metrics,
        predict=_predict_classes,
    ),
}


def find_task(name: str, metric: str = "") -> tuple[Task, str]:
    """The task and the metric to watch; ConfigError where a name is unknown."""
    if name not in TASKS:
        raise ConfigError(f"run.task = {name!r}: {choose_from(name, TASKS)}")
    task = TASKS[name]
    if metric and metric not in task.metrics:
        raise ConfigError(f"eval.metric = {metric!r} is no metric of {name}: {choose_from(metric, task.metrics)}")
    return task, metric or task.metrics[0]


def read_training_data(task: Task, settings: Data, seed: int) -> tuple[list[Row], list[Row], list[Row], list[str]]:
    """(training rows, validation rows, test rows, label names), all read and checked before anything is trained.

    Raises DataError with all that is wrong in all files; which labels are unknown can only be said of files without
    another error, since the training file says which are known.
    """
    names = [name for name in (settings.train, settings.validation, settings.test) if name]
    rows = _for_each(names, lambda name: task.read(name, settings, True))
    labels = task.find_labels(settings.train, rows[settings.train], settings)
    _for_each(names, lambda name: task.check_labels(name, rows[name], settings, labels))
    test_rows = rows.get(settings.test, [])
    if settings.validation:
        return rows[settings.train], rows[settings.validation], test_rows, labels
    fraction, group, label = settings.validation_fraction, settings.group, settings.label
    train_rows, held_out = split_rows(rows[settings.train], fraction, seed, group, label)
    return train_rows, held_out, test_rows, labels


def _for_each(names: Sequence[str], function: Callable[[str], Any]) -> dict[str, Any]:
    """{name: function(name)}, each once and in their order; the DataErrors of all of them are raised as one."""
    results, errors = {}, []
    for name in dict.fromkeys(names):
        try:
            results[name] = function(name)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return results
