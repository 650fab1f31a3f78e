"""torchrun as a process, in a group of its own, with the engine and the tests on its path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import models

TESTS = Path(__file__).resolve().parent.parent


def start_torchrun(arguments: Sequence[str], ranks: int, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start torchrun --standalone --nproc-per-node RANKS OPTIONS ARGUMENTS."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    root = Path(models.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*launcher, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[int | None, str, str, float]:
    """Return (exit code or None where it hung, stdout, stderr, seconds it took); nothing of it is left alive."""
    since = time.monotonic()
    try:
        out, err = process.communicate(timeout=seconds)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code = None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        out, err = process.communicate()
    return code, out, err, time.monotonic() - since
