"""F10: a loader's worker that is killed, raises, hangs or is stopped, while it reads one example."""

from __future__ import annotations

import random
from pathlib import Path

from faults import victims
from faults.runs import Bench, Ended, Result

SETTINGS: dict[str, object] = {"train.max_steps": 12, "eval.every_steps": 4, "data.num_workers": 2}
TIMEOUT = 4  # distributed.timeout_seconds where a worker hangs
SECONDS = 30.0
ACTIONS = ("kill", "exit", "bug", "mistake", "sleep", "stop")


def run(count: int, seed: int, folder: Path) -> Result:
    """Do each action `count` times, at random examples."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    ids = training_ids(bench, folder)
    for action in ACTIONS:
        for _ in range(count):
            hangs = action in ("sleep", "stop")
            example = rng.choice(ids)
            # One example a micro-batch, so that the example is named and not its step alone.
            more = {"distributed.timeout_seconds": TIMEOUT} if hangs else {}
            run = bench.run(SETTINGS | {"train.micro_batch_size": 1} | more)
            patch = victims.ACTIONS[action]
            started = run.start(in_child=lambda patch=patch, name=example: victims.in_worker(patch, name))
            ended = started.wait(SECONDS)
            resumed = run.finish()
            problem = check(ended, example, action, hangs)
            if not problem and resumed.code != 0:
                problem = f"did not resume: {resumed.tail()}"
            result.add(problem, action)
            run.remove()
    return result


def check(ended: Ended, example: str, action: str, hangs: bool) -> str:
    """Return what was wrong with the end of a run whose worker failed."""
    if ended.code is None:
        return f"did not end within {SECONDS:g} s: {ended.tail()}"
    if ended.code == 0:
        return "went on as if nothing had happened"
    if example not in ended.err:
        return f"did not name example {example}: {ended.tail()}"
    if action == "mistake" and not ended.has_sentence():
        return f"not one sentence: {ended.tail()}"
    if hangs and "File " not in ended.err:
        return f"no stacks: {ended.tail()}"
    return ""


def training_ids(bench: Bench, folder: Path) -> list[str]:
    """Return the ids of training examples, of which r0 is no part of another id."""
    file = folder / "ids"
    bench.run({"train.max_steps": 7, "eval.every_steps": 7}).finish(in_child=lambda: victims.note_ids(file))
    from faults.ranks import read_ids

    names = {name for _, ids in read_ids(file.with_name("ids.0")) for name in ids}
    return sorted(name for name in names if len(name) == 4)
