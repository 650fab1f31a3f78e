"""F2, F4: a process that ends, or is refused, at the n-th system call that changes its run folder, for every n."""

from __future__ import annotations

import errno
import random
import shutil
import signal
from pathlib import Path

from engine import checkpoint
from faults import injector, mounts
from faults.runs import Bench, Ended, Result, Run

# Two evaluations, both of them the best: a first save of best/ and last/, and one that replaces them.
SETTINGS: dict[str, object] = {"train.max_steps": 4, "eval.every_steps": 2, "eval.metric": "loss"}
MOUNTS = 25  # tries of each kind on mounted file systems, at most
CHECKPOINTS = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)


def crash(count: int, seed: int, folder: Path) -> Result:
    """F2: kill the process before its n-th call, or cut the n-th write short. count: at most so many n of each kind."""
    bench, result = Bench(folder), Result()
    calls = list_calls(bench, folder)
    problem = check_flushes(calls)
    result.add(problem, "a save flushes every file before it renames")
    kills = [(injector.KILL, n) for n in range(1, len(calls) + 1)]
    shorts = [(injector.SHORT, n) for n, call in enumerate(calls, 1) if call.split()[0] in ("write", "sendfile")]
    for mode, number in sample(kills, count, seed) + sample(shorts, count // 4, seed):
        run, name = bench.run(SETTINGS), calls[number - 1].split()[0]
        ended = run.finish(in_child=strike(run, mode, number))
        expected = 0 if mode == injector.SHORT else -signal.SIGKILL
        problem = f"ended otherwise: {ended.tail()}" if ended.code != expected else check_valid(run)
        kind = f"killed before {name}" if mode == injector.KILL else f"{name} cut short"
        result.add(describe(problem or resume(run, bench), calls, number), kind)
        run.remove()
    return result


def refuse(count: int, seed: int, folder: Path) -> Result:
    """F4: the n-th call fails by EIO or ENOSPC, alone or with all after it; a folder that becomes read-only.

    This happens to a new run, and to one that is resumed. count: at most so many of each. Then the same on file systems
    that are full or read-only (mounts.py), where such may be mounted.
    """
    bench, result = Bench(folder), Result()
    begun = make_begun(bench, folder)
    for before in (None, begun):
        calls = list_calls(bench, folder, before)
        every = range(1, len(calls) + 1)
        alone = [(injector.FAIL, code, n) for code in (errno.EIO, errno.ENOSPC) for n in every]
        lasting = [(injector.FAIL_FROM, code, n) for code in (errno.ENOSPC, errno.EROFS) for n in every]
        for mode, code, number in sample(alone, count, seed) + sample(lasting, count, seed):
            run = copy_of(bench, before)
            ended = run.finish(in_child=strike(run, mode, number, code))
            problem = check_refusal(run, ended, mode, calls[number - 1])
            kind = errno.errorcode[code] + ("" if mode == injector.FAIL else " from then on")
            kind += ", resumed run" if before else ", new run"
            kind += ", went on" if ended.code == 0 else ", ended with a sentence"
            result.add(describe(problem or check_valid(run) or resume(run, bench), calls, number), kind)
            run.remove()
    mounts.run(bench, min(count, MOUNTS), random.Random(seed), result)
    return result


def make_begun(bench: Bench, folder: Path) -> Run:
    """Return a run that was killed right after its first checkpoint."""
    calls = list_calls(bench, folder)
    after = next(i for i, call in enumerate(calls) if call == f"rename /{checkpoint.WRITING}{checkpoint.LAST}") + 3
    run = bench.run(SETTINGS)
    run.finish(in_child=strike(run, injector.KILL, after))
    if run.step() < 0:
        raise RuntimeError("the run was killed before it had a checkpoint")
    return run


def copy_of(bench: Bench, before: Run | None) -> Run:
    """Return a new run, in a copy of the folder of another one if there is one."""
    run = bench.run(SETTINGS)
    if before is not None:
        shutil.copytree(before.folder, run.folder)
    return run


def check_refusal(run: Run, ended: Ended, mode: int, call: str) -> str:
    """Return what was wrong with the end of a run whose call was refused; "" if nothing."""
    if ended.code != 0 and not ended.has_sentence():
        return f"ended otherwise: {ended.tail()}"
    # A file that could not be removed stays; the next start removes it.
    can_remove = mode == injector.FAIL and call.split()[0] not in ("unlink", "rmdir")
    left = run.leftovers()
    return f"left {left}" if left and can_remove else ""


def check_valid(run: Run) -> str:
    """Return which checkpoint of a run is damaged; "" if all that exist are whole."""
    for name in CHECKPOINTS:
        if (run.folder / name).exists() and (problem := checkpoint.verify(run.folder / name)):
            return problem
    return ""


def resume(run: Run, bench: Bench) -> str:
    """Resume a run; return how its end differs from that of an undisturbed one."""
    ended = run.finish()
    if ended.code != 0:
        return f"did not resume: {ended.tail()}"
    left = run.leftovers()
    return run.differs_from(bench.uninterrupted(SETTINGS)) or (f"left {left} after the resume" if left else "")


def strike(run: Run, mode: int, number: int, failure: int = 0):  # type: ignore[no-untyped-def]
    """Return what a child calls to arm the injector for its run folder."""
    return lambda: injector.arm(mode, number, run.folder, failure)


def list_calls(bench: Bench, folder: Path, before: Run | None = None) -> list[str]:
    """Return the calls of an undisturbed run, or of one that continues `before`, each as "name path"."""
    injector.load()
    run, file = copy_of(bench, before), folder / "calls"
    file.unlink(missing_ok=True)
    ended = run.finish(in_child=lambda: injector.arm(injector.COUNT, 0, run.folder, calls=file))
    if ended.code != 0:
        raise RuntimeError(f"the run with an idle injector failed: {ended.tail()}")
    return file.read_text(encoding="utf-8").splitlines()


def check_flushes(calls: list[str]) -> str:
    """Return which file of a save was renamed into place before its last write was flushed; "" if none was."""
    unflushed: set[str] = set()
    for call in calls:
        name, _, path = call.partition(" ")
        save = path.split("/")[1] if path.count("/") > 1 else ""
        if not save.startswith(checkpoint.WRITING):
            done = [file for file in unflushed if file.split("/")[1] == path.lstrip("/")]
            if name == "rename" and done:
                return f"{done[0]} was renamed before it was flushed"
        elif name in ("write", "sendfile", "copy_file_range", "ftruncate", "open"):
            unflushed.add(path)
        elif name == "rename":  # by safetensors, to its own name
            unflushed = {file for file in unflushed if file != path}
            unflushed |= {f"/{save}/?"}
        elif name == "fsync":
            unflushed -= {path, f"/{save}/?"} if path.endswith(".safetensors") else {path}
    return ""


def describe(problem: str, calls: list[str], number: int) -> str:
    return f"call {number} ({calls[number - 1]}): {problem}" if problem else ""


def sample(cases: list[tuple[int, ...]], count: int, seed: int) -> list[tuple[int, ...]]:
    """Return `count` cases by chance, or all of them where there are not more."""
    return cases if count >= len(cases) else random.Random(seed).sample(cases, count)
