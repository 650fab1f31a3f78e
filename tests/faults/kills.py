"""F1: kill -9 at random times, half of them within a save, on one rank and on two."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from faults.runs import Bench, Result, Run, Started, prepare_ranks

SETTINGS: dict[str, object] = {"train.max_steps": 6, "eval.every_steps": 1}
LIVES = 4  # a run is killed at most so often before it may end


def run(count: int, seed: int, folder: Path) -> Result:
    """Kill runs `count` times; after up to LIVES kills a run goes on to its end, which must be the undisturbed one."""
    prepare_ranks()
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    while result.tries < count:
        ranks = 1 + len(bench.through) % 2 if result.tries < 2 else rng.choice((1, 1, 2))
        through = bench.uninterrupted(SETTINGS, ranks)
        victim = bench.run(SETTINGS)
        kinds, problem = kill_and_resume(victim, through, ranks, min(LIVES, count - result.tries), rng)
        for kind in kinds:
            result.add(problem, kind)
        victim.remove()
    inside = sum(times for kind, times in result.details.items() if kind.endswith("within a save"))
    result.details["share within a save"] = f"{inside / max(result.tries, 1):.2f}"
    return result


def kill_and_resume(victim: Run, through: Run, ranks: int, kills: int, rng: random.Random) -> tuple[list[str], str]:
    """Return (for each kill, where it struck; what was wrong with the run's end)."""
    kinds: list[str] = []
    for _ in range(kills):
        started = victim.start(ranks=ranks)
        if wait_for_moment(started, victim, rng):
            order = list(range(ranks))
            rng.shuffle(order)
            for rank in order:
                started.send(signal.SIGKILL, rank)
            codes = started.wait().codes
            where = "within a save" if victim.is_saving() else "elsewhere"
            if -signal.SIGKILL in codes:
                kinds.append(f"{ranks} rank{'s' * (ranks > 1)}, {where}")
        else:
            started.wait()
            break
    ended = victim.finish(ranks=ranks)
    if set(ended.codes) != {0}:
        return kinds, f"did not resume: {ended.tail()}"
    left = victim.leftovers()
    return kinds, victim.differs_from(through) or (f"left {left}" if left else "")


def wait_for_moment(started: Started, victim: Run, rng: random.Random) -> bool:
    """Wait for a random moment of the run, or of a save; return whether the run still lasts."""
    if rng.random() < 0.55:
        time.sleep(rng.uniform(0.0, 1.5))
    else:
        saves = rng.randrange(1, 7)
        for _ in range(saves):  # the beginning of the n-th save from now on
            started.wait_for(lambda: not victim.is_saving())
            if not started.wait_for(victim.is_saving):
                break
        time.sleep(rng.uniform(0.0, 0.006))
    return started.alive()
