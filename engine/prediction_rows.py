"""The rows of examples (engine/metrics/by_example.py) from a file that engine.predict wrote, and from what is right.

The file has no losses. Where it has the logits of classes, the loss is computed from them; else it is NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Row
from data.errors import DataError
from data.multi_label_classification import multi_hot
from data.notes import list_some
from data.tag_schemes import are_entity_tags
from engine.config import ConfigError
from engine.metrics import by_example, question_answering, summarization, token_classification, translation
from engine.tasks import Task, TaskSettings

Prediction = dict[str, Any]
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)
NO_MATCH = 3  # ids that an error names


def read_predictions(path: Path) -> list[Prediction]:
    """Return the lines of a .jsonl file of predictions, but empty ones; DataError with the line of one that is none."""
    found: list[Prediction] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may be in a text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a file of predictions: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or "id" not in row:
            raise DataError(
                f'{path}:{number}: {line!r:.80} is no prediction, a JSON object with an "id": name the .jsonl file '
                "that engine.predict --output wrote"
            )
        found.append(row)
    return found


def match(path: Path, predictions: list[Prediction], name: str, rows: Sequence[Row], task: Task) -> list[Prediction]:
    """Return the prediction of each row, by its id, or by its position where both have the same ids in one order.

    Rows that could not be predicted have null and a reason, and are no examples. DataError, with counts, for rows
    without a prediction, and for predictions of other rows.
    """
    made = [row for row in predictions if row.get(task.predicts) is not None or "reason" not in row]
    ids, known = [str(row["id"]) for row in made], [row.id for row in rows]
    if ids == known:
        return made
    by_id = dict(zip(ids, made, strict=True))
    missing = [one for one in known if one not in by_id]
    others = by_id.keys() - set(known)
    if missing or others:
        counts = [
            (missing, f"of {len(known):,} examples have no prediction"),
            (sorted(others), "predictions are of other ids"),
        ]
        parts = [f"{len(found):,} {what} ({_some(found)})" for found, what in counts if found]
        raise DataError(f"{path} does not belong to {name}: {'; '.join(parts)}")
    if len(by_id) < len(ids) or len(set(known)) < len(known):
        raise DataError(
            f"{path} does not belong to {name}: {len(ids) - len(by_id):,} predictions and "
            f"{len(known) - len(set(known)):,} examples repeat an id, and the order is not the same"
        )
    return [by_id[one] for one in known]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:NO_MATCH])) + (", ..." if len(ids) > NO_MATCH else "")


def labels_of(predictions: Sequence[Prediction]) -> list[str]:
    """Return the classes in the order of the model that predicted them; [] where the file does not say it."""
    found = (row["probabilities"] for row in predictions if isinstance(row.get("probabilities"), dict))
    return [str(label) for label in next(found, ())]


def prediction_rows(
    task: Task,
    predictions: list[Prediction],
    rows: list[Row],
    labels: Sequence[str],
    settings: TaskSettings,
    path: Path,
) -> Tensor:
    """Return the row of each example, (N, K) fp64, in the order of `rows`, the checked rows of the labelled file.

    Raises ConfigError for a task whose predictions cannot be compared with a file, DataError for a prediction that is
    none of the task.
    """
    column = settings.data.label_column
    if task.predicts not in KINDS or not column or task.evaluate_examples is None:
        raise ConfigError(f"{path}: predictions of this task cannot be compared with a file; name the two runs")
    truths = [row.values[column] for row in rows]
    read = KINDS[task.predicts]
    try:
        return read(task, predictions, truths, labels, settings)
    except UNREADABLE as error:
        problem = f"{type(error).__name__}: {error}"
    for row, truth in zip(predictions, truths, strict=True):  # which one it is
        try:
            read(task, [row], [truth], labels, settings)
        except UNREADABLE as error:
            problem = f"the prediction with id {row['id']!r} {_explain(task, row, labels, error)}"
            break
    raise DataError(f"{path} does not have predictions of this task: {problem}")


def _explain(task: Task, row: Prediction, labels: Sequence[str], error: Exception) -> str:
    """Return a phrase on why a prediction cannot be read."""
    if row.get(task.predicts) is None:
        return f"has no {task.predicts!r}"
    if KINDS[task.predicts] is _classes and row[task.predicts] not in labels:
        return f"has the {task.predicts} {row[task.predicts]!r:.80}, and the classes are {list_some(labels)}"
    return f"cannot be read: {type(error).__name__}: {error}"


def _logits(predictions: Sequence[Prediction], labels: Sequence[str]) -> Tensor | None:
    """Return (N, C) in the order of `labels`; None where a prediction has none."""
    if not all(isinstance(row.get("logits"), dict) for row in predictions):
        return None
    return torch.tensor([[row["logits"][label] for label in labels] for row in predictions], dtype=torch.float64)


def _classes(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    number = {label: i for i, label in enumerate(labels)}
    true, chosen = (
        torch.tensor([number[str(label)] for label in values])
        for values in (truths, [row[task.predicts] for row in predictions])
    )
    logits = _logits(predictions, labels)
    known = logits is not None
    if logits is None:
        logits = torch.nn.functional.one_hot(chosen, len(labels)).double()
    if task.predicts == "relation":
        no_relation = settings.own.no_relation_label
        rows = by_example.relation_rows(logits, true, number.get(no_relation))
        rows[:, by_example.CLASS_COLUMNS.index("predicted")] = chosen.double()
    else:
        rows = by_example.class_rows(logits, true, chosen)
    if not known:  # and so no ranking
        rows[:, [0, by_example.CLASS_COLUMNS.index("log_odds")]] = math.nan
    return rows


def _label_sets(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    column = settings.data.label_column
    true, chosen = (
        torch.from_numpy(multi_hot([Row("", 0, {column: names}) for names in values], column, labels))
        for values in (truths, [row["labels"] for row in predictions])
    )
    logits = _logits(predictions, labels)
    scores = torch.full_like(chosen, math.nan) if logits is None else logits  # no ranking without logits
    return by_example.label_set_rows(scores, true, chosen > 0)


def _numbers(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    pairs = [(float(row["score"]), float(truth)) for row, truth in zip(predictions, truths, strict=True)]
    return torch.tensor(pairs, dtype=torch.float64).view(-1, 2)


def _choices(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    right = [float(row["choice"] == int(truth)) for row, truth in zip(predictions, truths, strict=True)]
    return torch.tensor([(math.nan, value, 1.0) for value in right], dtype=torch.float64).view(-1, 3)


def _tags(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    entities = settings.own.tag_scheme != "none" and are_entity_tags(labels)
    scheme = settings.own.tag_scheme if settings.own.tag_scheme not in ("auto", "none") else "IOB2"
    rows = []
    for row, true in zip(predictions, truths, strict=True):
        tags = [token_classification.NO_TAG if tag is None else str(tag) for tag in row["tags"]]
        unseen = tags.count(token_classification.NO_TAG)
        loss = torch.tensor(math.nan)
        rows.append(token_classification.tagging_statistics(loss, 1, unseen, [(true, tags)], labels, entities, scheme))
    return torch.stack(rows)


def _texts(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    pairs = [(str(row["text"]), str(truth)) for row, truth in zip(predictions, truths, strict=True)]
    if "bleu" in task.metrics:
        tokenizer = settings.bleu_tokenizer
        tokenizer = translation.choose_tokenizer([truth for _, truth in pairs]) if tokenizer == "auto" else tokenizer
        names = [int(name == tokenizer) for name in translation.TOKENIZERS]
        counts = [[*names, *translation.translation_statistics([text], [truth], tokenizer)] for text, truth in pairs]
        return torch.tensor([[math.nan, 1, *row] for row in counts], dtype=torch.float64)
    if "rougeL" not in task.metrics:
        raise ConfigError("texts of this task have no metric of their own; name the two runs")
    sums = [summarization.summary_statistics([text], [truth]) for text, truth in pairs]
    return torch.tensor([[math.nan, 1, *row] for row in sums], dtype=torch.float64)


def _answers(
    task: Task, predictions: list[Prediction], truths: list[Any], labels: Sequence[str], settings: TaskSettings
) -> Tensor:
    rows = []
    for row, answers in zip(predictions, truths, strict=True):
        given, margin = str(row["answer"]), row.get("no_answer_margin")
        # The best span, even where no answer was given: best_f1 asks what another threshold would give.
        spans = row.get("n_best") or [{"answer": given}]
        threshold = settings.own.no_answer_threshold
        known = margin if isinstance(margin, int | float) else (0.0 if given else math.inf)
        gold = [answer.text for answer in answers]
        statistics = question_answering.answer_statistics(str(spans[0]["answer"]), gold, float(known), threshold)
        statistics[question_answering.COLUMNS.index("answered")] = float(bool(given))
        rows.append(torch.cat([torch.tensor([math.nan, 1.0], dtype=torch.float64), statistics]))
    return torch.stack(rows)


# {Task.predicts: the function of its predictions}
KINDS = {
    "label": _classes,
    "relation": _classes,
    "labels": _label_sets,
    "score": _numbers,
    "choice": _choices,
    "tags": _tags,
    "text": _texts,
    "answer": _answers,
}
