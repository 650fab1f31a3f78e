"""The micro-batches of the next step, fetched and copied to a GPU while it computes the current one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from data import Batch

LARGEST_COPY_AHEAD = 2**28  # bytes; micro-batches beyond it are copied when their turn comes


class StepFetcher:
    """An iterator over training steps, each a list of micro-batches; `fetch` gets the next one early.

    seconds: the time it took to get the last step.
    On a CPU `fetch` does nothing, since nothing could run at the same time.
    """

    def __init__(self, steps: Iterator[list[Batch]], device: torch.device):
        self.steps, self.device = steps, device
        self.seconds = 0.0
        is_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]
        self.fetched: list[Batch] | None = None

    def __iter__(self) -> StepFetcher:
        return self

    def __next__(self) -> list[Batch]:
        micro_batches, self.fetched = self.fetched, None
        if micro_batches is None or self.stream is None:
            return self._time_next()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for batch in micro_batches:
            batch.record_stream(current)
        return micro_batches

    def fetch(self) -> None:
        """Get the next step and start its copies. Call it when the kernels of the current step are launched."""
        if self.stream is None or self.fetched is not None:
            return
        micro_batches, copied = self._time_next(), 0
        with torch.cuda.stream(self.stream):
            for i, batch in enumerate(micro_batches):
                copied += batch.num_bytes
                if copied <= LARGEST_COPY_AHEAD:
                    micro_batches[i] = batch.to(self.device)
        self.fetched = micro_batches

    def _time_next(self) -> list[Batch]:
        clock = time.perf_counter()
        micro_batches = next(self.steps)
        self.seconds = time.perf_counter() - clock
        return micro_batches
