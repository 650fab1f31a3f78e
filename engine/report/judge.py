"""The comparison of predictions with what is right: both as text, and how wrong each prediction is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Row
from data.batch import IGNORE_INDEX
from data.formats.choices import CHOICES
from data.multi_label_classification import multi_hot
from data.notes import count_of
from data.tag_notation import STANDARD, find_notation
from data.tag_schemes import find_entities
from data.words import TEXT, locate_words
from engine.tasks import Task, TaskSettings

Prediction = dict[str, Any]
Pair = tuple[str, str]  # (true, predicted)
UNREAD, NO_TEXT = "(not read)", "(no text)"


@dataclass(frozen=True)
class Judged:
    """All examples that were predicted.

    measure: what `errors` are, in words; higher is worse. is_wrong: [] for what is never right, such as a loss.
    confidence: the probability of each prediction; NaN: not known. pairs: (prediction, truth) of numbers.
    """

    measure: str
    true: Sequence[str]
    predicted: Sequence[str]
    errors: Sequence[float]
    confidence: Sequence[float]
    is_wrong: Sequence[bool] = ()
    pairs: Sequence[tuple[float, float]] = ()

    def describe(self, i: int) -> str:
        """Return how wrong an example is."""
        return f"{self.measure} {self.errors[i]:.4g}" if math.isfinite(self.errors[i]) else ""

    def worst(self, count: int) -> list[int]:
        """Return the examples with the highest errors, without those that are right."""
        order = sorted(range(len(self.errors)), key=lambda i: -_or_lowest(self.errors[i]))
        return [i for i in order if not self.is_wrong or self.is_wrong[i]][:count]

    def most_confident(self, count: int) -> list[int]:
        """Return the wrong examples with the highest confidence; [] where no confidence is known."""
        wrong = [i for i, is_wrong in enumerate(self.is_wrong) if is_wrong and not math.isnan(self.confidence[i])]
        return sorted(wrong, key=lambda i: -self.confidence[i])[:count]


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def judge(
    task: Task,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    numbers: Tensor | None,
    settings: TaskSettings,
    labels: Sequence[str],
) -> Judged:
    """Compare each prediction with its row.

    numbers: the row of statistics of each example. labels: of the model.
    """
    truths = [row.values[settings.data.label_column] for row in rows]
    if task.predicts in ("label", "relation"):
        return _judge_classes(predictions, truths, task.predicts, numbers)
    if task.predicts == "labels":
        return _judge_label_sets(predictions, truths, numbers)
    if task.predicts == "score":
        return _judge_scores(predictions, truths)
    if task.predicts == "choice":
        return _judge_choices(rows, predictions, truths)
    if task.predicts == "tags":
        return _judge_tags(rows, predictions, settings, labels)
    return _judge_texts(task, predictions, truths, numbers, labels)


def judge_losses(task: Task, numbers: Tensor, labels: Sequence[str]) -> Judged:
    """Return the loss of each example, for a task whose predictions are not right or wrong."""
    errors = _metric_of_each(task, numbers, labels, "loss")
    return Judged("loss", [""] * len(errors), [""] * len(errors), errors, [math.nan] * len(errors))


def _metric_of_each(task: Task, numbers: Tensor, labels: Sequence[str], metric: str) -> list[float]:
    found = (task.compute_metrics(task.collect(row[None], labels), labels) for row in numbers)
    return [float(values.get(metric, math.nan)) for values in found]


def class_targets(rows: Sequence[Row], column: str, labels: Sequence[str], problem: str) -> Tensor:
    """Return the class of each row, (N,), or with several labels (N, C) of 0 and 1."""
    if problem == "multi-label":
        return torch.from_numpy(multi_hot([*rows], column, labels))
    number = {label: i for i, label in enumerate(labels)}
    return torch.tensor([number.get(str(row.values[column]), IGNORE_INDEX) for row in rows])


def _judge_classes(predictions: Sequence[Prediction], truths: list[Any], key: str, numbers: Tensor | None) -> Judged:
    true, predicted = [str(value) for value in truths], [str(row[key]) for row in predictions]
    confidence = [float(row["probabilities"][name]) for row, name in zip(predictions, predicted, strict=True)]
    errors = [math.nan] * len(true) if numbers is None else numbers[:, 0].tolist()
    wrong = [one != other for one, other in zip(true, predicted, strict=True)]
    return Judged("loss", true, predicted, errors, confidence, wrong)


def _judge_label_sets(predictions: Sequence[Prediction], truths: list[Any], numbers: Tensor | None) -> Judged:
    """Compare sets of labels; the confidence is that of the wrong decision that was made most confidently."""
    sets = [(set(map(str, truth)), set(row["labels"])) for truth, row in zip(truths, predictions, strict=True)]
    confidence = []
    for (true, found), row in zip(sets, predictions, strict=True):
        p = row["probabilities"]
        confidence.append(max([p[x] if x in found else 1 - p[x] for x in true ^ found if x in p], default=math.nan))
    texts = [[", ".join(sorted(one)) or "no label" for one in pair] for pair in sets]
    errors = [math.nan] * len(sets) if numbers is None else numbers[:, 0].tolist()
    wrong = [true != found for true, found in sets]
    return Judged("loss", [pair[0] for pair in texts], [pair[1] for pair in texts], errors, confidence, wrong)


def _judge_scores(predictions: Sequence[Prediction], truths: list[Any]) -> Judged:
    pairs = [(float(row["score"]), float(truth)) for row, truth in zip(predictions, truths, strict=True)]
    texts = [[f"{value:.4g}" for value in pair] for pair in pairs]
    errors = [abs(score - truth) for score, truth in pairs]
    true, predicted = [pair[1] for pair in texts], [pair[0] for pair in texts]
    return Judged("distance", true, predicted, errors, [math.nan] * len(pairs), pairs=pairs)


def _judge_choices(rows: Sequence[Row], predictions: Sequence[Prediction], truths: list[Any]) -> Judged:
    right = [int(truth) for truth in truths]
    chosen = [int(row["choice"]) for row in predictions]
    p = [row["probabilities"] for row in predictions]
    errors = [-math.log(max(one[k], 1e-300)) for one, k in zip(p, right, strict=True)]
    confidence = [one[k] for one, k in zip(p, chosen, strict=True)]
    choices = [row.values[CHOICES] for row in rows]
    true, predicted = ([str(own[k]) for own, k in zip(choices, numbers, strict=True)] for numbers in (right, chosen))
    wrong = [one != other for one, other in zip(right, chosen, strict=True)]
    return Judged("loss", true, predicted, errors, confidence, wrong)


def _judge_tags(
    rows: Sequence[Row], predictions: Sequence[Prediction], settings: TaskSettings, labels: Sequence[str]
) -> Judged:
    """Count the wrong words; of spans in a text the entities that only one of both has."""
    true, predicted, errors, confidence = list[str](), list[str](), list[float](), list[float]()
    notation = find_notation(labels) or STANDARD
    for row, prediction in zip(rows, predictions, strict=True):
        tags: list[str] = row.values[settings.data.label_column]
        if "tags" in prediction:
            pairs = zip(tags, prediction["tags"], prediction["probabilities"], strict=True)
            own = [p for right, tag, p in pairs if tag != right]
            errors.append(len(own))
        else:
            words = row.values[settings.data.text_column]
            places = locate_words(words) if TEXT in row.values else []
            spans = {(places[a][0], places[b - 1][1], kind) for a, b, kind in find_entities(tags, notation)}
            found = {(one["start"], one["end"], one["label"]): one["probability"] for one in prediction["spans"]}
            own = [p for span, p in found.items() if span not in spans]
            errors.append(len(spans ^ found.keys()))
        confidence.append(float(np.max(own)) if own else math.nan)
        marked = prediction.get("entities", prediction.get("spans"))
        entities = None if marked is None else len(find_entities(tags, notation))
        true.append("" if entities is None else count_of(entities, "span"))
        predicted.append("" if marked is None else count_of(len(marked), "span"))
    unit = "wrong words" if all("tags" in row for row in predictions) else "wrong spans"
    return Judged(unit, true, predicted, errors, confidence, [error > 0 for error in errors])


def word_confusions(
    rows: Sequence[Row], predictions: Sequence[Prediction], settings: TaskSettings, labels: Sequence[str]
) -> tuple[dict[str, Any], list[list[Pair]]]:
    """Return the confusion matrix of words by the type of their entity, or by their tag, and the pairs of each example.

    UNREAD is predicted for a word that the model did not see.
    """
    notation = find_notation(labels) if settings.own.tag_scheme != "none" else None
    kinds = {tag: tag if notation is None else notation.split(tag)[1] or "O" for tag in labels}
    pairs = []
    for row, prediction in zip(rows, predictions, strict=True):
        words = zip(row.values[settings.data.label_column], prediction["tags"], strict=True)
        pairs.append([(kinds.get(true, true), UNREAD if found is None else kinds[found]) for true, found in words])
    counts = Counter(pair for own in pairs for pair in own)
    names = [*dict.fromkeys([*sorted(kinds.values()), *(name for pair in counts for name in pair)])]
    matrix = [[counts[true, predicted] for predicted in names] for true in names]
    return {"labels": names, "counts": matrix, "unit": "words"}, pairs


def _judge_texts(
    task: Task, predictions: Sequence[Prediction], truths: list[Any], numbers: Tensor | None, labels: Sequence[str]
) -> Judged:
    """Compare answers, or texts that were written, by the metric that the task watches first."""
    metric = "f1" if task.predicts == "answer" else task.metrics[0]
    values = [math.nan] * len(truths) if numbers is None else _metric_of_each(task, numbers, labels, metric)
    if task.predicts == "answer":
        true = [" | ".join(dict.fromkeys(answer.text for answer in answers)) or "no answer" for answers in truths]
        predicted = [str(row["answer"]) or "no answer" for row in predictions]
        confidence = [float(row["probability"]) for row in predictions]
    else:
        true, predicted = [str(truth) for truth in truths], [str(row["text"]) or NO_TEXT for row in predictions]
        confidence = [math.nan] * len(truths)
    highest = 1.0 if all(math.isnan(value) or value <= 1 for value in values) else 100.0
    errors = [highest - value for value in values]
    wrong = [error > 0 for error in errors] if task.predicts == "answer" else ()  # of a text there are many right ones
    return Judged(f"{highest:g} - {metric}", true, predicted, errors, confidence, wrong)
