"""The forks that tests/support/warm.py starts for the tests behave as new Python processes do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from support import warm

PROGRAMS = {
    "code": "raise SystemExit(3)",
    "message": "raise SystemExit('what went wrong')",
    "error": "def f(): 1 / 0\nf()",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "streams": "import sys\nprint(sys.stdin.read().upper()); print('ß', file=sys.stderr)",
    "place": "import os, sys\nprint(os.getcwd(), sys.path[0] or os.getcwd(), sys.argv, os.environ['MINE'], __name__)",
    "child": "import subprocess, sys\nraise SystemExit(subprocess.call([sys.executable, '-c', 'raise SystemExit(4)']))",
    "imported": "import sys\nprint(sorted({'engine', 'models', 'data', 'transformers', 'warm'} & {*sys.modules}))",
    "main": "import __main__\nx = 1\nprint(__main__.x, __main__.__doc__, hasattr(__main__, '__file__'))",
    "parent": f"import os\nprint(os.getppid() == int(os.environ['{warm.PARENT}']))",
    "files": "import os\nprint(sorted(os.listdir('/proc/self/fd')))",
    "modules": "import argparse, engine.cli\nprint(engine.cli.__file__)",
}


def ended(python: object, code: str, folder: object) -> tuple[int, str, str]:
    """Return the exit code and the output; of a traceback the last line."""
    environment = os.environ | {"MINE": "x", warm.PARENT: str(os.getpid())}
    given = {"capture_output": True, "text": True, "cwd": folder, "env": environment, "timeout": 60}
    done = subprocess.run([python, "-c", code, "a b", "-m"], input="given", **given)
    has_traceback = done.stderr.startswith("Traceback")
    return done.returncode, done.stdout, done.stderr.splitlines()[-1] if has_traceback else done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_ends_as_a_new_process_does(name, tmp_path):
    fork, new = (ended(x, PROGRAMS[name], tmp_path) for x in (warm.folder() / "python", sys.executable))
    assert fork == new


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_a_fork(number):
    code = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt: exit(7)"
    with subprocess.Popen([warm.folder() / "python", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(60) == (7 if number == signal.SIGINT else -number)


def test_a_fork_ends_with_a_client_that_is_killed():
    code = "import time\nprint('ready', flush=True)\ntime.sleep(20)\nprint('still there')"
    with subprocess.Popen([warm.folder() / "python", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""  # it ends when the fork, which has the pipe too, ends


def test_the_server_that_is_forked_has_one_thread():
    code = "import os\nprint(len(os.listdir(f'/proc/{os.getppid()}/task')))"
    assert ended(warm.folder() / "python", code, None) == (0, "1\n", "")


def test_a_client_that_is_killed_while_it_asks_ends_no_other():
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(warm.folder() / "socket"))
        socket.send_fds(link, [(100).to_bytes(8, "big")], [0, 1, 2])
        link.sendall(b"{")
    assert ended(warm.folder() / "python", "print(1)", None) == (0, "1\n", "")


def test_forks_have_random_numbers_of_their_own():
    code = "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(()).item())"
    command = [warm.folder() / "python", "-c", code]
    a, b = (subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2))
    assert not {*a} & {*b}
