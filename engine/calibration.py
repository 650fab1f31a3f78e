"""What a classifier's probabilities are worth: temperature scaling, thresholds, and the expected calibration error.

Both are fitted on the validation data and kept in config.json, as `calibration_temperature` and as `thresholds`,
{label: probability}. (`temperature` is a setting of generation there, and transformers does not keep it.) Evaluation
and prediction of a model that has them apply them:

- probabilities are those of logits / temperature (Guo et al. 2017, "On Calibration of Modern Neural Networks");
- a label applies where its probability is above its threshold; of two classes the second has the threshold.

The logits, the loss and the rankings stay those of the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.notes import list_some
from models import ModelError, Output, TaskModel

TEMPERATURE, THRESHOLDS = "calibration_temperature", "thresholds"
KEYS = (TEMPERATURE, THRESHOLDS)  # of config.json
DEFAULT_THRESHOLD = 0.5
NUM_BINS = 15  # of equal width, as in Guo et al. 2017
MAX_TEMPERATURE = 100.0  # and 1 / 100 at least; a model that is always right would have 0
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class Calibration:
    """What config.json says of a classifier. thresholds: one for each label, of two classes (1,); (): none."""

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()

    def describe(self, labels: tuple[str, ...]) -> list[str]:
        """Return what is applied, in words; [] for nothing."""
        lines = [f"temperature {self.temperature:.4g}"] if self.temperature != 1 else []
        if self.thresholds:
            named = zip(labels[-len(self.thresholds) :], self.thresholds, strict=True)
            lines.append("thresholds: " + list_some([f"{label} {value:.4g}" for label, value in named]))
        return lines


def problem_of(model: TaskModel) -> str:
    """Return single-label or multi-label for a classifier of examples; "" for any other model."""
    head = model.head
    if head is None or not head.has_labels or not model.labels or not head.supports_distillation:
        return ""
    return head.shape.problem if head.shape.problem != "regression" else ""


def read_calibration(model: TaskModel) -> Calibration:
    """Return what config.json says; ModelError where it cannot be meant."""
    config, problem = model.spec.config, problem_of(model)
    if not problem or not config.keys() & set(KEYS):
        return Calibration()
    temperature: Any = config.get(TEMPERATURE)
    listed: Any = config.get(THRESHOLDS)
    temperature = 1.0 if temperature is None else temperature
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ModelError(f"config.json: {TEMPERATURE} = {temperature!r:.80} should be a number above 0")
    if listed is None:
        return Calibration(float(temperature))
    labels = model.labels if problem == "multi-label" else model.labels[1:]
    if problem == "single-label" and len(labels) != 1:
        raise ModelError(f"config.json: thresholds need two classes, or several labels; there are {len(model.labels)}")
    if not isinstance(listed, Mapping) or not all(_is_number(x) and 0 <= x <= 1 for x in listed.values()):
        raise ModelError(f"config.json: thresholds = {listed!r:.80} should have a number from 0 to 1 for each label")
    if unknown := [label for label in listed if label not in labels]:
        raise ModelError(f"config.json: thresholds has {unknown[0]!r}; the labels with one are {list_some(labels)}")
    return Calibration(float(temperature), tuple(float(listed.get(label, DEFAULT_THRESHOLD)) for label in labels))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def set_calibration(model: TaskModel, calibration: Calibration | None) -> None:
    """Write into the model's config.json what is applied; None: nothing, as before any was fitted."""
    config = {key: value for key, value in model.spec.config.items() if key not in KEYS}
    if calibration is None and len(config) == len(model.spec.config):
        return
    if calibration is not None and calibration.temperature != 1:
        config[TEMPERATURE] = calibration.temperature
    if calibration is not None and calibration.thresholds:
        labels = model.labels[-len(calibration.thresholds) :]
        config[THRESHOLDS] = dict(zip(labels, calibration.thresholds, strict=True))
    model.spec = replace(model.spec, config=config)


# ---- what is applied


def probabilities(logits: Tensor, problem: str, temperature: float = 1.0) -> Tensor:
    """Return the probability of each class or label, (B, C) fp64."""
    scaled = logits.double() if temperature == 1 else logits.double() / temperature
    return scaled.softmax(-1) if problem == "single-label" else scaled.sigmoid()


def choose_class(model: TaskModel, logits: Tensor) -> Tensor | None:
    """Return the predicted class of each example, (B,), by the threshold; None where the model has none."""
    own = read_calibration(model)
    if not own.thresholds:
        return None
    return (probabilities(logits, "single-label", own.temperature)[:, 1] > own.thresholds[0]).long()


def choose_labels(model: TaskModel, logits: Tensor) -> Tensor:
    """Return (B, C) bool: the labels whose probability is above their threshold, by default one half."""
    own = read_calibration(model)
    if not own.thresholds:
        return logits > 0
    thresholds = torch.tensor(own.thresholds, dtype=torch.float64, device=logits.device)
    return probabilities(logits, "multi-label", own.temperature) > thresholds


# ---- what is fitted


def select_targets(logits: Tensor, labels: Tensor, problem: str) -> tuple[Tensor, Tensor]:
    """Return the logits of the targets in fp64, and their labels: (n, C) and (n,) classes, or (n,) and (n,) 0 or 1."""
    is_target = labels != IGNORE_INDEX if problem == "single-label" else ~labels.isnan() & (labels != IGNORE_INDEX)
    return logits.double()[is_target], labels[is_target]


def fit_temperature(logits: Tensor, labels: Tensor, problem: str) -> float:
    """Return the temperature with the smallest mean log-loss; 1 without a target.

    The log-loss is convex in 1 / temperature. Newton's method finds the zero of its derivative, in fp64, and a step
    that leaves the bracket of the zero is replaced by bisection. At a bound, 1 / 100 or 100, that is the result.
    """
    logits, labels = select_targets(logits, labels, problem)
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE  # of 1 / temperature
    if not len(logits):
        return 1.0
    if _derivatives(logits, labels, problem, low)[0] >= 0:
        return MAX_TEMPERATURE
    if _derivatives(logits, labels, problem, high)[0] <= 0:
        return 1 / MAX_TEMPERATURE
    scale = 1.0
    for _ in range(MAX_ITERATIONS):
        slope, curvature = _derivatives(logits, labels, problem, scale)
        low, high = (scale, high) if slope < 0 else (low, scale)
        following = scale - slope / curvature if curvature > 0 else low
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - scale) <= 1e-14 * scale:
            break
        scale = following
    return 1 / scale


def _derivatives(logits: Tensor, labels: Tensor, problem: str, scale: float) -> tuple[float, float]:
    """Return the first and the second derivative of the sum of the log-losses of scale * logits."""
    if problem == "single-label":
        p = (scale * logits).softmax(-1)
        mean = (p * logits).sum(-1)
        slope = (mean - logits.gather(1, labels[:, None]).squeeze(1)).sum()
        return slope.item(), (p * (logits - mean[:, None]) ** 2).sum().item()
    p = (scale * logits).sigmoid()
    return ((p - labels) * logits).sum().item(), (p * (1 - p) * logits**2).sum().item()


def log_loss(logits: Tensor, labels: Tensor, problem: str, temperature: float) -> float:
    """Return the mean negative log-likelihood of the targets."""
    logits, labels = select_targets(logits, labels, problem)
    if problem == "single-label":
        return torch.nn.functional.cross_entropy(logits / temperature, labels).item()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits / temperature, labels.double()).item()


# ---- the expected calibration error


def reliability_bins(logits: Tensor, labels: Tensor, problem: str, temperature: float = 1.0) -> Tensor:
    """Return [predictions, sum of confidences, right ones] of each bin of confidence, (15, 3) fp64; they add.

    - Of one class an example: the largest probability, and whether its class is right.
    - Of several labels: the probability of each label of each example, and whether the example has the label.

    Bin m of 15 has the confidences in (m / 15, (m + 1) / 15], and the first also 0.
    """
    logits, labels = select_targets(logits, labels, problem)
    p = probabilities(logits, problem, temperature)
    if problem == "single-label":
        confidence, chosen = p.max(-1)
        right = (chosen == labels).double()
    else:
        confidence, right = p, labels.double()
    bins = (confidence * NUM_BINS).ceil().long().sub_(1).clamp_(0, NUM_BINS - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, right], 1)
    return columns.new_zeros(NUM_BINS, 3).index_add_(0, bins, columns)


def calibration_error(bins: Tensor) -> float:
    """Return the mean distance of a bin's accuracy from its mean confidence, weighted by its predictions (ECE)."""
    count, confidence, right = bins.sum(0)[0], bins[:, 1], bins[:, 2]
    return ((confidence - right).abs().sum() / count).item() if count else math.nan


def describe_bins(bins: Tensor) -> list[dict[str, float | int | None]]:
    """Return the bins as engine.evaluate writes them; a bin without a prediction has null for its means."""
    rows = []
    for m, (count, confidence, right) in enumerate(bins.tolist()):
        means = {"confidence": confidence / count, "accuracy": right / count} if count else {}
        row = {"from": m / NUM_BINS, "to": (m + 1) / NUM_BINS, "count": int(count)}
        rows.append(row | {"confidence": means.get("confidence"), "accuracy": means.get("accuracy")})
    return rows


def describe_calibration(own: Calibration, bins: Tensor) -> dict[str, Any]:
    """Return what engine.evaluate writes: the error and the bins, with a temperature also those without it.

    bins: (2, 15, 3), of the model itself, and with its temperature.
    """
    result: dict[str, Any] = {"ece": calibration_error(bins[1]), "bins": describe_bins(bins[1])}
    if own.temperature != 1:
        result |= {"temperature": own.temperature, "ece_uncalibrated": calibration_error(bins[0])}
        result["bins_uncalibrated"] = describe_bins(bins[0])
    return result


# ---- the logits of an evaluation


class Recorded:
    """What a classifier's evaluation shows: its reliability bins, and where wanted the logits of all examples."""

    def __init__(self, model: TaskModel, keep_logits: bool):
        self.problem, self.own = problem_of(model), read_calibration(model)
        self.keep_logits = keep_logits
        # (2, 15, 3): of the model itself, and with its temperature
        self.bins = torch.zeros(2, NUM_BINS, 3, dtype=torch.float64)
        self.kept: list[tuple[tuple[int, ...], Tensor, Tensor]] = []  # (indices, logits, labels) of each batch
        self.seen: set[int] = set()  # examples that were added: a metric of one's own reads all of them again

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add a batch, unless its logits are not those of classes of its examples."""
        labels = batch.labels
        if not self.problem or labels is None or not len(labels) or len(logits) != len(batch.ids):
            return
        if not self.seen.isdisjoint(batch.indices):
            return
        self.seen.update(batch.indices)
        for bins, temperature in zip(self.bins, (1.0, self.own.temperature), strict=True):
            bins += reliability_bins(logits, labels, self.problem, temperature).cpu()
        if self.keep_logits:
            self.kept.append((batch.indices, logits.double().cpu(), labels.cpu()))


@contextmanager
def recorded(model: TaskModel, keep_logits: bool = False) -> Iterator[Recorded]:
    """Record the logits of each batch that the model reads in the block, on this rank."""
    found = Recorded(model, keep_logits)

    def add(module: object, inputs: tuple[Batch], output: Output) -> None:
        found.add(inputs[0], output.logits)

    handle = model.register_forward_hook(add)
    try:
        yield found
    finally:
        handle.remove()
