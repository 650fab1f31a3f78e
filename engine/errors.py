"""The errors whose message is for the user: a command ends with the message alone and exit code 2, or 75."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

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


def write_error_file(error: str) -> None:
    """Give torchrun the sentence that ends its own report, on a line of its own.

    torchrun prints after its ranks have ended, so nothing of a rank can come later; after this sentence it only rules
    a line.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = f"none, since the reason is known:\n\nerror: {error}"
        entry = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the sentence has been printed
            Path(path).write_text(json.dumps({"message": entry}), encoding="utf-8")
