"""The probability above which a label is predicted, chosen so that a metric is best on the validation data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from engine.calibration import DEFAULT_THRESHOLD

Counts = np.ndarray  # of examples, for each cut


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = numerator / np.maximum(denominator, 1)
    return ratio


def positive_f1(tp: Counts, fp: Counts, fn: Counts, tn: Counts) -> np.ndarray:
    """Return F1 of the label; 0 where it is undefined."""
    return _ratio(2 * tp, 2 * tp + fp + fn)


def macro_f1(tp: Counts, fp: Counts, fn: Counts, tn: Counts) -> np.ndarray:
    """Return the mean of F1 of both classes."""
    mean: np.ndarray = (positive_f1(tp, fp, fn, tn) + positive_f1(tn, fn, fp, tp)) / 2
    return mean


def accuracy(tp: Counts, fp: Counts, fn: Counts, tn: Counts) -> np.ndarray:
    """Return the share of right decisions."""
    return _ratio(tp + tn, tp + fp + fn + tn)


def matthews(tp: Counts, fp: Counts, fn: Counts, tn: Counts) -> np.ndarray:
    """Return Matthews' correlation; 0 where it is undefined."""
    product = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(product > 0, (tp * tn - fp * fn) / np.where(product > 0, product, 1), 0.0)


# {problem: {value of eval.tune_thresholds: what is best at a threshold}}. F1 of two classes is the mean of both, as the
# metric f1 is; F1 of several labels is that of each label, whose mean is the metric f1.
MEASURES: dict[str, dict[str, Callable[..., np.ndarray]]] = {
    "single-label": {"f1": macro_f1, "f1_positive": positive_f1, "accuracy": accuracy, "mcc": matthews},
    "multi-label": {"f1": positive_f1, "accuracy": accuracy, "mcc": matthews},
}


class Tuned(NamedTuple):
    """A threshold, the value of the measure with it, and with one half. is_degenerate: nothing could be tuned."""

    threshold: float
    value: float
    before: float
    is_degenerate: bool


def tune_threshold(probabilities: np.ndarray, is_positive: np.ndarray, measure: Callable[..., np.ndarray]) -> Tuned:
    """Return the best of all thresholds, in O(N log N). Both arrays are (N,).

    A threshold matters only by the examples above it, so there is one candidate below each distinct probability, and
    one above all of them. It is in the middle between its two neighbours. Of equally good ones:

    - one half is chosen, where it is one of them;
    - else the nearest to one half, and of two equally near the lower.

    Where all examples have the label, or none has, one half stays.
    """
    total, positives = len(is_positive), int(is_positive.sum())
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    last_of_ties = np.append(np.flatnonzero(np.diff(ranked)), total - 1) if total else np.zeros(0, np.int64)
    chosen = np.concatenate([[0], last_of_ties + 1]).astype(np.float64)  # examples above each candidate
    hits = np.concatenate([[0], np.cumsum(is_positive[order])[last_of_ties]]).astype(np.float64)
    values = measure(hits, chosen - hits, positives - hits, total - positives - (chosen - hits))
    distinct = ranked[last_of_ties]
    above = np.concatenate([[1.0], distinct])  # the smallest probability above each candidate
    below = np.concatenate([distinct, [0.0]])  # the largest one that is not: a threshold t means p > t
    is_half = (below <= DEFAULT_THRESHOLD) & (above > DEFAULT_THRESHOLD)
    is_half[0] = total > 0 and distinct[0] <= DEFAULT_THRESHOLD
    before = float(values[is_half][0]) if is_half.any() else 0.0
    if not 0 < positives < total:
        return Tuned(DEFAULT_THRESHOLD, before, before, True)
    possible = np.ones(len(values), dtype=bool)
    possible[-1] = distinct[-1] > 0  # no threshold is below 0
    best = values[possible].max()
    is_best = possible & (values == best)
    if (is_best & is_half).any():
        return Tuned(DEFAULT_THRESHOLD, float(best), before, False)
    middle = (above + below) / 2
    middle = np.where((middle < above) | (np.arange(len(middle)) == 0), middle, below)  # neighbours in fp64
    thresholds = middle[is_best]
    distances = np.abs(thresholds - DEFAULT_THRESHOLD)
    threshold = float(thresholds[distances == distances.min()].min())
    return Tuned(threshold, float(best), before, False)


def tune_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, problem: str, metric: str
) -> tuple[tuple[float, ...], list[Tuned]]:
    """Return the threshold of each label, of two classes that of the second, and how each was found.

    probabilities: (N, C). labels: (N,) classes, a negative number where there is no target; or (N, C), where only 0
    and 1 are targets.
    """
    measure = MEASURES[problem][metric]
    if problem == "single-label":
        probabilities, labels = probabilities[:, 1:], np.where(labels < 0, -1, labels)[:, None]
    found = []
    for p, of_label in zip(probabilities.T, labels.T, strict=True):
        is_target = (of_label == 0) | (of_label == 1)
        found.append(tune_threshold(p[is_target], of_label[is_target] == 1, measure))
    return tuple(tuned.threshold for tuned in found), found


def describe_tuning(found: Sequence[Tuned], labels: Sequence[str], metric: str) -> str:
    """Return what was tuned, in one line. labels: those with a threshold."""
    tuned = [one for one in found if not one.is_degenerate]
    text = "thresholds: no label could be tuned"
    if tuned:
        before, after = (float(np.mean([getattr(one, name) for one in tuned])) for name in ("before", "value"))
        text = f"thresholds for {metric}: {before:.4f} -> {after:.4f} on the validation data"
    names = [label for one, label in zip(found, labels, strict=True) if one.is_degenerate]
    if names:
        text += f"; {DEFAULT_THRESHOLD} stays for {len(names)} that all examples there have, or none ({names[0]!r})"
    return text
