"""F3: truncated files and flipped bits, of every file of a run folder."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from support.runs import assert_same_tensors

from engine import checkpoint
from faults import injector
from faults.crashes import strike
from faults.runs import Bench, Result, Run

# Three saves of last/, of which the third never came: last/ is of step 4, previous/ of step 2.
SETTINGS: dict[str, object] = {"train.max_steps": 6, "eval.every_steps": 2, "eval.metric": "loss"}
TRUNCATIONS = 4  # a truncation for so many flipped bits
RESUMES = 8  # of the damages of a file, so many are followed by a resume


def damage(content: bytes, kind: str, rng: random.Random) -> bytes:
    """Return the content of a file, truncated or with a flipped bit."""
    if kind == "truncated":
        return content[: rng.randrange(len(content))]
    place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def run(count: int, seed: int, folder: Path) -> Result:
    """Flip `count` bits of each file of last/, truncate it at a quarter as many places, resume from some of these."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    begun, through = make_interrupted(bench, folder), bench.uninterrupted(SETTINGS)
    kinds = ["bit"] * count + ["truncated"] * max(1, count // TRUNCATIONS)
    for path in sorted((begun.folder / checkpoint.LAST).iterdir()):
        whole = path.read_bytes()
        for kind in kinds:
            path.write_bytes(damage(whole, kind, rng))
            found = checkpoint.verify(begun.folder / checkpoint.LAST)
            result.add(None if found else f"{path.name} was not noticed", f"{kind}, found")
        path.write_bytes(whole)
        for kind in ("bit", "truncated") * min(RESUMES // 2, count):
            result.add(
                resume_without(begun, through, f"last/{path.name}", kind, rng), f"{kind}, resumed from previous/"
            )
    for kind in kinds[:: max(1, count // RESUMES)]:
        result.add(resume_with_log(begun, through, kind, rng), f"{kind}, in the log, resumed")
    return result


def make_interrupted(bench: Bench, folder: Path) -> Run:
    """Return a run that was killed between its second and its third save of last/."""
    injector_calls = folder / "calls"
    run = bench.run(SETTINGS)
    run.finish(in_child=lambda: injector.arm(injector.COUNT, 0, run.folder, calls=injector_calls))
    name = f"rename /{checkpoint.WRITING}{checkpoint.LAST}"
    places = [i for i, call in enumerate(injector_calls.read_text().splitlines()) if call == name]
    begun = bench.run(SETTINGS)
    begun.finish(in_child=strike(begun, injector.KILL, places[1] + 4))
    if begun.step() != 4:
        raise RuntimeError(f"the run was killed at step {begun.step()}")
    return begun


def resume_without(begun: Run, through: Run, name: str, kind: str, rng: random.Random) -> str:
    """Damage a file of a copy of the run and resume it; return what went wrong."""
    run = begun.bench.run(SETTINGS)
    shutil.copytree(begun.folder, run.folder)
    file = run.folder / name
    file.write_bytes(damage(file.read_bytes(), kind, rng))
    ended = run.finish()
    problem = ""
    if ended.code != 0:
        problem = f"{name}: did not resume: {ended.tail()}"
    elif f"resuming from {run.folder / checkpoint.PREVIOUS}" not in ended.out:
        problem = f"{name}: was not said"
    problem = problem or run.differs_from(through)
    run.remove()
    return problem


def resume_with_log(begun: Run, through: Run, kind: str, rng: random.Random) -> str:
    """Damage metrics.jsonl of a copy of the run, which is no part of the state, and resume it."""
    run = begun.bench.run(SETTINGS)
    shutil.copytree(begun.folder, run.folder)
    file = run.folder / "metrics.jsonl"
    file.write_bytes(damage(file.read_bytes(), kind, rng))
    ended = run.finish()
    problem = "" if ended.code == 0 else f"metrics.jsonl: did not resume: {ended.tail()}"
    if not problem:
        assert_same_tensors(run.folder / "last/model.safetensors", through.folder / "last/model.safetensors")
    run.remove()
    return problem
