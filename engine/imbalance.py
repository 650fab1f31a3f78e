"""Classes that are not equally frequent: weights in the loss, the balanced sampler, and labels without examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data import Examples
from data.batch import IGNORE_INDEX
from data.notes import count_of, list_some
from data.order import LARGEST_PERMUTATION
from engine.config import ConfigError, RegularizeSettings
from engine.config.schema import LARGEST, SMALLEST
from models import TaskModel

BYTES_OF_BALANCED_ORDER = 75  # an example, at most, while a balanced order is made


def apply_class_weights(model: TaskModel, settings: RegularizeSettings, counts: np.ndarray | None) -> None:
    """Set regularize.class_weights in the head.

    counts: (C,) the training targets of each class; None where no single class is learned.
    balanced: N / (C * counts). Every class then has the same total weight, and the mean over the targets is 1 (King &
    Zeng 2001; scikit-learn's formula). A class without a target has weight 0.
    Raises ConfigError without classes, and unless there is one number above 0 for each class.
    """
    given, head = settings.class_weights, model.head
    if not given:
        return
    if counts is None or head is None or head.shape.problem != "single-label":
        raise ConfigError(
            f"regularize.class_weights = {list(given)} has no effect: this task does not learn one class per example"
        )
    if given == ("balanced",):
        present = np.count_nonzero(counts)
        weights = [float(counts.sum() / (present * count)) if count else 0.0 for count in counts]
    else:
        weights = _read_weights("class_weights", given, model.labels)
    head.shape = replace(head.shape, class_weights=tuple(weights))


def apply_pos_weight(
    model: TaskModel, settings: RegularizeSettings, counts: np.ndarray | None, num_examples: int
) -> list[str]:
    """Set regularize.pos_weight in the head; return notes on balanced weights.

    counts: (C,) the training examples that have each label; None where no labels are learned.
    balanced: (N - counts) / counts. With it a label has the same total weight where it applies and where it does not.
    It is 1 for a label that no example has, or all have.
    Raises ConfigError without labels, and unless there is one number above 0 for each label.
    """
    given, head = settings.pos_weight, model.head
    if not given:
        return []
    if counts is None or head is None or head.shape.problem != "multi-label":
        raise ConfigError(
            f"regularize.pos_weight = {list(given)} has no effect: this task does not learn several labels per example"
        )
    notes = []
    if given == ("balanced",):
        is_mixed = (counts > 0) & (counts < num_examples)
        weights = np.where(is_mixed, (num_examples - counts) / np.maximum(counts, 1), 1.0).tolist()
        shown = [f"{label} {weight:.4g}" for label, weight in zip(model.labels, weights, strict=True)]
        notes.append(f"regularize.pos_weight = balanced: {list_some(shown)}")
        if alike := [repr(label) for label, mixed in zip(model.labels, is_mixed, strict=True) if not mixed]:
            notes.append(f"warning: pos_weight is 1 for {list_some(alike)}, which no training example has, or all have")
    else:
        weights = _read_weights("pos_weight", given, model.labels)
    head.shape = replace(head.shape, pos_weight=tuple(weights))
    return notes


def _read_weights(setting: str, given: Sequence[str], labels: Sequence[str]) -> list[float]:
    try:
        weights = [float(text) for text in given]
    except ValueError:
        weights = []
    if len(weights) != len(labels) or not all(SMALLEST <= weight <= LARGEST for weight in weights):
        raise ConfigError(
            f"regularize.{setting} = [{list_some([*map(repr, given)])}] should be balanced, or {len(labels)} numbers "
            f"above 0, for {list_some([*map(repr, labels)])}; none may be above {LARGEST:g}"
        )
    return weights


def classes_to_balance(sampler: str, examples: Any) -> np.ndarray | None:
    """Return (N,) the class of each training example for train.sampler = balanced; None for another sampler."""
    if sampler != "balanced":
        return None
    labels = np.asarray(examples.labels)  # of a prepared folder, read as a whole
    if (labels == IGNORE_INDEX).any():
        raise ConfigError("train.sampler = 'balanced' needs a class for each training example: set it to shuffle")
    return labels


def describe_sampler(classes: np.ndarray | None, labels: Sequence[str], settings: RegularizeSettings) -> list[str]:
    """Return how often a balanced sampler reads each class and the examples of the rarest; [] for another sampler."""
    if classes is None:
        return []
    present, counts = np.unique(classes, return_counts=True)
    times, extra = divmod(len(classes), len(present))
    often = f"{times:,} or {times + 1:,}" if extra else f"{times:,}"
    rarest = int(counts.argmin())
    examples = count_of(int(counts[rarest]), "example")
    text = f"train.sampler = balanced: an epoch has each of {len(present)} classes {often} times"
    text += (
        f"; {labels[present[rarest]]!r} has {examples}, each read {len(classes) / len(present) / counts[rarest]:.4g}"
    )
    notes = [text + " times an epoch"]
    if len(classes) > LARGEST_PERMUTATION:
        gigabytes = BYTES_OF_BALANCED_ORDER * len(classes) / 1e9
        notes.append(
            f"train.sampler = balanced holds the order of all examples in each process that reads them, some "
            f"{gigabytes:.2g} GB while it is made; train.sampler = shuffle computes that of a step alone"
        )
    if settings.class_weights == ("balanced",):
        notes.append("warning: regularize.class_weights = balanced weights the rare classes a second time")
    return notes


def warn_of_missing(
    train_set: Examples, validation_set: Examples, labels: Sequence[str], metrics: Sequence[str]
) -> list[str]:
    """Return warnings of the labels that training lacks, and of those that only validation lacks.

    Training lacks labels that are declared but absent, or whose groups are all held out.
    """
    unseen = _without_examples(train_set, labels)
    unjudged = [label for label in _without_examples(validation_set, labels) if label not in set(unseen)]
    lines = [f"warning: no training example of {list_some([*map(repr, unseen)])}"] if unseen else []
    if unjudged and len(validation_set):
        text = f"warning: no validation example of {list_some([*map(repr, unjudged)])}"
        lines.append(
            text + ("; f1 counts such a class as 0, f1_present leaves it out" if "f1_present" in metrics else "")
        )
    return lines


def _without_examples(examples: Examples, labels: Sequence[str]) -> list[str]:
    """Return the labels without an example. Entities of one word have no I-PER, but B-PER: PER has examples."""
    counts = examples.label_counts(len(labels))
    if counts is None:
        return []
    seen = {label for label, count in zip(labels, counts, strict=True) if count}
    types = {label[2:] for label in seen if label[1:2] == "-"} if "O" in labels else set[str]()
    return [label for label in labels if label not in seen and not (label[1:2] == "-" and label[2:] in types)]
