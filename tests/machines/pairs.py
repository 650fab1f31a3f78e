"""A run on two machines: a torchrun on each, what they print, and when their ranks end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from faults.ranks import has_ended
from faults.runs import Run

import models
from machines.network import ADDRESSES, PORT, Network

TESTS = Path(__file__).resolve().parent.parent
DEADLINE = 180.0  # seconds, after which a run counts as hung


class Pair:
    """The torchruns of a run. nodes: as torchrun's --nnodes."""

    def __init__(self, network: Network, run: Run, nodes: str = "2", options: Sequence[str] = ()):
        self.network, self.run, self.nodes, self.options = network, run, nodes, options
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *settings: str, module: str = "machines.paced", **environment: str) -> None:
        """Start torchrun on a machine. settings: more arguments of engine.train there."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", self.nodes, "--nproc-per-node", "1"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['a']}:{PORT}", "--rdzv-id", "1"]
        launcher += ["--rdzv-conf", "last_call_timeout=3", "--local-addr", ADDRESSES[name], *self.options]
        command = self.network.on(name, [*launcher, "-m", module, str(self.run.recipe), *settings])
        root = Path(models.__file__).parent.parent
        own = {"PYTHONPATH": f"{root}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if ":" in self.nodes:  # else a machine that comes back waits in vain for torchrun's word on the store
            own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.file(name).open("ab") as stream:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                cwd=self.run.logs,
                env=os.environ | own | environment,
                start_new_session=True,
            )

    def start_both(self, module: str = "machines.paced") -> None:
        for name in ADDRESSES:
            self.start(name, module=module)

    def file(self, name: str) -> Path:
        return self.run.logs / f"screen.{name}"

    def screen(self, name: str) -> str:
        """Return what was printed on a machine."""
        return self.file(name).read_text(encoding="utf-8", errors="replace") if self.file(name).is_file() else ""

    def errors(self, name: str) -> list[str]:
        """Return our sentences that were printed on a machine."""
        return [line for line in self.screen(name).splitlines() if line.startswith("error")]

    def wait_for(self, ready: Callable[[], object], seconds: float = DEADLINE) -> bool:
        """Wait until ready(); return whether it is."""
        until = time.monotonic() + seconds
        while not ready() and time.monotonic() < until:
            time.sleep(0.02)
        return bool(ready())

    def is_past(self, step: int, attempt: int = 1) -> bool:
        """Return whether the attempt-th start of the loop has logged a step."""
        parts = self.screen("a").split("\noutput ")[attempt:]
        return any(f"step {step:>6}  loss" in part for part in parts)

    def ranks(self) -> list[str]:
        """Return the processes of ranks that live."""
        found = [file.suffix[1:] for file in self.run.logs.glob("process.*")]
        return [process for process in found if not has_ended(process)]

    def wait(self, *names: str, seconds: float = DEADLINE) -> dict[str, int | None]:
        """Wait for the ends of torchruns; return their exit codes, None where one hung."""
        until, codes = time.monotonic() + seconds, {}
        for name in names or tuple(self.processes):
            with suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(max(0.0, until - time.monotonic()))
            codes[name] = self.processes[name].poll()
        return codes

    def kill(self, name: str) -> None:
        """End a machine as a power cut would: its torchrun and its ranks, without a word to the other machine."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        here = os.stat(f"/run/netns/{self.network.spaces[name]}").st_ino
        for process in self.ranks():
            with suppress(OSError):
                if os.stat(f"/proc/{process}/ns/net").st_ino == here:
                    os.kill(int(process), signal.SIGKILL)

    def end(self) -> None:
        """Leave nothing alive."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for rank in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(int(rank), signal.SIGKILL)
