"""Start a module of a benchmark on some ranks, by torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

TIMEOUT = 600  # seconds of one launch


def launch(module: str, arguments: Sequence[str], ranks: int, machines: int = 1) -> None:
    """Run a module on some ranks; SystemExit with the end of what it printed where it fails."""
    command = [sys.executable, "-m", module, *arguments]
    commands = [command]
    if ranks > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks // machines}"]
        torchrun += [f"--nnodes={machines}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        commands = [[*torchrun, f"--node-rank={node}", "-m", module, *arguments] for node in range(machines)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    for process in processes:
        printed = process.communicate(timeout=TIMEOUT)[1]
        if process.returncode:
            raise SystemExit(f"{module} {' '.join(arguments[1:])} on {ranks} ranks failed:\n{printed[-2000:]}")
