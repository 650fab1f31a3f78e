"""F19: many saves and rotations, and a long run; memory and file descriptors stay flat."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

from engine import checkpoint
from faults.runs import Bench, Result, Run

# What memory may grow by from the second third of the steps to the last one: SETTLING of the allocator in a short run,
# and KEPT for each step, of which the log keeps the gradient's norm for the report of the run.
SETTLING, KEPT = 4 << 20, 512  # bytes


def run(count: int, seed: int, folder: Path) -> Result:
    """Run `count` steps with an evaluation, a save and a log line every few, without workers and with two."""
    bench, result = Bench(folder), Result()
    for workers in (0, 2):
        settings: dict[str, object] = {
            "train.max_steps": count,
            "eval.every_steps": 10,
            "log.every_steps": 2,
            "checkpoint.every_steps": 5,
            "data.num_workers": workers,
        }
        victim = bench.run(settings)
        result.add(soak(victim, count, result), f"{count} steps, {workers} workers")
        victim.remove()
    return result


def soak(victim: Run, count: int, result: Result) -> str:
    """Run to the end and look at the process and the run folder all the while; return what grew or was missing."""
    started = victim.start()
    memory: list[tuple[int, int, int]] = []  # (step, bytes, descriptors) of the process and its workers
    missing, seen = "", set[str]()
    while started.alive():
        step = victim_step(victim)
        names = set(os.listdir(victim.folder)) if victim.folder.is_dir() else set()
        lost = seen - names  # for a moment of each save, one is away; not for half a second
        if lost and not started.wait_for(lambda lost=lost: lost <= set(os.listdir(victim.folder)), 0.5):
            missing = missing or f"{lost} vanished near step {step}"
        seen |= names & {checkpoint.LAST, checkpoint.BEST, checkpoint.PREVIOUS}
        if step > 0:
            memory.append((step, *measure(started.group)))
        time.sleep(max(0.05, min(1.0, count / 10_000)))
    ended = started.wait()
    if ended.code != 0:
        return f"ended: {ended.tail()}"
    second = [row for row in memory if count / 3 <= row[0] < 2 * count / 3]
    last = [row for row in memory if 2 * count / 3 <= row[0] < count]
    if len(second) < 3 or len(last) < 3:
        return f"only {len(memory)} samples"
    before, after = (statistics.median(row[1] for row in part) for part in (second, last))
    files = [sorted(row[2] for row in part) for part in (second, last)]
    result.details[f"memory, {victim.config.data.num_workers} workers"] = (
        f"{before / 2**20:.1f} then {after / 2**20:.1f} MiB, descriptors "
        f"{files[0][0]} to {files[0][-1]} then {files[1][0]} to {files[1][-1]}"
    )
    if after > before + SETTLING + KEPT * count / 3:
        return f"memory grew from {before / 2**20:.1f} to {after / 2**20:.1f} MiB"
    # A save opens files for a moment, and a batch on its way from a worker has some, so the most or the fewest vary. A
    # leak raises both.
    if files[1][0] > files[0][0] and files[1][-1] > files[0][-1]:
        return f"descriptors grew from {files[0][0]} to {files[0][-1]} to {files[1][0]} to {files[1][-1]}"
    return missing


def victim_step(victim: Run) -> int:
    """Return the last step in the log; 0 if there is none."""
    path = victim.folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2000))
        lines = [line for line in stream.read().splitlines() if line.startswith(b'{"step": ')]
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # a line that is being written
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def measure(group: int) -> tuple[int, int]:
    """Return (private bytes in memory, open descriptors) of all processes of a process group."""
    total, files = 0, 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.getpgid(int(entry)) != group:
                continue
            resident, shared = map(int, Path(f"/proc/{entry}/statm").read_text().split()[1:3])
            total += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
            files += len(os.listdir(f"/proc/{entry}/fd"))
        except (OSError, ValueError):  # it has just ended
            continue
    return total, files
