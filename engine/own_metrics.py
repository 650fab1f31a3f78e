"""A metric of the user's own, a function of all predictions and references of a data set:

    def exact_or_neutral(predictions, references):
        pairs = list(zip(predictions, references))
        return sum(p == r or p == "neutral" for p, r in pairs) / len(pairs)

A file with such a function is named by `--run.plugins my_metric.py`; `--eval.metric exact_or_neutral --eval.mode max`
then watches it. predictions has what engine.predict writes for each example under the key of its task: a class, a list
of labels, a number, a list of tags, a text. references has what the data says, in the same form; for question answering
a list of accepted answers. Both are in the order of the file, whatever the batches and the ranks.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.errors import TrainingError

PARAMETERS = ("predictions", "references")

Function = Callable[[Sequence[Any], Sequence[Any]], float]


@dataclass(frozen=True)
class OwnMetric:
    """A function of (predictions, references), and where it is."""

    name: str
    function: Function

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """Return the value; TrainingError with file and line where the function fails or returns no number."""
        try:
            value = self.function(predictions, references)
        except Exception as error:  # the user's own code fails with errors of every kind
            raise TrainingError(
                f"the metric {self.name!r} failed in {self._place(error)}: {type(error).__name__}: {error}"
            ) from error
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            raise TrainingError(
                f"the metric {self.name!r} in {self._place(None)} should return a number, not {value!r:.80}"
            ) from None

    def _place(self, error: Exception | None) -> str:
        """Return "FILE:LINE" of the last line of the function's file that ran, or where the function begins."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        if code is None:
            return repr(self.function)
        frames = traceback.extract_tb(error.__traceback__) if error else []
        lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(code.co_filename)]
        return f"{code.co_filename}:{lines[-1] if lines else code.co_firstlineno}"


def is_own_metric(function: Any) -> bool:
    """Return whether a function takes predictions and references, by these names."""
    if not inspect.isfunction(function):
        return False
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty) == PARAMETERS


def find_own_metrics(module: ModuleType) -> dict[str, Function]:
    """Return {name: function} of the metrics that a module defines itself, under public names."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and is_own_metric(value)}
    return {name: function for name, function in own.items() if function.__module__ == module.__name__}
