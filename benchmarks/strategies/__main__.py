"""Show that ranks, strategy and accumulation change no loss, and what they change in HF Trainer:

    python -m benchmarks.strategies [--steps 20] [--output FILE]

Four small random models train for 20 steps of 16 examples of data/samples, in fp32 without dropout: on 1 process, DDP
on 2 and 4, FSDP on 2 and 4, HSDP on 2 x 2 (two launches of torchrun, as of two machines), each with 1 and 4
micro-batches a step and rank. Shown is the largest difference of a loss from that of one process with one micro-batch,
relative to it. HF Trainer takes the same examples in the same micro-batches, from the same weights; its losses are
compared with its own on one process. Where examples have different numbers of targets, a mean of the means of
micro-batches and ranks is another number than the mean over all targets. "x 4, then" means that the first loss is four
times that of one process: Trainer then adds means up, and the rest of the difference is that of a mean of means.

The rows for HF Trainer need the packages transformers and accelerate; without them they are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.strategies.launch import launch
from benchmarks.strategies.models_and_data import SUBJECTS, write_subject
from benchmarks.strategies.ranks import ACCUMULATIONS
from engine import config as configs

OURS = {"1 process": ("one", 1), "DDP 2": ("ddp", 2), "DDP 4": ("ddp", 4), "FSDP 2": ("fsdp", 2), "FSDP 4": ("fsdp", 4)}
OURS |= {"HSDP 2x2": ("hsdp", 4)}
TRAINER = {"HF Trainer, 1 process": ("hf", 1), "HF Trainer, DDP 2": ("hf", 2), "HF Trainer, DDP 4": ("hf", 4)}
PEER = ("transformers", "accelerate")


def train_all(folder: Path, with_trainer: bool) -> None:
    """Run every strategy on every number of ranks."""
    path = str(folder)
    launch("benchmarks.strategies.ranks", [path, "one"], 1)
    for ranks in (2, 4):
        launch("benchmarks.strategies.ranks", [path, "ddp", "fsdp"], ranks)
    launch("benchmarks.strategies.ranks", [path, "hsdp"], 4, machines=2)
    for ranks in (1, 2, 4) if with_trainer else ():
        launch("benchmarks.strategies.trainer", [path], ranks)


def compare(folder: Path, variants: dict[str, tuple[str, int]]) -> list[dict[str, Any]]:
    """Return a row for each variant, accumulation and subject; the first variant is what the others are compared to."""
    rows = []
    first: dict[str, list[float]] = {}
    for variant, (strategy, ranks) in variants.items():
        found = json.loads((folder / f"losses.{strategy}.{ranks}.json").read_text(encoding="utf-8"))
        for accumulation in ACCUMULATIONS:
            for name, by_accumulation in found.items():
                losses = by_accumulation[str(accumulation)]
                reference = first.setdefault(name, losses)
                factor = round(losses[0] / reference[0])  # HF Trainer may log a sum of means
                worst = max(abs(a / factor - b) / abs(b) for a, b in zip(losses, reference, strict=True))
                row = {"work": name, "variant": variant, "accumulation": accumulation, "factor": factor}
                rows.append(row | {"largest_relative_difference": worst, "losses": losses})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    names = [*SUBJECTS]
    lines = [f"| | accumulation | {' | '.join(names)} |", f"|---|---{'|---' * len(names)}|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for accumulation in ACCUMULATIONS:
            cells = [
                ("" if row["factor"] == 1 else f"x {row['factor']}, then ")
                + (f"{row['largest_relative_difference']:.0e}" if row["largest_relative_difference"] else "0")
                for name in names
                for row in rows
                if (row["work"], row["variant"], row["accumulation"]) == (name, variant, accumulation)
            ]
            lines.append(f"| {variant} | {accumulation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison, print its table, write its record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.strategies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run; at most one epoch, 20")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    arguments = parser.parse_args()
    if not 1 <= arguments.steps <= 20:
        parser.error("--steps must be from 1 to 20")
    with_trainer = all(importlib.util.find_spec(package) for package in PEER)
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in SUBJECTS:
            recipe = write_subject(name, folder, arguments.steps)
            (folder / name / "recipe.toml").write_text(configs.to_toml(recipe), encoding="utf-8")
        train_all(folder, with_trainer)
        rows = compare(folder, OURS) + (compare(folder, TRAINER) if with_trainer else [])
    print(table(rows))
    if not with_trainer:
        print(f"without HF Trainer, which needs {' and '.join(PEER)}")
    print(f"{time.monotonic() - since:.0f} s")
    if arguments.output:
        record.save(arguments.output, record.describe("strategies", rows))


if __name__ == "__main__":
    main()
