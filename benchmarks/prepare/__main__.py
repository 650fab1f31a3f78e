"""Prepare data that may be used but not redistributed: fetch it from its source and write training files.

    python -m benchmarks.prepare NAME ...

This writes datasets/NAME/. The file benchmarks/prepare/NAME.py states the content, the source and the licence.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = (
    "capitals",
    "chinese_poems",
    "chinese_sentiment",
    "clothes_collages",
    "django_messages",
    "fashion_mnist",
    "package_descriptions",
    "package_tags",
    "peoples_daily",
)


def main(argv: list[str]) -> int:
    """Prepare the named data sets; return the exit code."""
    usage = f"python -m benchmarks.prepare NAME ...; names are {', '.join(NAMES)}"
    if {"--help", "-h"} & {*argv}:
        print(usage)
        return 0
    if unknown := [name for name in argv if name not in NAMES]:
        print(f"error: no data set {', '.join(map(repr, unknown))}: {usage}", file=sys.stderr)
        return 2
    if not argv:
        print(f"error: name a data set: {usage}", file=sys.stderr)
        return 2
    for name in argv:
        folder = Path("datasets") / name
        folder.mkdir(parents=True, exist_ok=True)
        importlib.import_module(f"benchmarks.prepare.{name}").prepare(folder)
        print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
