"""Dated records of benchmark runs: the results, the commit, the machine and the versions of the packages.

Example: benchmarks/history/2026-11-24T20-15-00-0c2d110-throughput.json. `python -m benchmarks.compare A B` reads two.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data.writing import to_json, write_text

SCHEMA = 1
HISTORY = Path(__file__).parent / "history"
FOLDERS = ("--files", "--folder", "--history", "--output")
PACKAGES = ("torch", "numpy", "tokenizers", "transformers", "accelerate", "lightning", "timm")


def write(folder: Path, benchmark: str, results: list[dict[str, Any]], argv: list[str] | None = None) -> Path:
    """Write `results` to a new file in `folder` and return its path.

    results: one row per case, {"work": ..., "variant": ..., "runs": [{figure: number}, ...]}.
    """
    content = describe(benchmark, results, argv)
    path = new_path(folder, benchmark, content)
    save(path, content)
    return path


def describe(benchmark: str, results: list[dict[str, Any]], argv: list[str] | None = None) -> dict[str, Any]:
    """Return the content of a record: `results`, with the date, commit, machine and versions of now."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "arguments": without_folders(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }


def new_path(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Return the path of a new record, named after its date, its commit and `name`."""
    date = content["date"].partition("+")[0].replace(":", "-")
    return folder / f"{date}-{content['commit'][:7] or 'nocommit'}-{name}.json"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a record at once, so that a run that is killed leaves the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, [to_json(content, indent=1), "\n"])


def without_folders(argv: Sequence[str]) -> list[str]:
    """Return the arguments that affect the measurement, without those that name folders of this machine."""
    kept: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, has_value, _ = argument.partition("=")
        if name not in FOLDERS:
            kept.append(argument)
        elif not has_value:
            next(rest, None)
    return kept


def read(path: Path) -> dict[str, Any]:
    """Return the content of a record. Raises SystemExit with one sentence if the file is not a record."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "results" not in content:
        raise SystemExit(f"{path}: not the record of a benchmark with schema {SCHEMA}")
    return content


def machine() -> dict[str, Any]:
    """Return the processor, cores, memory, GPUs and load."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "load": round(os.getloadavg()[0], 2),  # processes over the last minute, this benchmark included
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA and the installed packages."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str:
    """Return the output of git in this checkout; empty if there is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HISTORY.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
