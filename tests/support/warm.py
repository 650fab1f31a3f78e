"""Python processes that start with torch imported: forks of one process, which imports it once for all of them.

A new Python needs 2 s to import torch; a fork of one that has imported it needs 0.02 s. `folder` has a `python` and a
`torchrun` that ask this server for a fork with their arguments, environment, folder and standard streams; then they are
its stand-ins: they pass signals on, and end as it ends. The fork imports engine, models and data itself. The server has
one thread, so that a fork of it is whole.

What a new process has of its own, and a fork does not, is asked of a real one: the imports, the seed of Python's
hashes, the parent, process group, umask and limits, and variables that are read before the first line runs
(OMP_NUM_THREADS, which is 1 here, PYTHONIOENCODING, LC_ALL).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
IMPORTED: tuple[str, ...] = ("torch.distributed.run", "torch.distributed.fsdp", "torch.utils.data", "tokenizers")
IMPORTED += ("safetensors.torch", "tqdm", "tarfile", "tomllib", "pynvml", "cuda.bindings.driver")
PARENT = "FINETUNE_ENGINE_PARENT"  # of engine/heartbeat.py, which a fork imports later


@functools.cache
def folder() -> Path:
    """Return a folder for PATH with a python and a torchrun; start their server, which ends with this process."""
    home = Path(tempfile.mkdtemp(prefix="warm-"))
    client = f"#!{sys.executable} -SE\n" + (HERE / "warm_python.py").read_text(encoding="utf-8")
    for name in ("python", "torchrun"):
        (home / name).write_text(client.replace("REAL_PYTHON", sys.executable), encoding="utf-8")
        (home / name).chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "warm.py"), str(home)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.read() == b"ready", "the server of warm processes did not start"
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    atexit.register(server.stdin.close)
    return home


class Request(NamedTuple):
    """What a process is started with, as of subprocess.Popen; python: what sys.executable is to be."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    python: str


@dataclass
class Asked:
    """A process that a client asked for; `link` is open as long as the client lives."""

    link: socket.socket
    pid: int = 0


def receive(link: socket.socket) -> tuple[Request, list[int]]:
    """Return the request of a client, and its standard streams."""
    size, streams, _, _ = socket.recv_fds(link, 8, 3)
    text = link.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    return Request(**json.loads(text)), streams


def serve(home: Path) -> tuple[Request, list[int]]:
    """Start forks until the starter of this server ends; in a fork, return its request."""
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(home)
    listener.bind("socket")
    listener.listen(64)
    os.write(1, b"ready")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)  # of what is opened later, nothing takes its number
    os.close(sink)
    asked: list[Asked] = []
    while True:
        waiting: list[Any] = [0, listener, *(a.link for a in asked)]
        ready, _, _ = select.select(waiting, [], [], 0.02 if asked else None)
        if 0 in ready:
            for one in asked:
                os.kill(one.pid, signal.SIGKILL)
            os._exit(0)
        if listener in ready:
            one = Asked(listener.accept()[0])
            try:
                request, streams = receive(one.link)
            except ValueError:  # a client that was killed while it asked
                one.link.close()
                continue
            one.pid = os.fork()
            if one.pid == 0:
                for link in (listener, one.link, *(a.link for a in asked)):
                    link.close()
                return request, streams
            for stream in streams:
                os.close(stream)
            asked.append(one)
        for one in asked:
            if one.link in ready:  # the number of a signal; nothing, where the client was killed
                os.kill(one.pid, (one.link.recv(1) or bytes([signal.SIGKILL]))[0])
        asked = [one for one in asked if not has_ended(one)]


def has_ended(one: Asked) -> bool:
    """Tell the client of a process that ended how it did."""
    pid, status = os.waitpid(one.pid, os.WNOHANG)
    if pid == 0:
        return False
    with one.link, contextlib.suppress(BrokenPipeError):  # of a client that was killed
        one.link.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    return True


def become(request: Request, streams: list[int], libraries: list[str]) -> None:
    """Become the process that was asked for, and run its module, code or file."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request.environment)
    if PARENT in os.environ:
        os.environ[PARENT] = str(os.getppid())  # the client ends with the one that is meant
    os.chdir(request.folder)
    name, *arguments = request.arguments
    is_unbuffered = name == "-u"
    if is_unbuffered:
        name, *arguments = arguments
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    sys.stdout.reconfigure(write_through=is_unbuffered)
    sys.stderr.reconfigure(line_buffering=True)
    for stream_name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{stream_name}__", getattr(sys, stream_name))
    sys.executable = request.python
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = os.getcwd() if name in ("-m", "-c") else str(Path(name).resolve().parent)
    sys.path[:] = [first, *added, *libraries]
    importlib.import_module("numpy").random.seed()  # each process has its own; Python's seeds itself in a fork
    importlib.import_module("torch").default_generator.seed()
    if name == "-m":
        sys.argv[:] = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif name == "-c":
        sys.argv[:] = ["-c", *arguments[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = [name, *arguments]
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    paths = {str(HERE), *os.environ.pop("PYTHONPATH", "").split(os.pathsep)}
    sys.path[:] = [path for path in sys.path if path not in paths]
    for module in IMPORTED:
        try:
            importlib.import_module(module)
        except ImportError:
            continue  # of this system or version
    gc.freeze()  # a collection in a fork would copy what it shares with the others
    become(*serve(Path(sys.argv[1])), list(sys.path))
