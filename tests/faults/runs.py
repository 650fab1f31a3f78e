"""Runs of engine.train in forks of this process, which has imported torch once, and their comparison.

A fork costs a fifth of a second where a new process costs several, so thousands of runs can be ended by a fault.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.runs import assert_same_run, tiny_config, write_reviews, write_tiny_bert

from engine import checkpoint, train
from engine import config as configs
from engine.cli import run_command

FORK = multiprocessing.get_context("fork")
SAVING = (f"{checkpoint.WRITING}{checkpoint.LAST}", f"{checkpoint.WRITING}{checkpoint.BEST}", checkpoint.OLD)
DEADLINE = 120.0  # seconds, after which a run counts as hung


@dataclass
class Result:
    """What became of the tries of one fault. details: counts of what happened, which the report shows."""

    tries: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, problem: str | None, kind: str = "") -> None:
        """Count a try. problem: what went wrong in one sentence; None or "": nothing. kind: counted in the details."""
        self.tries += 1
        if problem:
            self.failures.append(f"{kind}: {problem}" if kind else problem)
        else:
            self.survived += 1
        if kind:
            self.note(kind)

    def note(self, kind: str, times: int = 1) -> None:
        """Count something that happened."""
        self.details[kind] = self.details.get(kind, 0) + times

    def merge(self, other: Result) -> None:
        """Add the tries of another fault of the same number."""
        self.tries += other.tries
        self.survived += other.survived
        self.failures += other.failures
        for kind, times in other.details.items():
            self.details[kind] = times if isinstance(times, str) else self.details.get(kind, 0) + times


@dataclass(frozen=True)
class Ended:
    """Processes that have ended. codes: of each rank, -n for one that signal n killed; None for one that hung."""

    codes: tuple[int | None, ...]
    out: str
    err: str
    seconds: float

    @property
    def code(self) -> int | None:
        return self.codes[0]

    def has_sentence(self) -> bool:
        """Return whether the run ended by a user's error: code 2 and one message, no traceback."""
        errors = [line for line in self.err.splitlines() if line.startswith("error")]
        return 2 in self.codes and len(errors) == 1 and "Traceback" not in self.err

    def tail(self) -> str:
        """Return the codes and the end of what was printed on stderr, in one line."""
        return f"codes {self.codes}: {' | '.join(self.err.splitlines()[-4:])[-600:]}"


class Run:
    """A tiny run in a folder of its own; start() starts it once more in the same run folder."""

    def __init__(self, bench: Bench, folder: Path, settings: dict[str, object]):
        self.bench, self.folder, self.logs = bench, folder, folder.with_name(folder.name + ".logs")
        self.config = bench.config(folder, settings)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.recipe = self.logs / "recipe.toml"
        self.recipe.write_text(configs.to_toml(self.config))

    def start(
        self, *options: str, ranks: int = 1, in_child: Callable[[], object] | None = None, module: Any = train
    ) -> Started:
        """Start `python -m engine.train RECIPE OPTIONS` in `ranks` forks, which first call `in_child`."""
        arguments = [str(self.recipe), *options]
        return Started([module.main] * ranks, arguments, self.logs, in_child)

    def finish(self, *options: str, ranks: int = 1, in_child: Callable[[], object] | None = None) -> Ended:
        """Start the run and wait for its end."""
        return self.start(*options, ranks=ranks, in_child=in_child).wait()

    def step(self) -> int:
        """Return the step of the newest checkpoint; -1 if there is none."""
        for name in (checkpoint.LAST, checkpoint.PREVIOUS):
            with suppress(FileNotFoundError):  # a save may rename the folder right now
                return int(json.loads((self.folder / name / "state.json").read_text())["train"]["step"])
        return -1

    def differs_from(self, other: Run) -> str:
        """Return how the end of this run differs from that of another one; "" if it is the same, bit for bit."""
        try:
            assert_same_run(self.folder, other.folder)
        except AssertionError as error:
            return f"the end differs: {str(error)[:300]}"
        except OSError as error:
            return f"the end has no {Path(error.filename or '').name}"
        return ""

    def is_saving(self) -> bool:
        """Return whether a save is under way, or was when the run was killed."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        between = checkpoint.PREVIOUS in names and checkpoint.LAST not in names  # the two renames of a save
        return between or any(name.startswith(SAVING) for name in names)

    def leftovers(self) -> list[str]:
        """Return the names of temporary files that a run must not leave."""
        if not self.folder.is_dir():
            return []
        found = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]
        return [name for name in found if Path(name).name.startswith((checkpoint.WRITING, checkpoint.OLD, ".tmp"))]

    def remove(self) -> None:
        for folder in (self.folder, self.logs):
            shutil.rmtree(folder, ignore_errors=True)


class Started:
    """The processes of a run, in a process group of their own."""

    def __init__(
        self, mains: list[Callable[..., int]], arguments: list[str], logs: Path, in_child: Callable[[], object] | None
    ):
        self.logs, self.since, port = logs, time.monotonic(), free_port()
        self.processes: list[Any] = []
        for rank, main in enumerate(mains):
            place = (rank, len(mains), port)
            process = FORK.Process(target=_child, args=(main, arguments, logs, place, self.group, in_child))
            process.start()
            self.processes.append(process)

    @property
    def group(self) -> int:
        """The process group: that of rank 0, or 0 before it exists."""
        return int(self.processes[0].pid) if self.processes else 0

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to a rank; None: to the group, workers included."""
        try:
            if rank is None:
                os.killpg(self.group, number)
            else:
                os.kill(self.processes[rank].pid, number)
        except ProcessLookupError:
            pass

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join(10)

    def printed(self, stream: str = "out") -> str:
        """Return what the ranks have printed so far."""
        files = sorted(self.logs.glob(f"{stream}.*"))
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def wait_for(self, ready: Callable[[], object], seconds: float = DEADLINE) -> bool:
        """Wait until ready() or the end of the run; return whether it is ready."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if ready():
                return True
            if not self.alive():
                return bool(ready())
            time.sleep(0.002)
        return False

    def wait(self, seconds: float = DEADLINE) -> Ended:
        """Wait for the end, at most so long; then kill what is left."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = tuple(process.exitcode for process in self.processes)
        took = time.monotonic() - self.since
        self.kill()
        return Ended(codes, self.printed("out"), self.printed("err"), took)


def _child(
    main: Callable[..., int],
    arguments: list[str],
    logs: Path,
    place: tuple[int, int, int],
    group: int,
    in_child: Callable[[], object] | None,
) -> None:
    """Be one rank: a process with its own output files, the variables of torchrun, and the usual signals."""
    os.setpgid(0, group)
    rank, world_size, port = place
    for stream, descriptor in (("out", 1), ("err", 2)):
        file = os.open(logs / f"{stream}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(i, "w", buffering=1, encoding="utf-8", closefd=False) for i in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if in_child is not None:
        in_child()
    sys.argv = ["engine.train", *arguments]
    run_command(main)


class Bench:
    """A folder with a tiny checkpoint and data, in which runs are made. Uninterrupted runs are made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = write_tiny_bert(folder / "model")
        self.reviews = write_reviews(folder / "reviews.jsonl", 120)
        self.made = 0
        self.through: dict[tuple[object, ...], Run] = {}

    def config(self, folder: Path, settings: dict[str, object]) -> configs.Config:
        return tiny_config(self.model, self.reviews, folder, {"run.resume": "auto"} | settings)

    def run(self, settings: dict[str, object]) -> Run:
        """Return a run in a new folder, which was not started yet."""
        self.made += 1
        return Run(self, self.folder / f"run{self.made}", settings)

    def uninterrupted(self, settings: dict[str, object], ranks: int = 1) -> Run:
        """Return the run with these settings that nothing happened to."""
        key = (ranks, *sorted(settings.items()))
        if key not in self.through:
            run = self.run(settings)
            ended = run.finish(ranks=ranks)
            if set(ended.codes) != {0}:
                raise RuntimeError(f"the run without a fault failed: {ended.tail()}")
            self.through[key] = run
        return self.through[key]


@contextmanager
def changed(target: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def prepare_ranks() -> None:
    """Import what DDP imports at its first use, so that forks do not each spend seconds on it."""
    importlib.import_module("torch._dynamo")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def without_paths(text: str, folder: Path) -> str:
    """Return a message without names of this machine's folders, for a report that is committed."""
    root = str(Path(train.__file__).parent.parent)
    text = text.replace(str(folder), "FOLDER").replace(root, "REPOSITORY")
    return re.sub(r"/\S*/(site-packages|lib/python[\d.]+)/", r"\1/", text)


def as_json(result: Result) -> dict[str, Any]:
    return dataclasses.asdict(result)
