"""The errors whose message is for the user: a command ends with the message alone and exit code 2, or 75."""

from __future__ import annotations

from data import DataError
from data.workers import WorkerError
from engine.config import ConfigError
from models import ModelError


class TrainingError(RuntimeError):
    """The run cannot go on; the message is for the user."""


class LostRankError(TrainingError):
    """Another rank of the run has ended, or does not answer."""


class OtherRankError(TrainingError):
    """This rank ends because another one has failed, which says why."""


USER_ERRORS = (ConfigError, DataError, ModelError, TrainingError, WorkerError)
LOST_PROCESS_ERRORS = (LostRankError, OtherRankError, WorkerError)  # exit code 75: the same run may succeed later
