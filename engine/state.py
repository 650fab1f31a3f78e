"""The state of a run that changes while it runs, apart from the weights and the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config import EvalSettings

LOWER_IS_BETTER = ("loss", "mse", "mae", "perplexity", "bits_per_byte")


@dataclass
class TrainState:
    """The counters of a run, and what its evaluations found; saved with every checkpoint."""

    step: int = 0  # optimizer steps taken: the schedule's clock
    position: int = 0  # steps of data consumed: `step` and the skipped steps
    skipped_in_a_row: int = 0
    samples: int = 0  # training examples seen
    best: float | None = None  # best value of the watched metric
    best_step: int = 0
    bad_evaluations: int = 0  # evaluations since the best one: the patience used
    watched: float | None = None  # value of the watched metric in the last evaluation

    def advance(self, stepped: bool, samples: int) -> None:
        """Count one step of data; stepped: the optimizer took it."""
        self.step += stepped
        self.position += 1
        self.samples += samples
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1

    def record(self, value: float, mode: str, min_delta: float) -> bool:
        """Note an evaluation, and return whether it is the best so far. NaN never is."""
        self.watched = value
        gain = math.inf if self.best is None else value - self.best if mode == "max" else self.best - value
        if not math.isnan(value) and gain > min_delta:
            self.best, self.best_step, self.bad_evaluations = value, self.step, 0
            return True
        self.bad_evaluations += 1
        return False

    def reason_to_stop(self, total_steps: int, settings: EvalSettings, mode: str) -> str:
        """Return why the run is done, in words; "" while it is not. A resumed run gets the same answer."""
        worst, value = settings.stop_if_worse_than, self.watched
        if worst is not None and value is not None:
            beyond = value < worst if mode == "max" else value > worst
            if beyond or math.isnan(value):
                return f"diverged: {value:.4g} in the last evaluation, eval.stop_if_worse_than = {worst:g}"
        if self.step >= total_steps:
            return "all steps done"
        return "out of patience" if 0 < settings.patience <= self.bad_evaluations else ""


def metric_direction(settings: EvalSettings, metric: str) -> str:
    """Return "max" or "min": which values of the watched metric are better."""
    if settings.mode != "auto":
        return settings.mode
    return "min" if metric in LOWER_IS_BETTER else "max"
