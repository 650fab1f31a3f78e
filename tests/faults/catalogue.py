"""The faults by name: what is done, how often in full, and how often in the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults import crashes, damage, injector, kills, stops
from faults.runs import Result


@dataclass(frozen=True)
class Fault:
    """A fault. run(count, seed, folder) puts it to the engine; full and sample: the counts by hand and in the tests."""

    what: str
    run: Callable[[int, int, Path], Result]
    full: int
    sample: int
    cannot_run: Callable[[], str] = lambda: ""


FAULTS = {
    "F1": Fault("kill -9 at random times, on 1 and 2 ranks", kills.run, 100, 8),
    "F2": Fault("a crash at every system call that changes the run folder", crashes.crash, 1000, 10, injector.missing),
    "F3": Fault("truncated files and flipped bits, of every file", damage.run, 200, 2, injector.missing),
    "F4": Fault("every such call refused: EIO, full disk, read-only folder", crashes.refuse, 1000, 10, injector.missing),
    "F5": Fault("SIGTERM, SIGINT, SIGUSR1 at random times", stops.run, 50, 2),
}
