"""Measure what the predictions need of this machine, and the steps that they are compared with, on gloo ranks.

    python -m benchmarks.scaling.measure FILE.json      a rank of the measurement of the links, started by `links`

Every rank has one thread. With more ranks than cores, the ranks share the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.scaling.machines import Link, Machine
from benchmarks.scaling.predict import Compute
from benchmarks.scaling.work import Work

ROOT = Path(__file__).parent.parent.parent
SIZES = (64, 2**25)  # bytes of a collective
ROUNDS = {64: 200, 2**25: 8}
TIMEOUT_SECONDS = 300.0
STEPS = 5  # timed steps; timed_training has as many before them, and again for the parts of the loop
PARTS_OF_MODEL = ("forward", "backward")


class MeasureError(Exception):
    """Ranks that failed; the message is the last line of what one of them wrote."""


@dataclass(frozen=True)
class Measured:
    """A training step of several ranks on this machine."""

    seconds: float
    states: int  # bytes of the weights and the optimizer's states on rank 0
    resident: float  # bytes: the peak of the process of rank 0, with all libraries
    parts: dict[str, float]  # shares of the step: forward, backward, clip, optimizer, data, other


def start_ranks(command: Sequence[str], world_size: int, machines: int = 1) -> list[subprocess.Popen[str]]:
    """Start a command as the ranks of torchrun, on `machines` pretended machines, each with one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world_size // machines)}
    common |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank % (world_size // machines))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]


def wait_for(processes: Sequence[subprocess.Popen[str]], seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait until all have ended. Raises MeasureError where one fails, or is not ready in time; the others are ended."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
            if process.returncode:
                lines = [line for line in errors.strip().splitlines() if line.strip()]
                raise MeasureError(lines[-1] if lines else f"exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        raise MeasureError(f"not ready within {seconds:g} s") from None
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train(
    recipe: Path, scratch: Path, world_size: int, *settings: str, machines: int = 1, copies: int = 1
) -> list[Measured]:
    """Return the step of a recipe on `world_size` ranks; with copies, of as many runs at the same time."""
    outputs, processes = [], list[subprocess.Popen[str]]()
    for _ in range(copies):
        number = len(list(scratch.iterdir()))
        output, folder = scratch / f"{number}.json", scratch / f"run-{number}"
        folder.mkdir()
        command = ["-m", "benchmarks.timed_training", str(output), str(STEPS), "--split", str(recipe)]
        processes += start_ranks([*command, f"--run.folder={folder / 'run'}", *settings], world_size, machines)
        outputs.append(output)
    wait_for(processes)
    found = [json.loads(output.read_text(encoding="utf-8")) for output in outputs]
    return [
        Measured(run["step_ms_p50"] / 1000, run["state_bytes"], run["peak_memory_mb"] * 2.0**20, run["split"])
        for run in found
    ]


def links(scratch: Path, world_size: int = 2) -> dict[str, list[float]]:
    """Return {collective: seconds for each of SIZES} of gloo on `world_size` ranks of this machine."""
    output = scratch / "links.json"
    wait_for(start_ranks(["-m", "benchmarks.scaling.measure", str(output)], world_size))
    found: dict[str, list[float]] = json.loads(output.read_text(encoding="utf-8"))
    return found


def machine_of(collectives: dict[str, list[float]], cores: int, memory: float, world_size: int = 2) -> Machine:
    """Return this machine: bandwidth and latency such that the formulas of predict.py give what was measured.

    The ranks of `world_size` had a core each. Whatever the size, a collective starts as late as the smallest one ends.
    """
    passed = (world_size - 1) / world_size * SIZES[1]
    rates = {
        name: (2 if name == "all_reduce" else 1) * passed / max(1e-9, large - small)
        for name, (small, large) in collectives.items()
    }
    bandwidth = rates["all_reduce"]
    hop = collectives["all_reduce"][0] / (2 * (world_size - 1))
    link = Link(bandwidth, hop, hop)
    return Machine(
        "this machine",
        stated=1.0,
        products=1.0,
        attention=1.0,
        memory_bandwidth=1.0,
        memory=memory,
        ranks=2**16,
        inside=link,
        between=link,
        start=0.0,
        launch=0.0,
        host_hop=hop,
        overlaps=False,  # gloo's threads need the cores that compute
        cores=cores,
        gather_rate=rates["all_gather"] / bandwidth,
        scatter_rate=rates["reduce_scatter"] / bandwidth,
    )


def compute_of(measured: Measured, work: Work) -> Compute:
    """Return the compute of a step that one rank took alone, with equal layers.

    What is neither model nor optimizer (data, log) is counted with the model, since each rank does it.
    """
    model = sum(measured.parts[part] for part in PARTS_OF_MODEL)
    end = measured.parts.get("optimizer", 0.0) + measured.parts.get("clip", 0.0)
    forward = measured.seconds * (1 - end) * measured.parts["forward"] / model
    backward = measured.seconds * (1 - end) * measured.parts["backward"] / model
    count = len(work.layers)
    return Compute((forward / count,) * count, (backward / count,) * count, 0.0, 0.0, measured.seconds * end)


# A rank of the measurement of the links


def main(output: Path) -> None:
    """Time the collectives; rank 0 writes the medians."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    found = {name: [time_collective(name, size) for size in SIZES] for name in COLLECTIVES}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def time_collective(name: str, size: int) -> float:
    """Return the median seconds of a collective over `size` bytes in total."""
    whole = torch.zeros(size // 4)
    part = torch.zeros(size // 4 // dist.get_world_size())
    times = []
    for _ in range(ROUNDS[size]):
        dist.barrier()
        start = time.perf_counter()
        COLLECTIVES[name](whole, part)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


COLLECTIVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all_reduce": lambda whole, part: dist.all_reduce(whole),
    "all_gather": dist.all_gather_into_tensor,
    "reduce_scatter": lambda whole, part: dist.reduce_scatter_tensor(part, whole),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
