"""Warnings about the watched metric: before training if it cannot compare models, and at the end if it did not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from data import Examples
from engine.errors import TrainingError
from engine.state import TrainState
from engine.tasks import Task

FEW = 3  # evaluations; with fewer an unchanged metric says nothing


def warn_of_metric(task: Task, watched: str, validation_set: Examples, labels: Sequence[str]) -> list[str]:
    """Return a warning if the watched metric is undefined or constant on the validation data, and what to watch."""
    if len(validation_set) == 1:
        return [f"warning: the validation data has one example, too few for {watched} to compare models"]
    unusable = task.unusable_metrics(validation_set, labels)
    if watched not in unusable:
        return []
    usable = [name for name in task.metrics if name not in unusable]
    hint = f"; eval.metric = {usable[0]} can" if usable else ""
    return [f"warning: {watched} cannot compare models on the validation data: {unusable[watched]}{hint}"]


def explain_best(state: TrainState, watched: str, values: Sequence[float]) -> str:
    """Return a warning about the best evaluation, "" if there is none; TrainingError if no evaluation is best.

    values: the watched metric of all evaluations of the run.
    """
    if state.best_step == 0:
        raise TrainingError(
            f"{watched} and the loss were not numbers in any evaluation, so there are no best weights, and data.test "
            "was not evaluated; last/ has the final weights"
        )
    if state.best is None:
        return f"warning: {watched} was not a number in any evaluation; best/ has the weights with the lowest loss"
    numbers = [value for value in values if not math.isnan(value)]
    if len(numbers) >= FEW and len(set(numbers)) == 1:
        return (
            f"warning: {watched} was {numbers[0]:.4g} in all {len(numbers)} evaluations; best/ has the weights with "
            "the lowest loss, and another eval.metric may tell them apart"
        )
    return ""
