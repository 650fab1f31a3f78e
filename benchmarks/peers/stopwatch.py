"""The clock of a trainer's steps, shared by all trainers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.peers.features import Job, num_tokens


def on_gpu(job: Job) -> bool:
    """Return whether a job runs on a GPU."""
    return bool(job.get("device") == "cuda")


class Stopwatch:
    """The end time of each step, on the clock that all processes share, and the examples and tokens it read."""

    def __init__(self, job: Job, pool: float = 1.0):
        self.job, self.pool = job, pool
        self.ends: list[float] = []
        self.samples: list[int] = []
        self.tokens: list[int] = []

    def count(self, samples: int, tokens: int) -> None:
        """Record what a step reads. A loader may be ahead of the steps."""
        self.samples.append(samples)
        self.tokens.append(tokens)

    def counted(self, collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """Return a collator that also records the samples and tokens of its batches."""

        def collate_and_count(features: list[Any]) -> Any:
            self.count(len(features), sum(num_tokens(feature, self.job["task"]) for feature in features))
            return collate(features)

        return collate_and_count

    def step(self, loss: Any = None, grad_norm: Any = None, **more: Any) -> None:
        """Record the end of a step; end the process after the last. loss and grad_norm are read in a check only.

        A GPU is waited for where the timed steps begin and where they end.
        """
        if len(self.ends) + 1 in (1, self.job.get("warm_up"), self.job["steps"]) and on_gpu(self.job):
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self.job["check"]:
            self.finish(loss=float(loss), grad_norm=float(grad_norm), **more)
        if len(self.ends) == self.job["steps"]:
            self.finish()

    def finish(self, **more: Any) -> NoReturn:
        """Write the figures and end the process."""
        steps = len(self.ends)
        figures = {"ends": self.ends, "samples": self.samples[:steps], "tokens": self.tokens[:steps], "pool": self.pool}
        if on_gpu(self.job):  # instead of the memory of the process
            import torch

            figures["peak_memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
        Path(self.job["out"]).write_text(json.dumps(figures | more))
        os._exit(0)
