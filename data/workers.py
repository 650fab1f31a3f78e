"""The processes that read training examples: how they end, and which example each of them is reading.

A terminal's Ctrl-C and a scheduler's signal reach every process of a run, its workers too. The workers ignore them,
since the run still needs them to reach its next checkpoint, and they die with the run.

Each process notes which example it reads, in memory that the run shares with its workers. So the error about a worker
that dies or hangs names its example.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data.errors import DataError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # SIGHUP: the terminal has gone
PID, STEP, EXAMPLE = range(3)  # columns of the notes
NONE = -1
PR_SET_PDEATHSIG = 1  # of Linux's prctl
POLL_SECONDS = 1.0

_notes: np.ndarray = np.full(3, NONE)  # (3,) int64, of this process


class WorkerError(RuntimeError):
    """No data arrives, because a process that reads it was killed or hangs; the message is for the user."""


class LoaderStopped(Exception):  # noqa: N818, it is no error
    """A stop was requested while the run waited for data."""


class _Interrupt(BaseException):
    """The time of a wait is over, or a stop was requested; no Exception, which a reader of files may catch."""


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker, as text, since not every exception can be sent to another process."""

    message: str
    traceback: str
    is_data_error: bool
    example: int

    def reraise(self, ids: Sequence[str]) -> NoReturn:
        """Raise DataError with the worker's message and the example's id, or RuntimeError with its traceback."""
        example = f"example id {ids[self.example]!r}" if self.example != NONE else ""
        if self.is_data_error:
            is_named = not example or ids[self.example] in self.message
            raise DataError(self.message if is_named else f"{self.message} ({example})")
        raise RuntimeError(f"in a loader worker{', at ' if example else ''}{example}\n\n{self.traceback}")


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return STOP_SIGNALS without a SIGHUP that is ignored, as `nohup` starts a command."""
    return tuple(n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN)


def note_step(step: int) -> None:
    """Note the step whose examples this process reads; NONE: none."""
    _notes[STEP], _notes[EXAMPLE] = step, NONE


def note_example(index: int) -> None:
    """Note the example that this process reads, by its position in the data set."""
    _notes[EXAMPLE] = index


def return_failures(make: Callable[[], Any]) -> Any:
    """Return what `make` returns; in a worker, return its exception as an item for read_steps."""
    if get_worker_info() is None:
        return make()
    try:
        return make()
    except Exception as error:  # the user's own code fails with errors of every kind
        text = "".join(traceback.format_exception(error)).rstrip()
        return _Failure(str(error), text, isinstance(error, DataError), int(_notes[EXAMPLE]))


def read_steps(
    loader: DataLoader[Any], first: int, ids: Sequence[str], timeout_seconds: float, should_stop: Callable[[], bool]
) -> Iterator[Any]:
    """Yield the items of a loader whose item i is step `first` + i. While it waits for one, it raises

    - LoaderStopped, once should_stop() is true;
    - WorkerError, which names the worker and its example, where a worker died or no item arrives within
      timeout_seconds; in the second case the stacks of this process and of the worker are printed before;
    - the error of a worker: DataError with its message, else RuntimeError with its traceback.

    Stops and time limits need Python's main thread, since only that one receives signals.
    """
    notes = torch.full((loader.num_workers, 3), NONE) if loader.num_workers else None
    iterator, processes = _start(loader, notes)
    rows = _notes[None] if notes is None else notes.numpy()
    kill = partial(_kill, processes)
    atexit.register(kill)  # else the interpreter's end would wait for a worker that hangs

    def find_dead() -> list[BaseProcess]:
        return [process for process in processes if not process.is_alive()]

    try:
        for i in itertools.count():
            try:
                with _limit_wait(timeout_seconds, lambda: should_stop() or bool(find_dead())):
                    item = next(iterator)
            except (_Interrupt, Exception) as error:
                if dead := find_dead():
                    raise WorkerError(_describe_death(dead[0], rows, ids)) from None
                if not isinstance(error, _Interrupt):
                    raise
                if should_stop():
                    raise LoaderStopped from None
                row = _find_waited_for(rows, i)
                _show_stacks(processes, int(row[PID]))
                raise WorkerError(_describe_hang(row, first + i, ids, timeout_seconds)) from None
            if isinstance(item, _Failure):
                item.reraise(ids)
            yield item
    except Exception:
        kill()  # at once: the loader would wait for a worker that hangs
        raise
    finally:
        del iterator  # the workers end by themselves
        kill()
        atexit.unregister(kill)


def _start(loader: DataLoader[Any], notes: Tensor | None) -> tuple[Iterator[Any], list[BaseProcess]]:
    """Return the iterator of a loader and its worker processes."""
    others = multiprocessing.active_children()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    if notes is not None:
        notes.share_memory_()  # type: ignore[no-untyped-call]
        loader.worker_init_fn = partial(_prepare_worker, notes)
    iterator = iter(loader)
    if in_main_thread and handler is not None:
        # torch's handler raises wherever the run is, when a worker dies. The wait for its data notices that too.
        signal.signal(signal.SIGCHLD, handler)
    return iterator, [process for process in multiprocessing.active_children() if process not in others]


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _prepare_worker(notes: Tensor, worker: int) -> None:
    """Let this worker ignore the signals that stop a run, and die with its parent.

    notes: (workers, 3) int64, shared with the parent.
    """
    global _notes
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2)  # by which the parent asks where the worker hangs
    _die_with_parent()
    _notes = notes[worker].numpy()
    _notes[PID] = os.getpid()


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends; where it cannot, a thread looks once a second."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
    started_by = multiprocessing.parent_process()
    if started_by is not None and not started_by.is_alive():  # it ended before the lines above
        os._exit(1)


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


@contextmanager
def _limit_wait(seconds: float, is_over: Callable[[], bool]) -> Iterator[None]:
    """Raise _Interrupt inside the block after `seconds`, or once is_over().

    A signal does it, since it also interrupts a read that never returns, as from a worker that was stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deadline = time.monotonic() + seconds
    waiting = True

    def look(number: int, frame: object) -> None:
        nonlocal waiting
        if waiting and (is_over() or time.monotonic() >= deadline):
            waiting = False  # once
            raise _Interrupt

    previous = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, POLL_SECONDS), POLL_SECONDS)
    try:
        yield
    finally:
        waiting = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)


def _show_stacks(processes: Sequence[BaseProcess], pid: int) -> None:
    """Print the stacks of all threads of this process, and of the worker with this pid unless it was stopped."""
    print("the stacks of this process, then those of the worker:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(2, all_threads=True)
    if pid in [process.pid for process in processes]:
        os.kill(pid, signal.SIGUSR2)
        time.sleep(POLL_SECONDS / 2)  # until it has printed them


def _find_waited_for(rows: np.ndarray, i: int) -> np.ndarray:
    """Return the notes of the worker whose turn item i is, since workers take turns.

    Where that one has nothing to read, return those of one that reads. That one may have been stopped while it held the
    queue by which all workers answer.
    """
    own: np.ndarray = rows[i % len(rows)]
    reading = rows[rows[:, STEP] != NONE]
    return own if own[STEP] != NONE or not len(reading) else reading[0]


def _describe_hang(row: np.ndarray, step: int, ids: Sequence[str], seconds: float) -> str:
    name = f"loader worker {row[PID]}" if row[PID] != NONE else "this process"
    return f"no data of step {step + 1} for {seconds:g} s (distributed.timeout_seconds): {name} {_activity(row, ids)}"


def _describe_death(process: BaseProcess, rows: np.ndarray, ids: Sequence[str]) -> str:
    """Return which worker died, of what, and what it was reading."""
    code = process.exitcode or 0
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    doing = [f"it {_activity(row, ids)}" for row in rows if row[PID] == process.pid] or ["it was starting"]
    memory = "; if memory ran out, lower data.num_workers" if code == -signal.SIGKILL else ""
    return f"loader worker {process.pid} {cause}: {doing[0]}{memory}"


def _activity(row: np.ndarray, ids: Sequence[str]) -> str:
    """Return what a process was reading, from its notes."""
    if row[STEP] == NONE:
        return "had nothing to read"
    example = f"example id {ids[row[EXAMPLE]]!r}" if row[EXAMPLE] != NONE else "the examples"
    return f"was reading {example} of step {row[STEP] + 1}"
