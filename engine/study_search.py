"""Trials that Optuna suggests: the tree-structured Parzen estimator (TPE), with median pruning.

The trials are kept in optuna.log of the study's folder, a journal that a killed study continues. What is suggested to a
trial is a function of the seed, its number, and the trials that have ended, since each trial has a sampler of its own.
"""

from __future__ import annotations

import importlib.util
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from data.random_streams import STUDY_TRIAL
from engine.config import ConfigError
from engine.study_variants import Range, Space, Variant, trial_variant

JOURNAL = "optuna.log"


def check_optuna() -> None:
    """Raise ConfigError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("--sampler tpe needs the optuna package: pip install optuna")


def sampler_seed(seed: int, number: int) -> int:
    """Return the seed of the sampler of trial `number`."""
    return int(np.random.default_rng([seed, STUDY_TRIAL, number]).integers(2**31))


class TpeSearch:
    """The trials of a study, in the order in which they are begun. Its methods may be called from several threads.

    A trial that has not ended, because it failed or the study was stopped, is begun again by the next study.
    Raises ConfigError where the folder has the trials of other ranges.
    """

    def __init__(self, folder: Path, space: Space, seed: int, count: int, mode: str):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.optuna, self.space, self.seed, self.count = optuna, space, seed, count
        self.lock = threading.Lock()
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name="study",
            direction="maximize" if mode == "max" else "minimize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        about = {"ranges": {key: str(values) for key, values in space.items()}, "seed": seed, "mode": mode}
        known = self.study.user_attrs.get("about", about)
        if known != about:
            raise ConfigError(
                f"{folder / JOURNAL} has the trials of other ranges, seeds or metrics: choose another --folder, or "
                "delete it"
            )
        self.study.set_user_attr("about", about)
        states = optuna.trial.TrialState
        self.unfinished = [t for t in self.study.get_trials(deepcopy=False) if t.state == states.RUNNING]
        self.trials: dict[int, Any] = {}  # that were begun in this process

    def next_trial(self) -> tuple[int, Variant] | None:
        """Begin a trial; None where all have been begun. Those come first that an earlier study has not ended."""
        with self.lock:
            if self.unfinished:
                begun = self.unfinished.pop(0)
                self.study.sampler = self._sampler(begun.number)
                trial = self.optuna.trial.Trial(self.study, begun._trial_id)
            elif (number := len(self.study.get_trials(deepcopy=False))) < self.count:
                self.study.sampler = self._sampler(number)
                trial = self.study.ask()
            else:
                return None
            settings = {key: str(self._suggest(trial, key, values)) for key, values in self.space.items()}
            self.trials[trial.number] = trial
            return trial.number, trial_variant(trial.number, settings)

    def _sampler(self, number: int) -> Any:
        return self.optuna.samplers.TPESampler(seed=sampler_seed(self.seed, number))

    @staticmethod
    def _suggest(trial: Any, key: str, values: Range | list[str]) -> Any:
        if not isinstance(values, Range):
            return trial.suggest_categorical(key, values)
        if values.is_integer:
            return trial.suggest_int(key, int(values.low), int(values.high), log=values.is_log)
        return trial.suggest_float(key, values.low, values.high, log=values.is_log)

    def report(self, number: int, value: float, step: int) -> bool:
        """Note the metric of a trial after a step; return whether to prune it."""
        with self.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step that was reported before the study was stopped
            self.trials[number].report(value, step)
            return bool(self.trials[number].should_prune())

    def was_to_prune(self, number: int) -> bool:
        """Return whether a trial was to be pruned when the earlier study was stopped."""
        with self.lock:
            reported = self.study.get_trials(deepcopy=False)[number].intermediate_values
            return bool(reported) and bool(self.trials[number].should_prune())

    def end(self, number: int, value: float, is_pruned: bool) -> None:
        """Note the result of a trial: its metric, unless it was pruned."""
        states = self.optuna.trial.TrialState
        with self.lock:
            if is_pruned:
                self.study.tell(number, state=states.PRUNED)
            elif math.isfinite(value):
                self.study.tell(number, value)
            else:
                self.study.tell(number, state=states.FAIL)

    def settings_of_all(self) -> list[tuple[int, Variant, str]]:
        """Return (number, variant, state) of every trial that was begun, in any study of this folder."""
        with self.lock:
            return [
                (t.number, trial_variant(t.number, {key: str(t.params[key]) for key in self.space}), t.state.name)
                for t in self.study.get_trials(deepcopy=False)
                if self.space.keys() <= t.params.keys()
            ]
