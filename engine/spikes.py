"""Numbers watched while training: spikes of the loss, and the norm of the gradient over the run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from data import Batch
from data.notes import list_some
from engine.distributed import all_gather

WINDOW = 50  # logged losses that a new one is compared with
FEWEST = 10  # with fewer logged losses nothing is a spike
NORMAL_PER_MAD = 1.4826  # standard deviation of a normal distribution in median absolute deviations
LEAST_DEVIATION = 0.01  # of the logarithm of a loss; smaller changes are no spike, however constant the losses are
MAX_IDS = 8  # examples named on the console; metrics.jsonl has all


class SpikeWatch:
    """Finds a logged loss that is far above those before it; it costs one median for each logged step.

    A spike is above all of the last WINDOW logged losses, and its logarithm is more than `deviations` robust standard
    deviations above their median. Logarithms are used because the losses of few examples are skewed: without them
    every fiftieth logged step of a normal run may look like a spike.

    deviations: log.spike_deviations; 0: nothing is a spike. before: the losses logged before a resume.
    """

    def __init__(self, deviations: float, before: Iterable[float] = ()):
        self.deviations = deviations
        self.recent = deque(before, maxlen=WINDOW)

    def check(self, loss: float, micro_batches: Sequence[Batch]) -> dict[str, Any]:
        """Return {"spike": {"median": of the losses before, "ids": of all examples of the step}} for a spike, else {}.

        loss: of the whole step, equal on all ranks. Call it on all ranks, which exchange their ids after a spike.
        """
        center = self._median_if_spike(loss)
        self.recent.append(loss)
        if center is None:
            return {}
        by_rank = all_gather([example_id for batch in micro_batches for example_id in batch.ids])
        return {"spike": {"median": center, "ids": [example_id for ids in by_rank for example_id in ids]}}

    def _median_if_spike(self, loss: float) -> float | None:
        """Return the median of the losses before if `loss` is a spike, else None."""
        before = [x for x in self.recent if 0 < x < math.inf]
        if not self.deviations or len(before) < FEWEST or not max(before) < loss < math.inf:
            return None
        logs = [math.log(x) for x in before]
        middle = median(logs)
        deviation = max(NORMAL_PER_MAD * median(abs(x - middle) for x in logs), LEAST_DEVIATION)
        return math.exp(middle) if math.log(loss) > middle + self.deviations * deviation else None


def describe_spike(step: int, loss: float, spike: dict[str, Any]) -> str:
    """Return a sentence on a spike, as `check` returns it."""
    ids = list_some(spike["ids"], MAX_IDS)
    return f"step {step:>6}  the loss {loss:.4f} is a spike (median before: {spike['median']:.4f}); example ids {ids}"


def describe_norms(norms: Sequence[tuple[int, float]], max_norm: float) -> str:
    """Return a line on the gradient norms of the logged steps, [(step, norm before clipping)]; "" for none.

    max_norm: train.max_grad_norm.
    """
    if not norms:
        return ""
    values = sorted(norm for _, norm in norms)
    step, largest = max(norms, key=lambda item: item[1])
    line = f"gradient norm: median {median(values):.3g}, 95% {values[math.ceil(0.95 * len(values)) - 1]:.3g}, "
    line += f"largest {largest:.3g} at step {step}"
    clipped = sum(norm > max_norm for norm in values) / len(values)
    return line + (f"; {clipped:.0%} of the logged steps were clipped to {max_norm:g}" if max_norm else "")
