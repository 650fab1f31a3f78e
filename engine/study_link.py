"""The pipes between a study and a run of it: the run reports each evaluation, and the study says whether to go on."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from data.writing import to_json

VARIABLE = "ENGINE_STUDY_PIPES"  # in the environment of a run: the numbers of its two ends, "READ,WRITE"
GO_ON, PRUNE = b"+", b"-"


def report_evaluation(row: Mapping[str, Any]) -> None:
    """Report an evaluation, a row of metrics.jsonl, to the study that started this process, and wait for its answer.

    If that is to stop, this process gets the signal that stops any run after a checkpoint, before its next step.
    """
    if VARIABLE not in os.environ:
        return
    reading, writing = map(int, os.environ[VARIABLE].split(","))
    with suppress(OSError):  # the study has ended, which stops this run by other means (engine/heartbeat.py)
        os.write(writing, (to_json(dict(row)) + "\n").encode())
        if os.read(reading, 1) == PRUNE:
            os.kill(os.getpid(), signal.SIGTERM)


class Link:
    """The pipes of one run, on the side of the study.

    should_prune(row): whether the run is to stop after this evaluation; called in a thread of its own.
    """

    def __init__(self, should_prune: Callable[[dict[str, Any]], bool]):
        self.should_prune = should_prune
        self.has_pruned = False
        self._reports, self._run_writes = os.pipe()
        self._run_reads, self._answers = os.pipe()

    @property
    def descriptors(self) -> tuple[int, int]:
        """The two ends that the run inherits."""
        return self._run_reads, self._run_writes

    @property
    def environment(self) -> dict[str, str]:
        """What tells the run its two ends."""
        return {VARIABLE: f"{self._run_reads},{self._run_writes}"}

    def serve(self) -> None:
        """Close the run's ends, once it has them, and answer its reports from now on."""
        os.close(self._run_reads)
        os.close(self._run_writes)
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        with suppress(OSError), os.fdopen(self._reports, "rb") as reports, os.fdopen(self._answers, "wb", 0) as answers:
            for line in reports:
                is_pruned = self.should_prune(json.loads(line))
                self.has_pruned = self.has_pruned or is_pruned
                answers.write(PRUNE if is_pruned else GO_ON)
