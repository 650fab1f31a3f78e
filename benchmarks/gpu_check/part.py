"""One part in a process of its own; __main__.py starts it: python -m benchmarks.gpu_check.part NAME JOB"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_check.check import Check


def main(name: str, job: str) -> None:
    """Run a part. job: JSON with the fields of Check, and `seconds` instead of `end`."""
    given = json.loads(job)
    device = torch.device(given["device"], 0) if given["device"] == "cuda" else torch.device("cpu")
    paths = {field: Path(given[field]) for field in ("files", "scratch", "rows")}
    check = Check(device, given["shrink"], end=time.monotonic() + given["seconds"], **paths)
    importlib.import_module(f"benchmarks.gpu_check.{name}").run(check)


if __name__ == "__main__":
    main(*sys.argv[1:])
