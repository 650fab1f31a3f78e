"""F6 to F9: ranks that exit, die, stop or raise; restarts by torchrun; a resume on another number of ranks."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import re
import threading
import time
from pathlib import Path

import numpy as np
from support.runs import assert_same_tensors, logged_rows

from engine.config import Config
from faults import victims
from faults.runs import Bench, Ended, Result, Run, prepare_ranks
from faults.torchrun import finish, start_torchrun

SETTINGS: dict[str, object] = {"train.max_steps": 12, "eval.every_steps": 4}
NO_DROPOUT: dict[str, object] = {"model.dropout.all": 0.0, "optim.lr": 1e-4}
TIMEOUT = 4  # distributed.timeout_seconds of a run with a rank that hangs
# Seconds until the other ranks are down. A rank that does not answer is noticed by the beats of its heartbeat, one a
# second: its last one, those of the rank that watches it and of the others who hear of it add up to MARGIN.
DEATH, MARGIN = 10.0, 4.0
KILL_WAIT = 30.0  # seconds that torchrun gives a stopped process before it kills it; its own, and no part of the above
# torchrun itself then writes its report and leaves; its own too, and on a busy machine no question of a second or two.
LEAVE = 20.0
TOLERANCE = 1e-6  # relative, of a loss
Place = tuple[int, str]  # ranks and strategy
CHANGES: dict[str, tuple[tuple[Place, Place], ...]] = {
    "ddp": tuple(((before, "ddp"), (after, "ddp")) for before, after in ((2, 1), (1, 2), (4, 3), (3, 4))),
    "fsdp": (
        ((2, "fsdp"), (1, "ddp")),
        ((1, "ddp"), (2, "fsdp")),
        ((4, "fsdp"), (3, "fsdp")),
        ((2, "ddp"), (2, "fsdp")),
        ((2, "fsdp"), (2, "ddp")),
    ),
}
PLACES = ("Penalties.add_gradients_", "evaluate", "set_learning_rate", "seed_dropout", "checkpoint.save")


def end(count: int, seed: int, folder: Path, strategy: str = "ddp") -> Result:
    """F6: one of 2 or 4 ranks exits, is killed or is stopped, under torchrun."""
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    slowest: dict[str, float] = {}
    for action in ("exit", "kill", "stop"):
        for i in range(count):
            ranks = (2, 4)[i % 2]
            run = bench.run(SETTINGS | {"distributed.timeout_seconds": TIMEOUT, "distributed.strategy": strategy})
            victim, step = rng.randrange(ranks), rng.randrange(1, 12)
            started = start_torchrun(["-m", "faults.victims", action, str(victim), str(step), str(run.recipe)], ranks)
            watch = Watch(run.logs, ranks, victim)
            code, out, err, _ = finish(started, 60.0 + DEATH + KILL_WAIT + LEAVE)  # from its start, imports included
            seconds = {"others down": watch.finish(), "torchrun down": time.monotonic() - watch.acted()}
            problem = check_end(action, victim, code, out, err) or check_seconds(action, **seconds)
            result.add(problem, f"{action}, {ranks} ranks")
            for what, took in seconds.items():
                kind = f"{action}: {what} after at most"
                slowest[kind] = max(took, slowest.get(kind, 0.0))
            run.remove()
    result.details |= {kind: f"{took:.1f} s" for kind, took in slowest.items()}
    return result


class Watch(threading.Thread):
    """Notes when each rank of a torchrun ends. The ranks write their numbers and the time of the fault into `logs`."""

    def __init__(self, logs: Path, ranks: int, victim: int):
        super().__init__(daemon=True)
        self.logs, self.others, self.over = logs, [rank for rank in range(ranks) if rank != victim], False
        self.ended: dict[int, float] = {}
        self.start()

    def run(self) -> None:
        while not self.over and len(self.ended) < len(self.others):
            for rank in self.others:
                file = self.logs / f"process.{rank}"
                if rank not in self.ended and file.is_file() and has_ended(file.read_text()):
                    self.ended[rank] = time.monotonic()
            time.sleep(0.02)

    def acted(self) -> float:
        """Return the time of the fault, or of now where it did not come."""
        file = self.logs / "acted"
        return float(file.read_text()) if file.is_file() else time.monotonic()

    def finish(self) -> float:
        """Return the seconds from the fault until all other ranks had ended; torchrun has ended by now."""
        self.over = True
        self.join()
        return max(self.ended.get(rank, time.monotonic()) for rank in self.others) - self.acted()


def has_ended(process: str) -> bool:
    """Return whether a process has ended; "": it has not written its number yet."""
    if not process:
        return False
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def check_seconds(action: str, **seconds: float) -> str:
    """Return which seconds were too many."""
    down = TIMEOUT + MARGIN if action == "stop" else DEATH
    waits = LEAVE + (KILL_WAIT if action == "stop" else 0.0)
    limits = {"others down": down, "torchrun down": down + waits}
    late = [
        f"{what} after {seconds[what]:.1f} s, not {limit:g}" for what, limit in limits.items() if seconds[what] > limit
    ]
    return ", ".join(late)


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


def restart(count: int, seed: int, folder: Path, strategy: str = "ddp") -> Result:
    """F7: torchrun --max-restarts=3, with a rank that is killed in three attempts; for a count of 1, in one."""
    prepare(strategy)
    deaths = "three deaths" if count > 1 else "one death"
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    settings = SETTINGS | {"distributed.strategy": strategy}
    for i in range(count):
        ranks = (2, 4)[i % 2] if strategy == "fsdp" else 1 + (i + 1) % 2
        through, run = bench.uninterrupted(settings, ranks), bench.run(settings)
        step = rng.randrange(1, 5)  # after a restart, as many steps are left
        arguments = ["-m", "faults.victims", deaths, str(rng.randrange(ranks)), str(step), str(run.recipe)]
        process = start_torchrun(arguments, ranks, ["--max-restarts", "3"])
        code, _, err, _ = finish(process, 120.0 * ranks)
        differs = shards_differ if strategy == "fsdp" else Run.differs_from
        problem = f"code {code}: {err[-400:]}" if code != 0 else differs(run, through)
        result.add(problem, f"{deaths}, {ranks} rank{'s' * (ranks > 1)}")
        run.remove()
    return result


def prepare(strategy: str) -> None:
    """Import what ranks import at their first use, once before the forks."""
    prepare_ranks()
    if strategy == "fsdp":
        importlib.import_module("torch.distributed.fsdp")
        importlib.import_module("torch.distributed.checkpoint")


def shards_differ(run: Run, other: Run) -> str:
    """Return how the end of a sharded run differs from that of another one on as many ranks; "" if it is the same."""
    files, others = (
        sorted(path.relative_to(each.folder) for path in each.folder.rglob("*.safetensors")) for each in (run, other)
    )
    if files != others or not files:
        return f"the end has the files {[*map(str, files)]}, not {[*map(str, others)]}"
    try:
        for file in files:
            assert_same_tensors(run.folder / file, other.folder / file)
    except AssertionError as error:
        return f"the end differs: {str(error)[:300]}"
    ours, theirs = (
        [(each.folder / name / "state.json").read_text() for name in ("last", "best")] for each in (run, other)
    )
    if ours != theirs:
        return "the end has other counters"
    return "" if logged_rows(run.folder) == logged_rows(other.folder) else "the log differs"


def resize(count: int, seed: int, folder: Path, strategy: str = "ddp") -> Result:
    """F8: a run on some ranks is stopped and resumed on others, or with another strategy.

    It has the same examples, and losses equal to 1e-6.
    """
    prepare(strategy)
    bench, rng, result, largest = Bench(folder), random.Random(seed), Result(), 0.0
    settings = SETTINGS | NO_DROPOUT
    for number, (before, after) in enumerate(CHANGES[strategy]):
        expected = bench.run(settings)
        ids = folder / f"ids{number}"
        ids.mkdir()
        expected.finish(in_child=lambda ids=ids: victims.note_ids(ids / "through"))
        for _ in range(count):
            step = rng.randrange(2, 11)
            problem, worst = resize_once(bench, settings, (before, after), step, expected, ids)
            kind = f"{before[0]} to {after[0]} ranks"
            if strategy != "ddp":
                kind = " to ".join(f"{name} {ranks}" if ranks > 1 else "1 rank" for ranks, name in (before, after))
            result.add(problem, kind)
            largest = max(largest, worst)
    result.details["largest difference of a loss, relative"] = f"{largest:.1e}"
    return result


def resize_once(
    bench: Bench, settings: dict[str, object], places: tuple[Place, Place], step: int, expected: Run, ids: Path
) -> tuple[str, float]:
    """Kill a run in places[0] at a step, resume it in places[1].

    Return (what was wrong, the largest relative difference of a loss from the run on one rank).
    """
    run = bench.run(settings)
    for file in ids.glob("part*"):
        file.unlink()
    parts = ids / "part1", ids / "part2"
    ranks = places[0][0], places[1][0]
    options = [f"--distributed.strategy={strategy}" for _, strategy in places]
    victim = ranks[0] - 1
    run.finish(
        options[0],
        ranks=ranks[0],
        in_child=lambda: (victims.note_ids(parts[0]), victims.at_step("kill", victim, step)),
    )
    begin = max(0, run.step())
    ended = run.finish(options[1], ranks=ranks[1], in_child=lambda: victims.note_ids(parts[1]))
    if set(ended.codes) != {0}:
        return f"did not resume: {ended.tail()}", 0.0
    last = run.config.train.max_steps
    problem, worst = compare_losses(run, expected)
    problem = problem or compare_ids(ids / "through", 1, (0, last), ids / "through", run.config)
    problem = problem or compare_ids(parts[0], ranks[0], (0, step), ids / "through", run.config)
    problem = problem or compare_ids(parts[1], ranks[1], (begin, last), ids / "through", run.config)
    run.remove()
    return problem, worst


def compare_losses(run: Run, expected: Run) -> tuple[str, float]:
    """Return (which steps or losses in the log differ, the largest relative difference of a loss)."""
    ours, theirs = (
        {row["step"]: row["loss"] for row in logged_rows(each.folder) if "loss" in row} for each in (run, expected)
    )
    if ours.keys() != theirs.keys():
        return f"other steps: {sorted(ours)}", 0.0
    worst = max(abs(ours[step] / theirs[step] - 1) for step in ours)
    return "" if worst < TOLERANCE else f"a loss differs by {worst:.1e}", worst


def compare_ids(file: Path, ranks: int, steps: tuple[int, int], through: Path, config: Config) -> str:
    """Return which of these steps did not have the examples, in the order, that the seed determines; "": all had.

    The examples of a step are a slice of the epoch's permutation, sorted by length and dealt to the ranks in turn: so
    those of the ranks, taken in turn, are those of one rank. Each rank reads each step once, one after the other.
    """
    dealt = [read_ids(file.with_name(f"{file.name}.{rank}")) for rank in range(ranks)]
    names, single = read_names(through.with_name(f"{through.name}.0")), dict(read_ids(through.with_name("through.0")))
    begin, end = steps
    for rank, share in enumerate(dealt):
        if [step for step, _ in share][: end - begin] != list(range(begin, end)):
            return f"rank {rank} read the steps {[step for step, _ in share]}, not {begin} to {end - 1}"
    for i, step in enumerate(range(begin, end)):
        shares = [share[i][1] for share in dealt]
        taken = [name for turn in itertools.zip_longest(*shares) for name in turn if name is not None]
        if taken != single[step]:
            return f"step {step + 1} had other examples, or in another order, than on one rank"
        if sorted(taken) != sorted(chosen(names, step, config)):
            return f"step {step + 1} had other examples than the permutation of its epoch says"
    return ""


def chosen(names: list[str], step: int, config: Config) -> list[str]:
    """Return the examples of a step: NumPy's permutation by (seed, epoch), in slices of a global batch."""
    size = config.train.global_batch_size
    epoch, place = divmod(step, math.ceil(len(names) / size))
    order = np.random.default_rng([config.run.seed, epoch]).permutation(len(names))
    return [names[i] for i in order[place * size : (place + 1) * size]]


def read_names(file: Path) -> list[str]:
    """Return the ids of the training data that a rank noted."""
    names: list[str] = json.loads(file.read_text().splitlines()[0])
    return names


def read_ids(file: Path) -> list[tuple[int, list[str]]]:
    """Return (step, ids) of each step that a rank noted."""
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()[1:]]  # type: ignore[misc]


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
    # torchrun ends by a traceback of its own; the rank's would name the exception. The sentence is the rank's and the
    # report's.
    if "DataError" in err or err.count("error: only this rank knows this") > 2:
        return f"not one sentence: {err[-600:]}"
    lines = [line for line in err.splitlines() if line.strip(" =")]
    return "" if "only this rank knows this" in lines[-1] else f"not the last line: {lines[-1][:200]}"
