"""F5: SIGTERM, SIGINT, SIGUSR1 and SIGHUP at random times, to one process, one of two ranks, the group or torchrun."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from faults import victims
from faults.runs import Bench, Ended, Result, Run, prepare_ranks
from faults.torchrun import start_torchrun

SETTINGS: dict[str, object] = {"train.max_steps": 40, "eval.every_steps": 20}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TARGETS = ("the process", "one rank", "the group", "the group, with workers", "the process, with workers")
SECONDS = 30.0  # from the signal to the end
AT_ONCE = 5.0  # seconds, from a second SIGINT to the end


def run(count: int, seed: int, folder: Path) -> Result:
    """Send `count` signals to each kind of target, and a twelfth as many to torchrun."""
    prepare_ranks()
    bench, rng, result = Bench(folder), random.Random(seed), Result()
    for target in TARGETS:
        for i in range(count):
            number = SIGNALS[i % len(SIGNALS)]
            result.add(signal_and_resume(bench, target, number, rng), f"{number.name} to {target}")
    for _ in range(max(1, count // 4)):
        result.add(interrupt_twice(bench, rng), "SIGINT twice")
    for i in range(max(1, count // 12)):
        number = SIGNALS[i % len(SIGNALS)]
        result.add(signal_torchrun(bench, number, rng), f"{number.name} to torchrun")
    return result


def signal_and_resume(bench: Bench, target: str, number: signal.Signals, rng: random.Random) -> str:
    """Send a signal once, resume, compare; return what went wrong."""
    ranks = 2 if target == "one rank" else 1
    settings = SETTINGS | ({"data.num_workers": 2} if "workers" in target else {})
    through, run = bench.uninterrupted(settings, ranks), bench.run(settings)
    note = run.logs / "signal"
    started = run.start(ranks=ranks, in_child=lambda: victims.note_signal(note))
    # The two ranks join and train; before that, torchrun ends the one whose partner was ended.
    if ranks == 2 or rng.random() < 0.7:
        started.wait_for(lambda: "\nstep " in started.printed())
        time.sleep(rng.uniform(0.0, 0.4))
    else:
        time.sleep(rng.uniform(0.0, 0.6))
    rank = rng.randrange(ranks)
    started.send(number, None if "group" in target else rank)
    ended = started.wait(SECONDS)
    problem = check_stop(run, ended, number, rank) or resume(run, through, ranks)
    run.remove()
    return problem


def check_stop(run: Run, ended: Ended, number: int, rank: int) -> str:
    """Return what was wrong with the end by a signal that a rank got; "" if nothing."""
    if None in ended.codes:
        return f"did not end within {SECONDS:g} s: {ended.tail()}"
    note = run.logs / f"signal.{rank}"
    if not note.is_file():  # the loop did not listen yet, or had ended
        usual = {0, -number, 128 + number}
        return "" if len(ended.codes) > 1 or ended.code in usual else f"another exit code: {ended.tail()}"
    at, last = int(note.read_text().split()[0]), run.config.train.max_steps
    if set(ended.codes) == {0} and at >= last - 1:
        return ""
    # A rank that stops because another one got a signal ends as by SIGTERM.
    expected = tuple(128 + (number if i == rank else signal.SIGTERM) for i in range(len(ended.codes)))
    if ended.codes != expected:
        return f"other exit codes than {expected}: {ended.tail()}"
    if "Traceback" in ended.err:
        return f"a traceback: {ended.tail()}"
    return check_step(run, ended.out, at)


def check_step(run: Run, out: str, at: int) -> str:
    """Return whether a run that got a signal after `at` steps has its checkpoint there, or one step later."""
    stopped = re.search(r"stopped at step (\d+)", out)
    if not stopped:
        return "it did not say where it stopped"
    if run.step() != int(stopped[1]):
        return f"stopped at step {stopped[1]}, the checkpoint is of step {run.step()}"
    return "" if run.step() - at in (0, 1) else f"the signal came after {at} steps, the checkpoint is of {run.step()}"


def interrupt_twice(bench: Bench, rng: random.Random) -> str:
    """Send SIGINT twice; the second one ends the process at once."""
    through, run = bench.uninterrupted(SETTINGS), bench.run(SETTINGS)
    started = run.start()
    started.wait_for(lambda: "\nstep " in started.printed())
    started.send(signal.SIGINT, 0)
    time.sleep(rng.uniform(0.0, 0.03))
    started.send(signal.SIGINT, 0)
    ended = started.wait(AT_ONCE)
    problem = "" if ended.code in (-signal.SIGINT, 130, 0) else f"ended otherwise: {ended.tail()}"
    problem = problem or resume(run, through, 1)
    run.remove()
    return problem


def signal_torchrun(bench: Bench, number: int, rng: random.Random) -> str:
    """Send a signal to torchrun with two ranks."""
    through, run = bench.uninterrupted(SETTINGS, 2), bench.run(SETTINGS)
    process = start_torchrun(["-m", "faults.victims", "nothing", "0", "1", str(run.recipe)], ranks=2)
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
    problem = check_torchrun(run, process.returncode, number, out, err) or resume(run, through, 2)
    run.remove()
    return problem


def check_torchrun(run: Run, code: int, number: int, out: str, err: str) -> str:
    """Return what was wrong with the end of torchrun and its two ranks; "" if nothing."""
    if code == 0 and "all steps done" in out:
        return ""
    # SIGUSR1 ends torchrun itself; its ranks notice, and stop as by SIGTERM. It passes the others on.
    passed = signal.SIGTERM if number == signal.SIGUSR1 else number
    expected = -number if number == signal.SIGUSR1 else 1
    ends: Sequence[int] = [int(file.read_text()) for file in sorted(run.logs.glob("end.*"))]
    if code != expected or list(ends) != [128 + passed] * 2:
        return f"torchrun ended with {code}, its ranks with {ends}: {err[-300:]}"
    return check_step(run, out, min(int(file.read_text().split()[0]) for file in run.logs.glob("signal.*")))


def resume(run: Run, through: Run, ranks: int) -> str:
    ended = run.finish(ranks=ranks)
    return run.differs_from(through) if set(ended.codes) == {0} else f"did not resume: {ended.tail()}"
