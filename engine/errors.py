"""The errors whose message is for the user: a command ends with the message alone and exit code 2."""

from __future__ import annotations

from data import DataError
from engine.config import ConfigError
from models import ModelError


class TrainingError(RuntimeError):
    """The run cannot go on; the message is for the user."""


USER_ERRORS = (ConfigError, DataError, ModelError, TrainingError)
