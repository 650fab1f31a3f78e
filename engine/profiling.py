"""A trace of some steps of a run by torch.profiler (log.profile_steps), and a table of what took the time in them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from data.writing import replace_file
from engine.config import ConfigError

TABLE_ROWS = 10
STEPS = re.compile(r"(\d{1,12})(?:\.\.(\d{1,12}))?")


def parse_profile_steps(text: str) -> range:
    """Return the steps of "10..12", both ends included, or of "10"; none for "". Raises ConfigError."""
    if not text.strip():
        return range(0)
    found = STEPS.fullmatch(text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last:
        raise ConfigError(f"log.profile_steps = {text!r:.80} should be a step, or the first and last of some: 10..12")
    return range(first, last + 1)


class StepProfiler:
    """The profiler of the steps that log.profile_steps names, on rank 0; without any, it does nothing.

    Raises ConfigError for steps after the last one of the run, which are `total`.
    """

    def __init__(self, text: str, folder: Path, device: torch.device, total: int):
        self.steps, self.device = parse_profile_steps(text), device
        if self.steps and self.steps[-1] > total:
            raise ConfigError(f"log.profile_steps = {text!r}: the run has {total:,} steps")
        self.path = folder / f"trace-steps-{text.strip().replace('..', '-')}.json"
        self.profiler: Any = None
        self.first = self.last = 0  # that are in the trace

    def begin_step(self, step: int) -> None:
        """Start the trace, if this step is to be in it."""
        if self.profiler is None and step in self.steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self.profiler.start()
            self.first = step

    def end_step(self, step: int) -> str:
        """Note that a step was taken; after the last one write the trace, and return a table of its operators."""
        if self.profiler is None:
            return ""
        self.last = step
        return self.finish() if step >= self.steps[-1] else ""

    def finish(self) -> str:
        """Write the trace of the steps so far, if it has begun; return a table of its operators."""
        if self.profiler is None:
            return ""
        profiler, self.profiler, self.steps = self.profiler, None, range(0)
        profiler.stop()
        try:
            with replace_file(self.path) as temporary:
                profiler.export_chrome_trace(str(temporary))
                if not os.path.getsize(temporary):
                    raise OSError(0, "nothing was written")
        except (OSError, RuntimeError) as error:
            return f"warning: {self.path} cannot be written ({error}); the run goes on"
        table = format_operators(profiler.key_averages(), self.device.type)
        return f"steps {self.first} to {self.last} in {self.path} (for chrome://tracing or ui.perfetto.dev)\n{table}"


def format_operators(events: Any, device: str) -> str:
    """Return the operators that took most of the time of a device, without that of the operators they called."""
    name = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    times = {event.key: (getattr(event, name), event.count) for event in events if getattr(event, name) > 0}
    total = sum(time for time, _ in times.values()) or 1
    lines = [f"{'ms':>10}  {'share':>6}  {'calls':>6}  operator, on the {device}"]
    for key, (time, count) in sorted(times.items(), key=lambda item: -item[1][0])[:TABLE_ROWS]:
        lines.append(f"{time / 1000:>10.2f}  {time / total:>6.1%}  {count:>6}  {key:.80}")
    return "\n".join(lines)
