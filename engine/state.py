"""The state of a run that changes during training, apart from the weights and the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ConfigError, EvalSettings
from engine.optim import MAX_STEPS
from models.checkpoints.tensor_files import read_json

LOWER_IS_BETTER = ("loss", "mse", "mae", "perplexity", "bits_per_byte")
HIGHER_IS_BETTER = (
    *("accuracy", "top5_accuracy", "subset_accuracy", "token_accuracy", "mcc", "precision", "recall", "f1"),
    *("precision_micro", "recall_micro", "f1_micro", "f1_weighted", "exact_match", "best_exact_match", "best_f1"),
    *("f1_present", "f1_positive", "precision_positive", "recall_positive"),
    *("f1_strict", "precision_strict", "recall_strict"),
    *("roc_auc", "roc_auc_micro", "average_precision", "average_precision_micro"),
    *("pearson", "spearman", "bleu", "chrf", "character_f1"),
    *("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "mean",  # of several tasks (engine/tasks/multi_task.py)
    *("mrr@10", "accuracy@1", "accuracy@10"),
)
# The values of state.json and their types; best/ has no optimizer.
PARTS = {"train": dict, "data": str, "scaler": dict, "plugins": dict}


@dataclass
class TrainState:
    """The counters of a run, and what its evaluations found; saved with every checkpoint."""

    step: int = 0  # optimizer steps taken; the schedules depend on it
    position: int = 0  # steps of data consumed: `step` plus the skipped steps
    skipped_in_a_row: int = 0
    samples: int = 0  # training examples seen
    best: float | None = None  # best value of the watched metric; none while it was never a number
    best_step: int = 0  # of the evaluation whose weights are kept as best; 0: none are
    best_loss: float | None = None  # of that evaluation; none where it was not finite
    bad_evaluations: int = 0  # evaluations since the watched metric last improved, compared with eval.patience
    watched: float | None = None  # value of the watched metric in the last evaluation
    evaluated_step: int = 0  # of the last evaluation

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> TrainState:
        """Return the state of a checkpoint; ValueError where these are not the counters of a run.

        JSON has null for NaN, and `watched` is none only before an evaluation. Older checkpoints lack evaluated_step,
        since their step had always been evaluated if that was due.
        """
        values = {"evaluated_step": values.get("step"), **values}
        if differing := {field.name for field in dataclasses.fields(cls)} ^ values.keys():
            raise ValueError(f"the counters are not those of a run: {', '.join(sorted(differing)[:4])}")
        for field in dataclasses.fields(cls):
            value = values[field.name]
            if field.type == "int" and not (type(value) is int and 0 <= value <= MAX_STEPS):
                raise ValueError(f"{field.name} = {value!r:.80} should be a whole number from 0")
            if field.type != "int" and not (value is None or is_finite_number(value)):
                raise ValueError(f"{field.name} = {value!r:.80} should be a finite number or null")
        state = cls(**values)
        if state.watched is None and (state.best_step or state.bad_evaluations):
            state.watched = math.nan
        return state

    def advance(self, stepped: bool, samples: int) -> None:
        """Count one step of data. stepped: whether the optimizer took it."""
        self.step += stepped
        self.position += 1
        self.samples += samples
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1

    def is_evaluation_due(self, every_steps: int, total_steps: int) -> bool:
        """Return whether this step ends an interval of `every_steps`, or the run, and was not evaluated yet."""
        ends_interval = self.step % every_steps == 0 or self.step >= total_steps
        return self.evaluated_step < self.step and ends_interval

    def record(self, value: float, loss: float, mode: str, min_delta: float) -> bool:
        """Record the watched metric and the loss of an evaluation; return whether it is the best so far.

        Of evaluations with equal values the one with the lowest loss is best; eval.patience does not count it as an
        improvement. A finite number is better than any other value, and without one the loss alone decides.
        """
        self.watched, self.evaluated_step = value, self.step
        gain = math.inf if self.best is None else value - self.best if mode == "max" else self.best - value
        if math.isfinite(value) and gain > min_delta:
            self.best, self.best_step, self.bad_evaluations = value, self.step, 0
            self.best_loss = loss if math.isfinite(loss) else None
            return True
        self.bad_evaluations += 1
        is_equal = value == self.best or (not math.isfinite(value) and self.best is None)
        lower = math.isfinite(loss) and (self.best_step == 0 or (self.best_loss is not None and loss < self.best_loss))
        if is_equal and lower:
            self.best_step, self.best_loss = self.step, loss
        return is_equal and lower

    def reason_to_stop(self, total_steps: int, settings: EvalSettings, mode: str) -> str:
        """Return why the run ends, in words, or "". It depends on the saved state only, so a resumed run agrees."""
        worst, value = settings.stop_if_worse_than, self.watched
        if worst is not None and value is not None:
            beyond = value < worst if mode == "max" else value > worst
            if beyond or not math.isfinite(value):
                return f"diverged: {value:.4g} in the last evaluation, eval.stop_if_worse_than = {worst:g}"
        if self.step >= total_steps and self.evaluated_step == self.step:
            return "all steps done"
        return "out of patience" if 0 < settings.patience <= self.bad_evaluations else ""


def metric_direction(settings: EvalSettings, metric: str) -> str:
    """Return "max" or "min": which values of the watched metric are better."""
    if settings.mode != "auto":
        return settings.mode
    name = metric.rpartition("/")[2]  # without the name of one of several tasks
    if name not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
        raise ConfigError(
            f"eval.mode = auto does not know whether a higher or a lower {metric} is better: set it to max or min"
        )
    return "min" if name in LOWER_IS_BETTER else "max"


def is_finite_number(value: object) -> bool:
    """Return whether a value of JSON is a number, and finite."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json, with a TrainState under "train"; ConfigError if it has another.

    A checkpoint may come from a stranger, who can write a manifest that fits: so types and ranges are checked too.
    """
    path = folder / "state.json"
    run: Any = read_json(path)
    try:
        if not isinstance(run, dict):
            raise ValueError("it is not a JSON object")
        for name, kind in PARTS.items():
            if not isinstance(run.get(name), kind):
                raise ValueError(f"{name} = {run.get(name)!r:.80} should be a {kind.__name__}")
        optimizer = run.get("optimizer", {"class": "", "values": {}})
        if not (isinstance(optimizer, dict) and isinstance(optimizer.get("values"), dict)):
            raise ValueError(f"optimizer = {optimizer!r:.80} should have a class and values")
        if not all(isinstance(checksum, str) for checksum in run["plugins"].values()):
            raise ValueError("plugins should have checksums")
        state = TrainState.from_saved(run["train"])
        if state.best_step > state.step:
            raise ValueError(f"best_step {state.best_step} is after step {state.step}")
        return run | {"train": state}
    except ValueError as error:
        raise ConfigError(f"{path} is not the state of a run: {error}") from None
