"""What a run does to judge its model, beside its evaluations: before the first step, and at each new best."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

import models
from data import Examples
from engine import distributed
from engine.calibration import (
    MAX_TEMPERATURE,
    Calibration,
    Recorded,
    calibration_error,
    fit_temperature,
    log_loss,
    probabilities,
    recorded,
    reliability_bins,
    set_calibration,
)
from engine.config import EvalSettings
from engine.ema import Ema
from engine.evaluate import evaluate, sum_statistics
from engine.evaluation_batches import EvaluationContext
from engine.log import RunLog
from engine.metrics.bootstrap import explain_groups
from engine.sharding import gathered
from engine.thresholds import describe_tuning, tune_thresholds

NO_THRESHOLDS = "none"  # eval.tune_thresholds


def describe_judging(settings: EvalSettings, group_column: str) -> list[str]:
    """Return what [eval] fits on the validation data, and what its intervals leave out, in words; [] for nothing."""
    notes = [note] if settings.confidence and (note := explain_groups(group_column)) else []
    fitted = ["a temperature of the probabilities"] if settings.fit_temperature else []
    fitted += [f"thresholds for {settings.tune_thresholds}"] if settings.tune_thresholds != NO_THRESHOLDS else []
    if not fitted:
        return notes
    return [
        *notes,
        f"each new best is fitted on the validation data: {' and '.join(fitted)}; engine.evaluate, engine.predict and "
        "the final test apply it, the evaluations of the run do not",
    ]


def evaluate_at_start(
    model: models.TaskModel, validation_set: Examples, train_subset: Examples, context: EvaluationContext, log: RunLog
) -> None:
    """Log an evaluation of the model before its first step, as step 0; it is no candidate for the best."""
    clock = time.perf_counter()
    with gathered(model):
        metrics = evaluate(model, validation_set, context)
        train_metrics = evaluate(model, train_subset, context)
    if not context.was_stopped:
        log.log_evaluation(0, metrics, train_metrics, False, time.perf_counter() - clock)
        log.restart_clock()


def calibrate(
    model: models.TaskModel, validation_set: Examples, context: EvaluationContext, settings: EvalSettings, ema: Ema
) -> str:
    """Fit the temperature and the thresholds that [eval] asks for, write them into the model, return what was found.

    It reads the validation data once more, with the weights that will be the best. Signals wait until it is done.
    """
    if not settings.fit_temperature and settings.tune_thresholds == NO_THRESHOLDS:
        return ""
    set_calibration(model, None)
    uninterrupted = replace(context, should_stop=lambda: False, confidence=0.0)
    with ema.in_place_of_weights(), gathered(model), recorded(model, keep_logits=True) as found:
        sum_statistics(model, validation_set, uninterrupted)
    logits, labels = gather_logits(found, len(validation_set), len(model.labels))
    problem, temperature, lines = found.problem, 1.0, list[str]()
    if settings.fit_temperature:
        temperature, note = _fit_temperature(logits, labels, problem)
        pairs = [(_error(logits, labels, problem, t), log_loss(logits, labels, problem, t)) for t in (1.0, temperature)]
        (ece, loss), (new_ece, new_loss) = pairs
        lines.append(
            f"temperature {temperature:.4g}: calibration error {ece:.4f} -> {new_ece:.4f}, "
            f"log-loss {loss:.4f} -> {new_loss:.4f} on the validation data{note}"
        )
    thresholds: tuple[float, ...] = ()
    if settings.tune_thresholds != NO_THRESHOLDS:
        p = probabilities(logits, problem, temperature).numpy()
        thresholds, tuned = tune_thresholds(p, labels.numpy(), problem, settings.tune_thresholds)
        lines.append(describe_tuning(tuned, model.labels[-len(thresholds) :], settings.tune_thresholds))
    set_calibration(model, Calibration(temperature, thresholds))
    return "\n".join(f"{'':>11}  {line}" for line in lines)


def forget_calibration(model: models.TaskModel) -> None:
    """Remove from the model what was fitted for best/: it does not suit the weights of a later step."""
    set_calibration(model, None)


def gather_logits(found: Recorded, count: int, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of all examples, (count, C) fp64, and their labels, (count,) or (count, C), on all ranks."""
    is_single = found.problem == "single-label"
    logits = torch.zeros(count, num_labels, dtype=torch.float64)
    labels = torch.zeros(count, 1 if is_single else num_labels, dtype=torch.float64)
    for indices, of_batch, own in found.kept:
        logits[list(indices)] = of_batch
        labels[list(indices)] = own.double().view(len(indices), -1)
    logits, labels = distributed.reduce_sum(logits), distributed.reduce_sum(labels)
    return logits, labels[:, 0].long() if is_single else labels


def _fit_temperature(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> tuple[float, str]:
    """Return the temperature, and a note where the validation data cannot determine it.

    Where all of it is right, a smaller one is always better there, and 1 / 100 would make the probabilities of other
    examples far too sure: 1 stays.
    """
    temperature = fit_temperature(logits, labels, problem)
    if temperature <= 1 / MAX_TEMPERATURE:
        return 1.0, "; it stays 1, since all of these examples are right, which sets no smallest temperature"
    return temperature, "; this is the largest one that is tried" if temperature >= MAX_TEMPERATURE else ""


def _error(logits: torch.Tensor, labels: torch.Tensor, problem: str, temperature: float) -> float:
    return calibration_error(reliability_bins(logits, labels, problem, temperature))
