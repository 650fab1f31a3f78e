"""The faults by name: what is done, how often in full, and how often in the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults import (
    crashes,
    damage,
    folders,
    hostile,
    images,
    injector,
    kills,
    numbers,
    ranks,
    repeat,
    rows,
    soak,
    stops,
    workers,
)
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
    "F1": Fault("kill -9 at random times, on 1 and 2 ranks", kills.run, 100, 6),
    "F2": Fault("a crash at every system call that changes the run folder", crashes.crash, 1000, 6, injector.missing),
    "F3": Fault("truncated files and flipped bits, of every file", damage.run, 200, 1, injector.missing),
    "F4": Fault("every such call refused: EIO, full disk, read-only", crashes.refuse, 1000, 2, injector.missing),
    "F5": Fault("SIGTERM, SIGINT, SIGUSR1, SIGHUP at random times", stops.run, 50, 1),
    "F6": Fault("one of 2 or 4 ranks exits, is killed or stopped", ranks.end, 4, 1),
    "F7": Fault("torchrun --max-restarts=3, three deaths", ranks.restart, 8, 1),
    "F8": Fault("a resume on another number of ranks", ranks.resize, 5, 1),
    "F6-fsdp": Fault("F6 with sharded parameters", partial(ranks.end, strategy="fsdp"), 4, 1),
    "F7-fsdp": Fault("F7 with sharded parameters", partial(ranks.restart, strategy="fsdp"), 6, 1),
    "F8-fsdp": Fault("F8 from and to sharded parameters", partial(ranks.resize, strategy="fsdp"), 5, 1),
    "F9": Fault("an exception on one of two ranks", ranks.fail, 50, 2),
    "F10": Fault("a worker killed, raising, hanging or stopped", workers.run, 5, 1),
    "F11": Fault("NaN and infinity in loss, input, gradient and weight", numbers.run, 4, 1),
    "F12": Fault("bad images among good ones", images.run, 200, 30),
    "F13": Fault("bad rows in files of every task and format", rows.run, 600, 60),
    "F14": Fault("malformed and mutated files of every kind", hostile.fuzz, 10_000, 20),
    "F15": Fault("pickles in the place of every file", hostile.pickles, 1000, 8),
    "F17": Fault("two runs in one folder, a stale lock", folders.share, 50, 1),
    "F18": Fault("another recipe, data or tokenizer at a resume", folders.alter, 28, 2),
    "F19": Fault("evaluation, save and log every few steps, for long", soak.run, 10_000, 300),
    "F20": Fault("the same command three times", repeat.run, 7, 1),
}
