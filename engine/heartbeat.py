"""What the ranks of a run know of each other: who lives, who has failed, and who no longer answers.

Once a second a thread of each rank publishes in the run's store that the rank lives. It also watches the next rank; the
last one watches the first. So one other rank notices a rank that was killed or stopped, and names it. All ranks then
end. The thread also watches torchrun: without it nobody would end the rank later.

The store is on one machine. Where the connection to it breaks, a request to the store waits for minutes without an
error. So a second thread of each rank ends the rank once the store has not answered for distributed.timeout_seconds.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from typing import NoReturn, Protocol

import torch.distributed as dist

from engine.errors import LostRankError, write_error_file

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
PARENT = "FINETUNE_ENGINE_PARENT"  # environment variable: the process without which this one should end
PERIOD = 1.0  # seconds
DEAD_AFTER = 4  # beats that a rank misses, once a connection to some rank has failed
VERDICT_SECONDS = 10.0  # within which a rank that died is named
ADVICE = "The same command with --resume continues from the last checkpoint, if there is one"
LOST_STORE = "the connection to the other ranks was lost, and that to the process with the store of the run"
# Keys of the store. VERDICT and FAILED hold the number of the machine that has printed the sentence, and the sentence.
STOP = "stop"  # a rank got a stop signal
TROUBLE = "trouble"  # an exchange between ranks has failed
VERDICT = "verdict"  # the sentence on the rank that is lost; all ranks end
FAILED = "failed"  # a rank has failed by itself, and says why
SHOW = "show"  # /rank: that rank should print its stacks
# Keys of the store that all attempts of torchrun share.
ASKS = "asks"  # /rank: a name of the newest process of that rank, or its number of machine and sentence of failure
ATTEMPT = "attempt"  # /name of a process: the attempt that it belongs to
HAS_FAILED = "failed "  # begins such an entry of ASKS


class Store(Protocol):
    """The methods of torch's stores that do not wait for another rank."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, value: int) -> int: ...


class Heartbeat(threading.Thread):
    """The thread. `store` is None in a run of one rank, which only watches its parent.

    collectives: the number of exchanges between the ranks that this rank has begun.
    stop_requested: whether this rank got a stop signal. stop_seen: whether some rank did.
    suspended: the longest time in seconds for which this process did not run, as after Ctrl-Z.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, timeout_seconds: float):
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world_size, self.timeout_seconds = store, rank, world_size, timeout_seconds
        self.collectives, self.suspended = 0, 0.0
        self.stop_requested, self.stop_seen = False, False
        self.failing, self.ended = False, threading.Event()
        self.parent, self.own_name = _parent(), f"rank {rank} ({own_who()})"
        self.beats, self.beats_since_failure = 0, 0
        self.missed, self.last_seen = 0, ""  # of the watched rank: beats in a row without news, and the last news
        self.has_shown_stacks = False
        self.unanswered, self.closed = 0, threading.Event()  # beats without an answer of the store

    def run(self) -> None:
        """Beat until the run ends, or another rank does not answer."""
        clock = time.monotonic()
        while not self.ended.wait(PERIOD):
            self.suspended, clock = max(self.suspended, time.monotonic() - clock - PERIOD), time.monotonic()
            if self.parent and os.getppid() != self.parent:
                self.parent, self.store = 0, None  # the store may be the parent's
                os.kill(os.getpid(), signal.SIGTERM)  # the loop saves a checkpoint; before and after it, this ends all
            if self.store is None:
                continue
            try:
                self._beat(self.store)
                self._pass_on_stop(self.store)
                self._obey(self.store)
                self._watch(self.store, (self.rank + 1) % self.world_size)
                self.unanswered = 0
            except RuntimeError:  # the store has ended; a rank that needs another one gets an error from it
                self.store = None

    def watch_store(self, address: str) -> None:
        """End this rank where the store, which is at `address`, does not answer for too long."""
        while not self.closed.wait(PERIOD):
            self.unanswered += self.store is not None
            if self.store is not None and self.unanswered * PERIOD >= self.timeout_seconds:
                _end_machine(
                    f"{self.own_name} has not reached {address} (MASTER_ADDR, MASTER_PORT) for "
                    f"{self.timeout_seconds:g} s (distributed.timeout_seconds): the machine there is down, or the "
                    f"connection to it is. {ADVICE}"
                )

    def _beat(self, store: Store) -> None:
        """Publish that this rank lives, and how many exchanges it has begun."""
        self.beats += 1
        store.set(f"alive/{self.rank}", f"{self.beats} {self.collectives}")

    def _obey(self, store: Store) -> None:
        """Show the stacks where another rank asks for them; end this rank after a verdict or another rank's failure."""
        if not self.has_shown_stacks and store.check([f"{SHOW}/{self.rank}"]):
            self.has_shown_stacks = True
            _show_stacks(self.rank)
        if store.check([VERDICT]) and not self.failing:
            _end_machine(_unless_printed_here(_read(store, VERDICT)))
        if store.check([FAILED]):
            if not self.beats_since_failure and not self.failing:
                _say_on_machine(_unless_printed_here(_read(store, FAILED)))
            self.beats_since_failure += 1
        if self.beats_since_failure * PERIOD > VERDICT_SECONDS and not self.failing:
            os._exit(EXIT_CODE)

    def _watch(self, store: Store, watched: int) -> None:
        """Count the beats that another rank misses; end all ranks where they are too many."""
        alive = _read(store, f"alive/{watched}")
        # Counted in own beats: a run that was suspended as a whole finds all its ranks alive.
        if alive in (self.last_seen, ""):
            self.missed += 1
        else:
            self.missed, self.last_seen = 0, alive
        limit = DEAD_AFTER if store.check([TROUBLE]) else self.timeout_seconds / PERIOD
        if self.missed >= limit and alive != "ended" and not self.beats_since_failure:
            self._end_all(store, watched, self.missed * PERIOD)

    def _pass_on_stop(self, store: Store) -> None:
        if self.stop_requested and not self.stop_seen:
            store.set(STOP, "requested")
        self.stop_seen = self.stop_seen or store.check([STOP])

    def _end_all(self, store: Store, lost: int, seconds: float) -> None:
        """End this rank with a sentence on the lost one, and all others without."""
        if store.add("verdicts", 1) > 1:
            return
        is_dead = store.check([TROUBLE])
        waited = f"has not answered for {seconds:g} s (distributed.timeout_seconds)"
        fault = "has ended unexpectedly" if is_dead else waited
        error = f"{self.name_of(lost)} {fault}. {ADVICE}"
        store.set(VERDICT, f"{own_machine()} {error}")
        if not is_dead:
            _show_stacks(self.rank)
        _say(error)
        _let_machines_read()
        os._exit(EXIT_CODE)

    def name_of(self, rank: int) -> str:
        """Return "rank 1 (machine NAME, process 123)"."""
        if rank == self.rank:
            return self.own_name
        who = _read(self.store, f"who/{rank}") if self.store is not None else ""
        return f"rank {rank} ({who})" if who else f"rank {rank}"

    def find_slow(self) -> list[int]:
        """Return the ranks that have begun fewer exchanges than this one."""
        if self.store is None:
            return []
        beats = {rank: _read(self.store, f"alive/{rank}").split() for rank in range(self.world_size)}
        del beats[self.rank]
        return [rank for rank, beat in beats.items() if len(beat) == 2 and int(beat[1]) < self.collectives]

    def describe_suspension(self) -> str:
        """Return a phrase on how long this process did not run, if that was too long for the others; or ""."""
        is_long = self.suspended >= self.timeout_seconds
        return f", after this one was suspended for {self.suspended:.0f} s" if is_long else ""


_own: Heartbeat | None = None  # of this process


def start(store: Store | None, rank: int, world_size: int, timeout_seconds: float, address: str = "") -> None:
    """Start the threads of this process, where it has another rank or a parent to watch. address: of the store."""
    global _own
    if (_own is None or _own.ended.is_set()) and (store is not None or _parent()):
        _own = Heartbeat(store, rank, world_size, timeout_seconds)
        _own.start()
        threading.Thread(target=_own.watch_store, args=(address,), name="store", daemon=True).start()


def own_machine() -> str:
    """Return the number of this machine in the run, by which torchrun tells its machines apart."""
    return os.environ.get("GROUP_RANK", "0")


def own_who() -> str:
    """Return "machine NAME, process 123"."""
    return f"machine {socket.gethostname()}, process {os.getpid()}"


def name_of(rank: int) -> str:
    """Return "rank 1 (machine NAME, process 123)", or "rank 1" where the run has no store."""
    return f"rank {rank}" if _own is None else _own.name_of(rank)


def _parent() -> int:
    """Return the id of the process without which this one should end; 0: none, as where a shell started this one."""
    return int(os.environ.get(PARENT, os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0))


def _read(store: Store, key: str) -> str:
    """Return a value of the store; "" where there is none, without waiting for one."""
    return store.get(key).decode() if store.check([key]) else ""


def count_collective() -> None:
    """Note that this rank begins to exchange something with the others."""
    if _own is not None:
        _own.collectives += 1


def note_stop() -> None:
    """Note that this rank got a stop signal, for the others to know."""
    if _own is not None:
        _own.stop_requested = True


def stop_seen() -> bool:
    """Return whether some rank got a stop signal."""
    return _own is not None and _own.stop_seen


def join(shared: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Wait until all ranks have called this; return the prefix of this attempt's part of the shared store.

    torchrun --max-restarts starts the ranks again with the same store, which still has what ranks that died have set.
    Each machine counts its restarts for itself. So rank 0 names the attempt for each process that asks.

    Raises LostRankError with the ranks that have not come within timeout_seconds. Ends this process where another rank
    has failed before it could come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    shared.set(f"{ASKS}/{rank}", own)
    attempt = f"attempt {shared.add('attempts', 1)}" if rank == 0 else ""
    joined, answered, failed, failed_since = 0, {""}, "", 0.0
    while joined < world_size:
        asking = [_read(shared, f"{ASKS}/{other}") for other in (range(world_size) if rank == 0 else range(1))]
        if rank == 0:
            for name in {*asking} - answered:
                shared.set(f"{ATTEMPT}/{name}", attempt)
            answered |= {*asking}
        elif not attempt:
            attempt = _read(shared, f"{ATTEMPT}/{own}")
        if attempt:
            is_new = not shared.check([f"{attempt}/who/{rank}"])
            shared.set(f"{attempt}/who/{rank}", own_who())
            joined = shared.add(f"{attempt}/joined", int(is_new))
        # A failure may be one of an earlier attempt; then the same rank asks anew within seconds.
        said = next((name for name in asking if name.startswith(HAS_FAILED)), "")
        if said != failed:
            failed, failed_since = said, time.monotonic()
        if failed and time.monotonic() > failed_since + min(VERDICT_SECONDS, timeout_seconds / 2):
            shared.set(f"{attempt}/{FAILED}", failed.removeprefix(HAS_FAILED))
            _end_machine(_unless_printed_here(failed.removeprefix(HAS_FAILED)))
        if attempt and shared.check([f"{attempt}/{FAILED}"]):
            _end_machine(_unless_printed_here(_read(shared, f"{attempt}/{FAILED}")))
        if time.monotonic() >= deadline:
            others = [str(other) for other in range(world_size) if not shared.check([f"{attempt}/who/{other}"])]
            raise LostRankError(
                f"rank {', '.join(others) if attempt else 0} of {world_size} has not joined the run within "
                f"{timeout_seconds:g} s (distributed.timeout_seconds)"
            )
        time.sleep(PERIOD / 10)
    return attempt


def announce_failure(sentence: str = "") -> None:
    """Tell the other ranks that this one has failed by itself; other machines print the sentence, if there is one."""
    if _own is not None:
        _own.failing = True
        if _own.store is not None:
            said = f"{_own.own_name} has failed: {sentence}" if sentence else ""
            _try_to_set(_own.store, FAILED, f"{own_machine()} {said}")
            _let_machines_read()


def announce_failure_before_joining(shared: Store, rank: int, sentence: str) -> None:
    """Tell the ranks that wait in `join` that this one will not come."""
    shared.set(f"{ASKS}/{rank}", f"{HAS_FAILED}{own_machine()} rank {rank} ({own_who()}) has failed: {sentence}")


def has_joined() -> bool:
    """Return whether this process has a heartbeat."""
    return _own is not None


def end() -> None:
    """Tell the other ranks that this one has ended as it should."""
    if _own is not None:
        _own.ended.set()
        _own.join(PERIOD)
        if _own.store is not None:
            _try_to_set(_own.store, f"alive/{_own.rank}", "ended")
        _own.closed.set()


def _let_machines_read() -> None:
    """Keep this process for two beats, since the store may end with the torchrun of this machine."""
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        time.sleep(2 * PERIOD)


def _say(error: str) -> None:
    """Print an error from any thread, and give it to torchrun."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    write_error_file(error)


def _say_on_machine(error: str) -> None:
    """Print an error that all ranks of this machine know, if there is one, on the first of them."""
    if error and os.environ.get("LOCAL_RANK", "0") == "0":
        _say(error)


def _end_machine(error: str) -> NoReturn:
    """End this process, as every rank of this machine ends now, with an error."""
    _say_on_machine(error)
    os._exit(EXIT_CODE)


def _unless_printed_here(value: str) -> str:
    """Return the sentence of "MACHINE SENTENCE"; "" where a rank of this machine has printed it."""
    machine, _, sentence = value.partition(" ")
    return "" if machine == own_machine() else sentence


def _show_stacks(rank: int) -> None:
    """Print where all threads of this rank are."""
    print(f"the stacks of rank {rank}:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(2, all_threads=True)


def _try_to_set(store: Store, key: str, value: str = "yes") -> None:
    with suppress(RuntimeError):  # the store has ended
        store.set(key, value)


def is_connection_error(error: BaseException) -> bool:
    """Return whether an error says that an exchange with another rank has failed."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def explain_lost_connection(error: BaseException) -> str:
    """Wait until it is known why an exchange failed; return a sentence, or "" where the cause is not known.

    Where another rank failed or died, this process ends in here, with a sentence on it on one rank only.
    """
    if _own is None:
        return ""
    with suppress(RuntimeError):  # the store has ended
        if _own.store is not None:
            return _explain_lost_connection(_own, _own.store, error)
    return LOST_STORE


def _explain_lost_connection(own: Heartbeat, store: Store, error: BaseException) -> str:
    has_timed_out = "timed out" in str(error).lower()
    if has_timed_out and (slow := own.find_slow()):
        _show_stacks(own.rank)
        for rank in slow:
            _try_to_set(store, f"{SHOW}/{rank}")
        time.sleep(2 * PERIOD)  # until their threads have printed where they are
        limit = f"within {own.timeout_seconds:g} s (distributed.timeout_seconds){own.describe_suspension()}"
        return f"{', '.join(map(own.name_of, slow))} did not come to an exchange {limit}"
    _try_to_set(store, TROUBLE)
    deadline, another_failed = time.monotonic() + VERDICT_SECONDS, False
    while time.monotonic() < deadline and own.store is not None:
        if store.check([FAILED]):  # that rank says why; torchrun ends this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            another_failed = True
        time.sleep(PERIOD / 10)
    if another_failed or own.beats_since_failure:  # the thread has printed it where it had to
        os._exit(EXIT_CODE)
    if own.store is None:
        return LOST_STORE
    if has_timed_out:
        return f"an exchange of the ranks took longer than distributed.timeout_seconds{own.describe_suspension()}"
    return ""
