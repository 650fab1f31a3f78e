"""F5: SIGTERM, SIGINT and SIGUSR1 at random times: to one process, to one of two ranks, to the group, to torchrun."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

from faults.runs import Bench, Ended, Result, Run, prepare_ranks
from faults.torchrun import start_torchrun

SETTINGS: dict[str, object] = {"train.max_steps": 40, "eval.every_steps": 20}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TARGETS = ("the process", "one rank", "the group", "the group, with workers", "the process, with workers")
SECONDS = 30.0  # from the signal to the end
LATER = (
    3  # steps that may be logged between the signal and the last one: the one under way, and what was not printed yet
)


def run(count: int, seed: int, folder: Path) -> Result:
    """Send `count` signals to each kind of target, and a twelfth as many to torchrun."""
    prepare_ranks()
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    for target in TARGETS:
        for i in range(count):
            number = SIGNALS[i % 3]
            result.add(signal_and_resume(bench, target, number, rng), f"{number.name} to {target}")
    for _ in range(max(1, count // 4)):
        result.add(interrupt_twice(bench, rng), "SIGINT twice")
    for i in range(max(1, count // 12)):
        number = SIGNALS[i % 3]
        result.add(signal_torchrun(bench, number, rng), f"{number.name} to torchrun")
    return result


def signal_and_resume(bench: Bench, target: str, number: signal.Signals, rng: random.Random) -> str:
    """Send a signal once, resume, compare; return what went wrong."""
    ranks = 2 if target == "one rank" else 1
    settings = SETTINGS | ({"data.num_workers": 2} if "workers" in target else {})
    through, run = bench.uninterrupted(settings, ranks), bench.run(settings)
    started = run.start(ranks=ranks)
    # The two ranks join and train; before that, torchrun ends the one whose partner was ended.
    if ranks == 2 or rng.random() < 0.7:
        started.wait_for(lambda: "\nstep " in started.printed())
        time.sleep(rng.uniform(0.0, 0.4))
    else:
        time.sleep(rng.uniform(0.0, 0.6))
    before = last_step(started.printed())
    started.send(number, None if "group" in target else rng.randrange(ranks))
    ended = started.wait(SECONDS)
    problem = check_stop(run, ended, number, before) or resume(run, through, ranks)
    run.remove()
    return problem


def check_stop(run: Run, ended: Ended, number: int, before: int) -> str:
    """Return what was wrong with the end by a signal; "" if nothing."""
    if None in ended.codes:
        return f"did not end within {SECONDS:g} s: {ended.tail()}"
    early = {-number} | ({130} if number == signal.SIGINT else set())  # before the loop listens
    allowed = {0, 128 + number, 143} if len(ended.codes) > 1 else {0, 128 + number}
    if not set(ended.codes) <= allowed | (early if before < 0 else set()):
        return f"another exit code: {ended.tail()}"
    if "Traceback" in ended.err and ended.code not in early:
        return f"a traceback: {ended.tail()}"
    stopped = re.search(r"stopped at step (\d+)", ended.out)
    if ended.code in allowed - {0} and stopped and run.step() != int(stopped[1]):
        return f"stopped at step {stopped[1]}, the checkpoint is of step {run.step()}"
    if ended.code in allowed - {0} - early and not stopped:
        return f"did not say where it stopped: {ended.tail()}"
    if stopped and int(stopped[1]) > before + LATER:
        return f"the signal came at step {before}, the run ended at {stopped[1]}"
    return ""


def interrupt_twice(bench: Bench, rng: random.Random) -> str:
    """Send SIGINT twice; the second one ends the process at once."""
    through, run = bench.uninterrupted(SETTINGS), bench.run(SETTINGS)
    started = run.start()
    started.wait_for(lambda: "\nstep " in started.printed())
    started.send(signal.SIGINT, 0)
    time.sleep(rng.uniform(0.0, 0.03))
    started.send(signal.SIGINT, 0)
    ended = started.wait(5.0)
    problem = "" if ended.code in (-signal.SIGINT, 130, 0) else f"ended otherwise: {ended.tail()}"
    problem = problem or resume(run, through, 1)
    run.remove()
    return problem


def signal_torchrun(bench: Bench, number: int, rng: random.Random) -> str:
    """Send a signal to torchrun with two ranks."""
    through, run = bench.uninterrupted(SETTINGS, 2), bench.run(SETTINGS)
    process = start_torchrun(["-m", "engine.train", str(run.recipe)], ranks=2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    time.sleep(rng.uniform(0.0, 0.3))
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"torchrun did not end within {SECONDS:g} s"
    problem = "" if process.returncode != 0 or "all steps done" in out else f"code {process.returncode}"
    if "stopped at step" not in out and "all steps done" not in out:
        problem = f"did not say where it stopped: {err[-300:]}"
    problem = problem or resume(run, through, 2)
    run.remove()
    return problem


def resume(run: Run, through: Run, ranks: int) -> str:
    ended = run.finish(ranks=ranks)
    return run.differs_from(through) if set(ended.codes) == {0} else f"did not resume: {ended.tail()}"


def last_step(out: str) -> int:
    """Return the last step of training that was printed; -1 if none was."""
    steps = re.findall(r"^step +(\d+) +loss", out, re.MULTILINE)
    return int(steps[-1]) if steps else -1
