"""The fault injector (injector.c): compiled with gcc, loaded into this process, armed in a fork of it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COUNT, KILL, FAIL, FAIL_FROM, SHORT = range(5)  # injector.c's modes
SOURCE = Path(__file__).with_name("injector.c")


def missing() -> str:
    """Return why the injector cannot work here; "" if it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the injector needs Linux on x86_64 or aarch64"
    return "" if shutil.which("gcc") else "the injector is compiled with gcc, which is not installed"


@functools.cache
def load() -> ctypes.CDLL:
    """Compile and load the injector; until it is armed it does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["gcc", "-O1", "-shared", "-fPIC", "-o", f"{folder}/injector.so", str(SOURCE)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(f"{folder}/injector.so")
    library.injector_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p]
    return library


def arm(mode: int, number: int, folder: Path, failure: int = 0, calls: Path | None = None) -> None:
    """Let the `number`-th call of this process that changes `folder` be struck. Call it in a fork.

    mode: KILL ends the process before the call. FAIL refuses the call with the errno `failure`; FAIL_FROM this and all
    later ones (of a full disk: those that take space). SHORT writes half of it. calls: a file to list the calls in.
    """
    target, listed = os.fsencode(folder.resolve()), os.fsencode(calls or "")
    if code := load().injector_arm(mode, number, failure, target, listed):
        raise OSError(code, f"the kernel refuses the injector's filter: {os.strerror(code)}")
