"""Real data that may be read but not handed on: one command fetches it from where it is and writes files to train on.

    python -m benchmarks.prepare NAME

writes datasets/NAME/. What each is, where it comes from and its licence is said in benchmarks/prepare_NAME.py.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("prepare_") for path in HERE.glob("prepare_*.py"))


def main(argv: list[str]) -> int:
    """Prepare the data sets named."""
    if not argv or not set(argv) <= set(NAMES):
        print(f"python -m benchmarks.prepare NAME ...; names are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for name in argv:
        folder = Path("datasets") / name
        folder.mkdir(parents=True, exist_ok=True)
        importlib.import_module(f"benchmarks.prepare_{name}").prepare(folder)
        print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
