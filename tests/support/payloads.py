"""Pickles that run code when they are loaded; no reader of checkpoints may run one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class Call:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


PAYLOADS = [
    (os.system, "touch MARK"),
    (os.mkdir, "MARK"),
    (os.popen, "touch MARK"),
    (eval, "open('MARK', 'w')"),
    (exec, "open('MARK', 'w')"),
    (open, "MARK", "w"),
    (Path.touch, Path("MARK")),
    (subprocess.call, ["touch", "MARK"]),
]
