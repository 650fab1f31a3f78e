"""F6 to F9: ranks that exit, die, stop or raise; restarts by torchrun; a resume on another number of ranks."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from support.runs import logged_rows

from faults import victims
from faults.runs import Bench, Ended, Result, Run, prepare_ranks
from faults.torchrun import finish, start_torchrun

SETTINGS: dict[str, object] = {"train.max_steps": 12, "eval.every_steps": 4}
NO_DROPOUT: dict[str, object] = {"model.dropout.all": 0.0, "optim.lr": 1e-4}
TIMEOUT = 4  # distributed.timeout_seconds of a run with a rank that hangs
DEATH, STOP = 10.0, 60.0  # seconds until all ranks are down: torchrun itself waits 30 s for a stopped process
CHANGES = ((2, 1), (1, 2), (4, 3), (3, 4))
PLACES = ("Penalties.add_gradients_", "evaluate", "set_learning_rate", "seed_dropout", "checkpoint.save")


def end(count: int, seed: int, folder: Path) -> Result:
    """F6: one of 2 or 4 ranks exits, is killed or is stopped, under torchrun."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    slowest: dict[str, int] = {}
    for action in ("exit", "kill", "stop"):
        for i in range(count):
            ranks = (2, 4)[i % 2]
            run = bench.run(SETTINGS | {"distributed.timeout_seconds": TIMEOUT})
            victim, step = rng.randrange(ranks), rng.randrange(1, 12)
            started = start_torchrun(["-m", "faults.victims", action, str(victim), str(step), str(run.recipe)], ranks)
            lines = wait_for_step(started, step - 1)
            code, out, err, seconds = finish(started, STOP if action == "stop" else DEATH)
            problem = check_end(action, victim, code, lines + out, err)
            result.add(problem, f"{action}, {ranks} ranks")
            slowest[action] = max(round(seconds), slowest.get(action, 0))
            run.remove()
    result.details |= {f"slowest end after {action}": f"{seconds} s" for action, seconds in slowest.items()}
    return result


def wait_for_step(process, step: int) -> str:  # type: ignore[no-untyped-def]
    """Read the output until a step is logged; return it."""
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if step < 1 or re.match(rf"step +{step} ", line):
            break
    return "".join(lines)


def check_end(action: str, victim: int, code: int | None, out: str, err: str) -> str:
    """Return what was wrong with the end of all ranks; "" if nothing."""
    if code is None:
        return f"the other ranks did not end: {err[-300:]}"
    if code == 0:
        return "torchrun reported success"
    if action == "stop":
        named = re.search(rf"rank\D{{0,12}}\b{victim}\b", err)
        has_stacks = "File " in err and "line " in err
        return "" if named and has_stacks else f"rank {victim} was not named with stacks: {err[-600:]}"
    if not re.search(rf"rank\s*:\s*{victim} \(local_rank: {victim}\)", err):
        return f"rank {victim} was not named: {err[-300:]}"
    return ""


def restart(count: int, seed: int, folder: Path) -> Result:
    """F7: torchrun --max-restarts=3, with a rank that is killed in each of the first three attempts."""
    prepare_ranks()
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    for i in range(count):
        ranks = 1 + (i + 1) % 2
        through, run = bench.uninterrupted(SETTINGS, ranks), bench.run(SETTINGS)
        step = rng.randrange(1, 5)  # after a restart, as many steps are left
        arguments = ["-m", "faults.victims", "three deaths", str(rng.randrange(ranks)), str(step), str(run.recipe)]
        process = start_torchrun(arguments, ranks, ["--max-restarts", "3"])
        code, _, err, _ = finish(process, 120.0)
        problem = f"code {code}: {err[-400:]}" if code != 0 else run.differs_from(through)
        result.add(problem, f"three deaths, {ranks} rank{'s' * (ranks > 1)}")
        run.remove()
    return result


def resize(count: int, seed: int, folder: Path) -> Result:
    """F8: a run on some ranks is stopped and resumed on others: the same examples, losses equal to 1e-6."""
    prepare_ranks()
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    settings = SETTINGS | NO_DROPOUT
    for before, after in CHANGES:
        expected = bench.run(settings)
        ids = folder / f"ids{before}{after}"
        expected.finish(in_child=lambda ids=ids: victims.note_ids(ids / "through") or ids.mkdir(exist_ok=True))
        for _ in range(count):
            step = rng.randrange(2, 11)
            result.add(resize_once(bench, settings, (before, after), step, expected, ids), f"{before} to {after} ranks")
    return result


def resize_once(
    bench: Bench, settings: dict[str, object], ranks: tuple[int, int], step: int, expected: Run, ids: Path
) -> str:
    """Kill a run on ranks[0] ranks at a step, resume it on ranks[1]; return what differs from the run on one rank."""
    run = bench.run(settings)
    for file in ids.glob("run.*"):
        file.unlink()
    note = lambda: victims.note_ids(ids / "run")  # noqa: E731
    run.finish(ranks=ranks[0], in_child=lambda: (note(), victims.at_step("kill", ranks[0] - 1, step)))
    ended = run.finish(ranks=ranks[1], in_child=note)
    problem = "" if set(ended.codes) == {0} else f"did not resume: {ended.tail()}"
    if not problem:
        problem = compare_losses(run, expected) or compare_ids(ids)
    run.remove()
    return problem


def compare_losses(run: Run, expected: Run) -> str:
    ours, theirs = (
        {row["step"]: row["loss"] for row in logged_rows(each.folder) if "loss" in row} for each in (run, expected)
    )
    if ours.keys() != theirs.keys():
        return f"other steps: {sorted(ours)}"
    worst = max(abs(ours[step] / theirs[step] - 1) for step in ours)
    return "" if worst < 2e-6 else f"a loss differs by {worst:.1e}"


def compare_ids(ids: Path) -> str:
    """Return which step of the run had other examples than the run on one rank, in any of its two parts."""
    expected = {step: sorted(names) for step, names in read_ids(ids / "through.0")}
    for part in ("run",):
        steps: dict[int, list[list[str]]] = {}
        for file in sorted(ids.glob(f"{part}.*")):
            for step, names in read_ids(file):
                steps.setdefault(step, []).append(names)
        for step, shares in steps.items():
            if step not in expected:
                continue  # fetched ahead
            seen = {name for names in shares for name in names}
            if seen != set(expected[step]):
                return f"step {step + 1} had other examples"
    return ""


def read_ids(file: Path) -> list[tuple[int, list[str]]]:
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]  # type: ignore[misc]


def fail(count: int, seed: int, folder: Path) -> Result:
    """F9: an exception on one of two ranks, anywhere in the loop; a seventh of them under torchrun."""
    prepare_ranks()
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    for i in range(count):
        action, rank, place = ("bug", "mistake")[i % 2], rng.randrange(2), rng.choice(PLACES)
        step = 1 + (rng.randrange(2) if place in ("evaluate", "checkpoint.save") else rng.randrange(11))
        run = bench.run(SETTINGS)
        ended = run.finish(ranks=2, in_child=lambda a=action, r=rank, s=step, p=place: victims.at_step(a, r, s, p))
        result.add(check_failure(ended, action, rank), f"{action} in {place}")
        run.remove()
    for i in range(max(1, count // 7)):
        action, rank = ("bug", "mistake")[i % 2], rng.randrange(2)
        run = bench.run(SETTINGS)
        arguments = ["-m", "faults.victims", action, str(rank), str(rng.randrange(1, 12)), str(run.recipe)]
        code, _, err, _ = finish(start_torchrun(arguments, 2), 60.0)
        result.add(check_screen(code, err, action), f"{action}, under torchrun")
        run.remove()
    return result


def check_failure(ended: Ended, action: str, rank: int) -> str:
    """Return what was wrong with the end of two ranks, one of which raised."""
    if None in ended.codes:
        return f"hung: {ended.tail()}"
    if 0 in ended.codes:
        return f"a rank reported success: {ended.tail()}"
    if "only this rank knows this" not in ended.err:
        return f"the error was not printed: {ended.tail()}"
    expected = 1 if action == "bug" else 2
    return "" if ended.codes[rank] == expected else f"another exit code: {ended.tail()}"


def check_screen(code: int | None, err: str, action: str) -> str:
    """Return whether what torchrun printed at last is the error of the rank that raised."""
    if code in (None, 0):
        return f"code {code}: {err[-300:]}"
    if action == "bug":
        place = err.rfind("Root Cause")
        return "" if "only this rank knows this" in err[place:] else f"not the last: {err[-400:]}"
    if err.count("only this rank knows this") != 1:
        return f"printed {err.count('only this rank knows this')} times: {err[-600:]}"
    lines = [line for line in err.splitlines() if line.strip()]
    return "" if "only this rank knows this" in lines[-1] else f"not the last line: {lines[-1][:200]}"
