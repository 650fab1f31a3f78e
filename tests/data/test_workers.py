"""F10: the loader's workers ignore signals, die with their parent, and are named with their example when they fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import Batch, DataError, MicroBatching, training_steps
from data.workers import STOP_SIGNALS, LoaderStopped, WorkerError, note_example


class Examples:
    """Twelve examples, of which number 7 does something bad when it is read."""

    def __init__(self, bad=lambda: None):
        self.bad = bad
        self.ids = [f"r{i}" for i in range(12)]
        self.lengths = np.ones(12, dtype=np.int64)

    def __len__(self):
        return 12

    def batch(self, indices, epoch=None):
        for index in indices:
            note_example(int(index))
            if index == 7:
                self.bad()
        ids = tuple(self.ids[i] for i in indices)
        return Batch((), torch.zeros(1), None, 0, tuple(indices), ids)


def raise_data_error():
    raise DataError("picture.png is broken")


def divide_by_zero():
    return 1 / 0


def send(number):
    def bad():
        os.kill(os.getpid(), number)
        time.sleep(0.2)

    return bad


def read_all(bad, workers, **options):
    return list(islice(training_steps(Examples(bad), 4, 0, MicroBatching(), num_workers=workers, **options), 3))


@pytest.fixture(autouse=True)
def _no_worker_is_left():
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (raise_data_error, DataError, r"^picture.png is broken \(example id 'r7'\)$"),
        (divide_by_zero, RuntimeError, r"(?s)^in a loader worker, at example id 'r7'\n\nTraceback.*in divide_by_zero"),
        (
            send(signal.SIGKILL),
            WorkerError,
            r"^loader worker \d+ was killed by SIGKILL: it was reading example id 'r7",
        ),
        (send(signal.SIGSTOP), WorkerError, r"^no data of step \d for 2 s .*worker \d+ was reading example id 'r7' of"),
        (lambda: time.sleep(60), WorkerError, r"worker \d+ was reading example id 'r7' of step \d$"),
    ],
    ids=["data error", "bug", "killed", "stopped", "hanging"],
)
def test_f10_a_worker_that_fails_is_named_with_its_example(request, bad, kind, message, capfd):
    with pytest.raises(kind, match=message):
        read_all(bad, 2, timeout_seconds=2 if kind is WorkerError else 100)
    stacks = capfd.readouterr().err
    case = request.node.callspec.id
    assert ("in read_all" in stacks) == (case in ("stopped", "hanging"))
    assert ("in _worker_loop" in stacks) == (case == "hanging")  # one that was stopped cannot tell


def test_f10_a_read_that_hangs_in_this_process_ends_too(capfd):
    with pytest.raises(WorkerError, match=r"for 1 s .*: this process was reading example id 'r7' of step \d$"):
        read_all(lambda: time.sleep(60), 0, timeout_seconds=1)
    assert "in read_all" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_f05_a_stop_ends_a_wait_for_data(workers):
    with pytest.raises(LoaderStopped):
        read_all(lambda: time.sleep(60), workers, timeout_seconds=100, should_stop=lambda: True)


def test_f05_workers_ignore_the_signals_that_stop_a_run():
    def bad():
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)

    assert {x for step in read_all(bad, 1) for batch in step for x in batch.ids} == set(Examples().ids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_parent_that_is_killed():
    """This file, run by itself, is the parent. One worker is stopped, so that it cannot notice anything by itself."""
    root = Path(data.__file__).parent.parent
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if is_alive(pid)] == []


def be_killed_while_reading():
    threading.Timer(1, lambda: os.write(1, children_of(os.getpid()))).start()
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    read_all(send(signal.SIGSTOP), 2, timeout_seconds=100)


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_bytes()


def is_alive(pid):
    """A process that ended and that nobody has waited for yet is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    be_killed_while_reading()
