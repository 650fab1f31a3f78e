"""When last/ is saved: every so many steps and minutes, and after each evaluation unless saving takes too long."""

from __future__ import annotations

import math
import time
from pathlib import Path

from engine import checkpoint, pending_save
from engine.config import CheckpointSettings
from engine.distributed import Ranks
from engine.ema import Ema
from engine.state import TrainState

# After a save of x seconds, the next save by the clock is at least 50 * x seconds later, and that after an evaluation
# 10 * x. So saves take at most about 2% of the time, or 10% in a run that evaluates very often.
CLOCK_FACTOR, EVALUATION_FACTOR = 50, 10


class SaveSchedule:
    """Decides at the boundary of two steps whether last/ is saved there; the same on all ranks.

    state: that of the checkpoint which the run resumes from, None for a new run.
    """

    def __init__(self, settings: CheckpointSettings, ranks: Ranks, state: TrainState | None):
        self.settings, self.ranks = settings, ranks
        self.saved = state and (state.position, state.evaluated_step)  # at the last save
        self.saved_at = time.monotonic()
        self.seconds = 0.0  # that the run waited for the last save

    def elapsed(self) -> float:
        """Return the seconds since the last save on rank 0, and 0 on other ranks; all ranks decide by the sum.

        It is infinite on a rank that knows that a save in the background has failed.
        """
        if pending_save.has_failed():
            return math.inf
        return time.monotonic() - self.saved_at if self.ranks.is_main else 0.0

    def is_due(self, state: TrainState, elapsed: float) -> bool:
        """Return whether last/ is to be saved before the next step. elapsed: summed over the ranks."""
        settings = self.settings
        if elapsed == math.inf:  # the next save raises the error of the last one, on all ranks
            return True
        if not self.is_unsaved(state):
            return False
        by_steps = settings.every_steps and state.step and state.step % settings.every_steps == 0
        by_clock = settings.every_minutes and elapsed >= max(60 * settings.every_minutes, CLOCK_FACTOR * self.seconds)
        is_cheap = not settings.every_minutes or elapsed >= EVALUATION_FACTOR * self.seconds
        was_evaluated = state.evaluated_step > (self.saved[1] if self.saved else 0)
        return bool(by_steps or by_clock or (was_evaluated and is_cheap))

    def is_unsaved(self, state: TrainState) -> bool:
        """Return whether last/ is kept and does not have this state."""
        return checkpoint.LAST in self.settings.keep and (state.position, state.evaluated_step) != self.saved

    def explain_resume(self) -> str:
        """Return a phrase on how the run is continued."""
        if checkpoint.LAST in self.settings.keep:
            return "the same command with --resume continues the run"
        return "it cannot be resumed, since checkpoint.keep leaves out last"

    def save(self, folder: Path, contents: checkpoint.Contents, state: TrainState) -> None:
        """Save last/ in a run folder."""
        self.seconds = checkpoint.save(folder / checkpoint.LAST, contents, state, self.ranks)
        self.saved, self.saved_at = (state.position, state.evaluated_step), time.monotonic()

    def finish(self, folder: Path, contents: checkpoint.Contents, state: TrainState) -> None:
        """Save last/ if it does not have this state, and wait until it is written."""
        if self.is_unsaved(state):
            self.save(folder, contents, state)
        pending_save.wait()

    def save_best(self, folder: Path, contents: checkpoint.Contents, state: TrainState, ema: Ema) -> None:
        """Save best/ in a run folder, with the averaged weights where the run has them; best-NAME/ of each task."""
        with ema.in_place_of_weights():
            checkpoint.save(folder / checkpoint.BEST, contents, state, self.ranks)
            for name, own in contents.of_each_task.items():
                checkpoint.save(folder / f"{checkpoint.BEST}-{name}", own, state, self.ranks)
