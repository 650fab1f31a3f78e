"""F4 on real file systems: a tmpfs that is full, and a run folder that becomes read-only, in a mount namespace.

Each try is made in a fork with a namespace of its own, so that nothing is mounted for other processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

from engine import config as configs
from faults import crashes
from faults.runs import FORK, Bench, Ended, Result, Run

SETTINGS: dict[str, object] = {"train.max_steps": 30, "eval.every_steps": 2, "eval.metric": "loss"}
NEW_MOUNTS = 0x20000  # CLONE_NEWNS
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18  # of mount(2)
ROOM, PAGE = 64 << 20, 4096  # bytes: more than a run needs; a unit of tmpfs


def mount(source: str, target: Path | str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Call mount(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [word.encode() if word else None for word in (source, str(target), kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def unmount(target: Path) -> None:
    """Call umount2(2) with MNT_DETACH, since the run's files in it may still be open."""
    ctypes.CDLL(None).umount2(str(target).encode(), 2)


def enter_namespace(folder: Path) -> None:
    """Give this process mounts of its own, and a tmpfs on a folder; OSError where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    mount("", "/", flags=RECURSIVE | PRIVATE)
    folder.mkdir(exist_ok=True)
    mount("tmpfs", folder, "tmpfs", options=f"size={ROOM}")


def missing(folder: Path) -> str:
    """Return why nothing can be mounted here; "" if it can."""
    return in_fork(lambda: "", folder)


def in_fork(act: Callable[[], str], folder: Path) -> str:
    """Return what act() returns in a fork with a tmpfs on `folder`, or why there is none."""
    answer = folder.with_name(f"{folder.name}.answer")

    def call() -> None:
        try:
            enter_namespace(folder)
        except OSError as error:
            answer.write_text(json.dumps(f"no mount namespace: {error.strerror}"))
            return
        answer.write_text(json.dumps(act()))

    answer.unlink(missing_ok=True)
    process = FORK.Process(target=call)
    process.start()
    process.join()
    return str(json.loads(answer.read_text())) if answer.is_file() else "the fork died"


def run(bench: Bench, count: int, rng: random.Random, result: Result) -> None:
    """Fill a tmpfs at `count` sizes; make the folder of a run read-only `count` times, and before a resume."""
    place = bench.folder / "mounted"
    if reason := missing(place):
        result.details["full tmpfs and read-only mount"] = f"skipped: {reason}"
        return
    through = bench.uninterrupted(SETTINGS)
    size = sum(path.stat().st_size for path in through.folder.rglob("*") if path.is_file())
    for _ in range(count):
        for kind, act in {"full tmpfs": fill, "read-only mount": turn_read_only}.items():
            attempt, share = make_run(bench, place), rng.uniform(0.0, 1.5)
            problem = in_fork(lambda act=act, attempt=attempt, share=share: act(attempt, through, size, share), place)
            result.add(problem, kind)
            attempt.remove()


def make_run(bench: Bench, place: Path) -> Run:
    """Return a new run whose folder is on the file system that will be mounted."""
    run = bench.run(SETTINGS)
    run.folder = place / "run"
    run.config = bench.config(run.folder, SETTINGS)
    run.recipe.write_text(configs.to_toml(run.config))
    return run


def fill(run: Run, through: Run, size: int, share: float) -> str:
    """Train on a tmpfs that has room for a share of the run's files, then with enough room."""
    place = run.folder.parent
    mount("", place, flags=REMOUNT, options=f"size={max(PAGE, int(size * share)) // PAGE * PAGE}")
    ended = run.finish()
    problem = "" if ended.code == 0 else check(run, ended, "No space left|are free") or check_leftovers(run)
    mount("", place, flags=REMOUNT, options=f"size={ROOM}")
    return problem or go_on(run, through)


def turn_read_only(run: Run, through: Run, size: int, share: float) -> str:
    """Mount the run folder read-only over itself in mid-run; a remount is refused while the log is open to write."""
    started = run.start()
    started.wait_for(lambda: f"step {int(1 + 15 * share):>6}  loss" in started.printed())
    mount(str(run.folder), run.folder, flags=BIND)
    mount("", run.folder, flags=BIND | REMOUNT | READ_ONLY)
    problem = check(run, started.wait(), "[Rr]ead-only")
    problem = problem or check(run, run.finish(), "[Rr]ead-only")  # the folder is still read-only
    unmount(run.folder)
    return problem or go_on(run, through)


def check(run: Run, ended: Ended, words: str) -> str:
    """Return what was wrong with the end of a run that could not write; "" if nothing."""
    if not ended.has_sentence() or not re.search(words, ended.err):
        return f"ended otherwise: {ended.tail()}"
    return crashes.check_valid(run)


def check_leftovers(run: Run) -> str:
    left = run.leftovers()
    return f"left {left}" if left else ""


def go_on(run: Run, through: Run) -> str:
    """Resume a run; return how its end differs."""
    ended = run.finish()
    problem = f"did not resume: {ended.tail()}" if ended.code != 0 else run.differs_from(through)
    return problem or check_leftovers(run)
