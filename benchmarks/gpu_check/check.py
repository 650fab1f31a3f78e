"""What a part of the check is given, and the tiny data of the tests that some parts use."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.workloads import prepare
from engine import checkpoint, config, train
from engine.cli import StopRequest
from engine.config import Config
from engine.distributed import Ranks

ROOT = Path(__file__).parent.parent.parent
Row = dict[str, Any]


@dataclass
class Check:
    """One part: its device, its files, its time, and where its results go."""

    device: torch.device
    shrink: bool  # tiny models
    files: Path  # folder of the prepared workloads, shared by all parts
    scratch: Path  # an empty folder
    rows: Path  # each row is one line of this file, written when it is measured
    end: float  # on the clock time.monotonic

    @property
    def seconds_left(self) -> float:
        """Return the rest of the time of this part."""
        return self.end - time.monotonic()

    @property
    def ranks(self) -> Ranks:
        """Return the only rank."""
        return Ranks(0, 1, self.device)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions of this device; a CPU has kernels for two of them."""
        return ("fp32", "bf16", "fp16") if self.device.type == "cuda" else ("fp32", "bf16")

    def add(self, work: str, variant: str = "", **figures: Any) -> None:
        """Write a row of the record."""
        self._write({"work": work, "variant": variant, "runs": [figures]})

    def note(self, work: str, text: str) -> None:
        """Write a sentence on something that was not measured or not checked."""
        self._write({"work": work, "variant": "", "runs": [], "note": text})

    def has_time_for(self, seconds: float, work: str) -> bool:
        """Return whether so much time is left; if not, write a note."""
        if self.seconds_left < seconds:
            self.note(work, f"not started: {max(0.0, self.seconds_left):.0f} s were left")
            return False
        return True

    def _write(self, row: Row) -> None:
        with self.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def recipe(self, workload: str, *, shrink: bool | None = None, **settings: Any) -> Config:
        """Return the recipe of a prepared workload on this device. shrink: whether it is tiny; None: as this check."""
        tiny = self.shrink if shrink is None else shrink
        (path,) = prepare(workload, self.files if tiny == self.shrink else self.scratch / "tiny", tiny)
        return config.override(config.read_recipe(path), {"run.device": self.device.type, **settings})


class StopAfter(StopRequest):
    """A request to stop after some steps, which leaves the handlers of signals alone."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def listen(self, announce: bool) -> None:
        """Install no handlers."""

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def run_training(check: Check, cfg: Config, steps: int = 1_000_000) -> list[float]:
    """Train in this process until the end of the run or after `steps` steps; return the logged losses of the run."""
    with checkpoint.claim(cfg, check.ranks) as resumed:
        train.train(cfg, check.ranks, StopAfter(steps), resumed)
    lines = (Path(cfg.run.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "lr" in row]


def relative_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest |a - b| / |b|; infinity where there is nothing to compare."""
    pairs = list(zip(found, expected, strict=False))
    complete = pairs and len(found) == len(expected)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs) if complete else float("inf")


def first_line(error: BaseException) -> str:
    """Return the type and the first line of the message of an error, and the line of this repository that caused it."""
    message = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:160]} ({innermost(error.__traceback__)})"


def innermost(traceback: TracebackType | None) -> str:
    """Return FILE:LINE of the innermost frame that is in this repository."""
    place = "unknown"
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT):
            place = f"{file.relative_to(ROOT)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def has_tests() -> bool:
    """Make tests/support importable; return whether it is there, with pytest, which it imports."""
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return importlib.util.find_spec("support") is not None and importlib.util.find_spec("pytest") is not None


def is_installed(*packages: str) -> bool:
    """Return whether all of these packages can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)
