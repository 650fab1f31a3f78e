"""What the best weights of a run predict for its validation rows: metrics, tables, calibration, mistakes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Row, Rows, sample_rows
from data.errors import DataError
from data.lengths import all_lengths
from engine import checkpoint, cli, validate
from engine.calibration import describe_calibration, probabilities, problem_of, read_calibration, reliability_bins
from engine.config import ConfigError
from engine.evaluate import evaluate_in_full, example_rows, load_trained, make_context, predict, start
from engine.prediction_rows import KINDS, prediction_rows
from engine.report.judge import Judged, Pair, class_targets, judge, judge_losses, word_confusions
from engine.report.shown import Part, Shown, crop, parts_of, thumbnail
from engine.tasks import Task, TaskSettings, check_labels, read_file, read_training_data

MORE = ("data.train", "data.validation")  # settings that are read beside those of engine.evaluate
MOST_EXAMPLES, MOST_TEXTS = 5_000, 100  # that are predicted; a text that is written takes much longer than a class
MOST_SHOWN = 12  # of the worst, and of the most confident mistakes
MOST_CELLS, OF_A_CELL = 60, 4  # of the confusion matrix, with examples
NUM_THRESHOLDS = 100


@dataclass(frozen=True)
class Findings:
    """What was found. Members are empty where the task has no such thing.

    source: the file of the rows. weights: the folder of the checkpoint.
    count, total: examples that were predicted, and those of the file.
    tables: per_class and confusion_matrix, and calibration, as engine.evaluate --output writes them.
    thresholds: (threshold, {"precision", "recall", "F1"}) of what thresholds_of says, in words.
    applied: the threshold of config.json, or one half; NaN where each label has its own.
    lengths: of each example in tokens. is_wrong: of each example. pairs: (prediction, truth) of numbers.
    worst, confident: mistakes. cells: {(true, predicted): examples}.
    """

    source: str
    weights: str
    count: int
    total: int
    metrics: Mapping[str, float]
    tables: Mapping[str, Any]
    notes: Sequence[str]
    lengths: Sequence[int]
    is_wrong: Sequence[bool]
    worst: Sequence[Shown]
    measure: str  # by which the worst are found
    thresholds: Sequence[tuple[float, Mapping[str, float]]] = ()
    applied: float = math.nan
    thresholds_of: str = ""
    pairs: Sequence[tuple[float, float]] = ()
    confident: Sequence[Shown] = ()
    cells: Mapping[tuple[str, str], Sequence[Shown]] = field(default_factory=dict)


def examine(name: str, given: Mapping[str, str], most: int | None) -> Findings:
    """Predict the validation rows of a run with its best weights.

    given: settings for this use, as engine.evaluate takes them; data.validation names another file. most: examples at
    most, drawn with the seed of the run; None: MOST_EXAMPLES, or MOST_TEXTS where texts are written.
    Raises ConfigError, DataError or ModelError where the rows or the weights are not to be had.
    """
    folder = checkpoint.open_run(name)
    config, task, settings, ranks = start(cli.configure(folder, given, MORE))
    if ranks.world_size > 1:
        raise ConfigError("the report predicts in one process: python -m engine.report")
    model, processor = load_trained(folder, config, task)
    rows, source = _validation_rows(task, settings, config.run.seed, model.labels)
    limit = most or (MOST_TEXTS if task.generates else MOST_EXAMPLES)
    used = sample_rows(rows, limit, config.run.seed)[:limit] if len(rows) > limit else list(rows)
    examples = task.encoder(processor, settings, model.labels)(used, True)
    validate.check_encoded(config, model, examples)
    context = make_context(model, config, task, ranks)
    context.confidence = 0.0
    predictions, numbers = list[dict[str, Any]](), None
    if task.predicts in KINDS and settings.data.label_column and "perplexity" not in task.metrics:
        predictions = predict(model, examples, context)
        numbers = _numbers_of(task, predictions, used, model.labels, settings, folder)
    if numbers is None and task.evaluate_examples is not None:
        numbers = example_rows(model, examples, context)
    if numbers is not None:
        statistics = task.collect(numbers, model.labels)
        metrics = task.compute_metrics(statistics, model.labels)
    else:
        metrics, statistics, _ = evaluate_in_full(model, examples, context)
    judged = None
    if predictions:
        judged = judge(task, used, predictions, numbers, settings, model.labels)
    elif numbers is not None:
        judged = judge_losses(task, numbers, model.labels)
    tables = dict(task.tables(statistics, model.labels))
    extra = _of_classes(model, task, predictions, used, settings, tables) if predictions else {}

    def show(i: int, judged: Judged) -> Shown:
        texts = _texts(i, task, used, examples, processor, predictions, settings, model.labels)
        image = thumbnail(used[i].values[settings.data.text_column]) if task.noun == "image" else ""
        return Shown(
            str(examples.ids[i]), judged.true[i], judged.predicted[i], judged.describe(i), judged.confidence[i],
            [] if image else texts, image,
        )  # fmt: skip

    chosen: dict[str, Any] = {"worst": [], "measure": ""}
    if judged is not None:
        chosen = {"worst": [show(i, judged) for i in judged.worst(MOST_SHOWN)], "measure": judged.measure}
        chosen["confident"] = [show(i, judged) for i in judged.most_confident(MOST_SHOWN)]
        chosen["pairs"] = judged.pairs
        pairs = [[pair] for pair in zip(judged.true, judged.predicted, strict=True)]
        if task.predicts == "tags" and all("tags" in row for row in predictions):
            tables["confusion_matrix"], pairs = word_confusions(used, predictions, settings, model.labels)
        if "confusion_matrix" in tables:
            found = _cells(pairs, judged.confidence)
            chosen["cells"] = {cell: [show(i, judged) for i in own] for cell, own in found.items()}
    notes = [*getattr(rows, "notes", ()), *examples.notes, *read_calibration(model).describe(model.labels)]
    lengths = [int(n) for n in all_lengths(examples.lengths)]
    wrong = judged.is_wrong if judged is not None else []
    known = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
    return Findings(source, folder.name, len(used), len(rows), known, tables, notes, lengths, wrong, **chosen, **extra)


def _validation_rows(task: Task, settings: TaskSettings, seed: int, labels: Sequence[str]) -> tuple[list[Row], str]:
    """Return the rows of data.validation, else those that the run held out of data.train, and what they are."""
    name = settings.data.validation
    if name:
        rows: Rows = read_file(task, name, settings, True)
        check_labels(task, name, rows, settings, labels)
        return rows, name
    as_trained = TaskSettings(settings.data, settings.own, False, settings.generate, settings.bleu_tokenizer)
    return read_training_data(task, as_trained, seed).validation, f"{settings.data.train} (held out)"


def _numbers_of(
    task: Task,
    predictions: list[dict[str, Any]],
    rows: list[Row],
    labels: Sequence[str],
    settings: TaskSettings,
    folder: Path,
) -> Tensor | None:
    """Return the row of each example (engine/prediction_rows.py); None where the predictions do not give it."""
    try:
        return prediction_rows(task, predictions, rows, labels, settings, folder)
    except (ConfigError, DataError):  # spans of a text instead of tags, rows without a target
        return None


def _texts(
    i: int,
    task: Task,
    rows: list[Row],
    examples: Any,
    processor: Any,
    predictions: list[dict[str, Any]],
    settings: TaskSettings,
    labels: Sequence[str],
) -> Sequence[Part]:
    """Return the text of an example; of one that is no row of the file, such as a block of texts, as it was encoded."""
    if len(rows) == len(examples) and task.noun != "image":
        return parts_of(rows[i], predictions[i] if predictions else {}, task, settings, labels)
    return crop([Part("\n".join(examples.show(i, processor, labels)))])


def _of_classes(
    model: Any,
    task: Task,
    predictions: list[dict[str, Any]],
    rows: list[Row],
    settings: TaskSettings,
    tables: dict[str, Any],
) -> dict[str, Any]:
    """Add the calibration of a classifier to the tables; return the values of its thresholds."""
    problem = problem_of(model)
    if not problem or not all("logits" in row for row in predictions):
        return {}
    labels, own = model.labels, read_calibration(model)
    logits = torch.tensor([[row["logits"][label] for label in labels] for row in predictions], dtype=torch.float64)
    targets = class_targets(rows, settings.data.label_column, labels, problem)
    bins = [reliability_bins(logits, targets, problem, temperature) for temperature in (1.0, own.temperature)]
    tables["calibration"] = describe_calibration(own, torch.stack(bins))
    if problem == "single-label" and len(labels) != 2:
        return {}
    p = probabilities(logits, problem, own.temperature)
    if problem == "single-label":
        p, targets = p[:, 1], targets
    is_known = (targets == 0) | (targets == 1)
    found = threshold_values(p[is_known], targets[is_known] == 1)
    what = f"of {labels[1]}" if problem == "single-label" else "of all labels together"
    applied = (*own.thresholds, 0.5)[0] if len(own.thresholds) < 2 else math.nan
    return {"thresholds": found, "thresholds_of": what, "applied": applied}


def threshold_values(p: Tensor, is_positive: Tensor) -> list[tuple[float, dict[str, float]]]:
    """Return precision, recall and F1 of predicting what has a probability above each threshold; both (N,)."""
    found = []
    for i in range(1, NUM_THRESHOLDS):
        threshold = i / NUM_THRESHOLDS
        is_chosen = p > threshold
        hits, chosen, positives = (float(x.sum()) for x in (is_chosen & is_positive, is_chosen, is_positive))
        values = {"recall": hits / positives if positives else math.nan}
        values["precision"] = hits / chosen if chosen else math.nan
        values["F1"] = 2 * hits / (chosen + positives) if chosen + positives else math.nan
        found.append((threshold, values))
    return found


def _cells(pairs: Sequence[Sequence[Pair]], confidence: Sequence[float]) -> dict[Pair, list[int]]:
    """Return examples of the most frequent cells of the confusion matrix, the most confident first.

    pairs: of each example, or of each of its words. Cells of what is wrong come before those of what is right.
    """
    counts = Counter(pair for own in pairs for pair in own)
    frequent = {*sorted(counts, key=lambda pair: (pair[0] == pair[1], -counts[pair], *pair))[:MOST_CELLS]}
    found: dict[Pair, list[int]] = {}
    for i in sorted(range(len(pairs)), key=lambda i: math.inf if math.isnan(confidence[i]) else -confidence[i]):
        for pair in dict.fromkeys(pairs[i]):
            own = found.setdefault(pair, []) if pair in frequent else []
            if len(own) < OF_A_CELL:
                own.append(i)
    return found
