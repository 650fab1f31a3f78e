"""Runs engine.train with steps of a tenth of a second, and notes its process: `python -m machines.paced RECIPE ...`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from faults.victims import note_ids

from engine import train
from engine.cli import run_command

SECONDS = 0.1  # of a step


def main(argv: list[str]) -> int:
    logs = Path(argv[0]).parent
    (logs / f"process.{os.getpid()}").write_text(os.environ["RANK"])
    note_ids(logs / f"ids.{os.getpid()}")
    original = train.set_learning_rate

    def paced(*args: Any) -> None:
        time.sleep(SECONDS)
        original(*args)

    train.set_learning_rate = paced  # type: ignore[attr-defined]
    return train.main(argv)


if __name__ == "__main__":
    sys.argv[0] = "engine.train"
    run_command(main)
