"""Check and measure a GPU that is at hand for some minutes:

    python -m benchmarks.gpu_check [--minutes 8] [--parts 1,2,...] [--shrink] [--output FILE.json]

The parts, in this order:
  1. machine         versions, rate of matrix products, bandwidth of copies
  2. correctness     loss and gradients of every architecture and head beside the CPU in fp64; dropout
  3. waits           whether the host waits for the device in forward and backward, for every task
  4. training_speed  throughput, utilisation, memory, kernels and step times of published shapes
  5. other_trainers  HF Trainer and timm on the same files and batches
  6. recovery        micro-batches by memory, out of memory, resume, run.deterministic, DDP
  7. inference       prediction and generation beside transformers

Each part is a process with its share of the time, and what a part does not use is left to the later ones. A part whose
time is over is killed; its finished rows are kept. The record is written after each part: to FILE.json, or to
benchmarks/history under the name of the GPU. The last output is a table in Markdown; rows that are not as they should
be are repeated below it, and the exit code is then 1. --shrink takes tiny models, also on a CPU, and writes only
FILE.json. Nothing is downloaded. The parts 2 and 3 need pytest; 5 and 7 transformers, accelerate and timm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu_check.check import ROOT, Row
from benchmarks.gpu_check.table import failures, format_tables

PARTS = {  # name of the module -> its share of the time; what the first ones do not use goes to the later ones
    "machine": 40,  # a fresh machine reads torch's libraries for the first time
    "correctness": 70,
    "waits": 45,
    "training_speed": 200,
    "other_trainers": 100,
    "recovery": 40,
    "inference": 45,
}
PREPARED = ("bert-base-ragged", "gpt2-1024", "vit-b16-224", "t5-base-512-128", "bert-base-128")  # the slowest first
USE_PREPARED = ("training_speed", "other_trainers", "recovery", "inference")
LEAST_SECONDS = 8.0  # a part that would have less is skipped


def main(argv: Sequence[str]) -> int:
    """Run the parts, write the record after each of them, and print the tables."""
    arguments = parse(argv)
    content = record.describe("gpu_check", [], list(argv))
    path = arguments.output or record.new_path(record.HISTORY, f"gpu_check-{machine_name()}", content)
    writes = bool(arguments.output) or not arguments.shrink
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        scratch = Path(temporary)
        preparing = start_preparing(scratch / "files", arguments)
        try:
            for i, part in enumerate(arguments.parts):
                if part in USE_PREPARED:
                    wait_for(preparing, end)
                seconds = share_of_time(end - time.monotonic(), arguments.parts[i:])
                print(f"{part}: {max(0, seconds):.0f} s at most", flush=True)
                content["results"] += run_part(part, seconds, scratch, arguments)
                if writes:
                    record.save(path, content)
        except KeyboardInterrupt:
            print("interrupted; the finished parts follow")
        finally:
            for process in preparing:
                end_group(process)
    print(f"\n{format_tables(content)}\n")
    wrong = failures(content["results"])
    print("\n".join(wrong) if wrong else "all checks that were finished passed")
    if unfinished := [
        row["part"] for row in content["results"] if row.get("note", "").startswith(("killed", "skipped"))
    ]:
        print(f"not finished: {', '.join(unfinished)}; --parts {','.join(unfinished)} runs them alone")
    print(f"written to {path}" if writes else "not written: --shrink without --output")
    return 1 if wrong else 0


def share_of_time(seconds: float, parts: Sequence[str]) -> float:
    """Return the time of the first of the parts that are left."""
    return seconds * PARTS[parts[0]] / sum(PARTS[part] for part in parts)


def start_preparing(files: Path, arguments: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Write the files of the workloads in other processes, beside the first parts."""
    needed = PREPARED if {*USE_PREPARED} & {*arguments.parts} else ()
    if arguments.device == "cpu":
        needed = tuple(name for name in needed if name in ("bert-base-ragged", "vit-b16-224"))
    options = ["--shrink"] * arguments.shrink
    return [start(["-m", "benchmarks.workloads", name, str(files), *options], files.parent / name) for name in needed]


def wait_for(processes: list[subprocess.Popen[bytes]], end: float) -> None:
    """Wait for processes until they or the time end."""
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def run_part(part: str, seconds: float, scratch: Path, arguments: argparse.Namespace) -> list[Row]:
    """Run a part in a process of its own and return its rows, of which the last says how it ended."""
    rows, output = scratch / f"{part}.jsonl", scratch / f"{part}.txt"
    if seconds < LEAST_SECONDS:
        return [
            {"part": part, "work": part, "variant": "", "runs": [], "note": f"skipped: {max(0, seconds):.0f} s left"}
        ]
    rows.touch()
    (scratch / part).mkdir()
    job = {"device": arguments.device, "shrink": arguments.shrink, "files": str(scratch / "files")}
    job |= {"scratch": str(scratch / part), "rows": str(rows), "seconds": seconds}
    began = time.monotonic()
    process = start(["-m", "benchmarks.gpu_check.part", part, json.dumps(job)], output)
    try:
        code = process.wait(seconds)
        ending = "" if code == 0 else f"ended with code {code}: {last_line(output)}"
    except subprocess.TimeoutExpired:
        ending = f"killed after {seconds:.0f} s; last: {last_line(output)}"
    finally:
        end_group(process)
    found: list[Row] = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was being written
            found.append({"part": part, **json.loads(line)})
    figures: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if ending and "killed" not in ending:
        figures["ok"] = False
    found.append({"part": part, "work": "the whole part", "variant": "", "runs": [figures], "note": ending})
    return found


def start(arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start Python in a process group of its own; what it prints goes to the file `output`."""
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(output: Path) -> str:
    """Return the last line that a process printed."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "nothing printed"


def machine_name() -> str:
    """Return the name of the GPU, or "cpu", for the name of a file."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments. A mistake ends the process with one sentence."""
    names = list(PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time of all parts together")
    parser.add_argument("--parts", default="", help="numbers or names of parts, comma-separated; default all")
    parser.add_argument("--shrink", action="store_true", help="tiny models and data, to try the command")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the record")
    arguments = parser.parse_args(argv)
    by_number = {str(i): name for i, name in enumerate(names, 1)}
    chosen = [by_number.get(text, text) for text in arguments.parts.split(",") if text] or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--parts: {unknown[0]!r} is not one of 1 to {len(names)}, {', '.join(names)}")
    arguments.parts = [name for name in names if name in chosen]
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cpu" and not arguments.shrink:
        parser.error("there is no GPU; --shrink runs all parts with tiny models on the CPU")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
