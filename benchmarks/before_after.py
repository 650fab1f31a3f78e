"""Compare the working tree with a commit: losses bit for bit, or the speed of a training step.

    python -m benchmarks.before_after COMMIT [RECIPE ...] [--steps N] [--section.key=value ...]
    python -m benchmarks.before_after COMMIT --time WORKLOAD [--runs N] [--shrink] [--section.key=value ...]

The first trains each recipe for some steps on a CPU with both trees, and compares every loss and metric of their logs.
The exit code is 1 if a number differs. The second times the training step of a workload (workloads.py) with both trees
in turn, so that a slower machine slows both, and prints the ratio of each pair. COMMIT is any name that git knows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loading import format_spread
from benchmarks.timed_training import WARM_UP
from benchmarks.workloads import WORKLOADS
from data.notes import count_of

ROOT = Path(__file__).parent.parent
RECIPES = ("movie_reviews", "review_sentences", "django_messages", "review_modernbert")  # BERT, GPT-2, T5, ModernBERT
# What a log says of the machine; everything else in it is mathematics.
OF_THE_MACHINE = ("seconds", "memory", "per_second", "micro_batch")


def extract(commit: str, folder: Path) -> Path:
    """Write the files of a commit to a folder, and return it; SystemExit with git's own sentence."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def call(tree: Path, *command: str) -> None:
    """Run python with the packages of a tree; SystemExit with the last line of a failure."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise SystemExit(f"error: {tree}: {lines[-1] if lines else f'exit code {done.returncode}'}")


def read_numbers(log: Path) -> dict[str, Any]:
    """Return {"line key": number} of a metrics.jsonl, without what the machine decides."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name} {key}", inner)
        elif isinstance(value, int | float) and not any(word in name for word in OF_THE_MACHINE):
            found[name] = value

    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "step" in row:
            for key, value in row.items():
                add(f"step {row['step']} {key}", value)
    return found


def compare_losses(trees: Sequence[Path], recipe: str, settings: Sequence[str], steps: int) -> bool:
    """Train a recipe with both trees, and print whether their numbers are equal; return that."""
    numbers = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, tree in enumerate(trees):
            run = Path(scratch) / str(i)
            given = [f"--train.max_steps={steps}", f"--eval.every_steps={steps}", "--log.every_steps=1"]
            given += ["--run.device=cpu", "--checkpoint.keep=best", f"--run.folder={run}", *settings]
            call(tree, "-m", "engine.train", recipe, *given)
            numbers.append(read_numbers(run / "metrics.jsonl"))
    print(f"{recipe}: {describe(*numbers)}", flush=True)
    return numbers[0] == numbers[1]


def describe(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return a sentence: all numbers are equal, or the first that differ."""
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not different:
        return f"all {len(before)} numbers are identical"
    first = different[0]
    differ = f"{count_of(len(different), 'number')} {'differs' if len(different) == 1 else 'differ'}"
    return f"{differ}, first {first}: {before.get(first)!r} before, {after.get(first)!r} after"


def compare_speed(trees: Sequence[Path], arguments: argparse.Namespace, settings: Sequence[str]) -> None:
    """Time a workload with both trees in turn, and print the ratio of each pair with its spread."""
    rates: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        shrink = ["--shrink"] * arguments.shrink
        call(trees[1], "-m", "benchmarks.workloads", arguments.time, str(scratch), *shrink)
        recipe, result = scratch / arguments.time / "recipe.toml", scratch / "result.json"
        for i in range(2 * arguments.runs):
            folder = f"--run.folder={scratch / f'run-{i}'}"
            command = ["-m", "benchmarks.timed_training", str(result), str(arguments.steps), str(recipe), folder]
            call(trees[i % 2], *command, *settings)
            rates[i % 2].append(json.loads(result.read_text(encoding="utf-8"))["samples_per_second"])
    ratios = [after / before for before, after in zip(*rates, strict=True)]
    resolved = "" if min(ratios) > 1 or max(ratios) < 1 else ", not resolved"
    print(f"{arguments.time}: {format_spread(ratios).strip()} times the examples per second{resolved}")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return (own arguments, settings of the engine)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before_after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--time", metavar="WORKLOAD", choices=WORKLOADS, help="compare the speed, not the losses")
    parser.add_argument("--steps", type=int, default=20, help=f"steps of a run; with --time a multiple of {WARM_UP}")
    parser.add_argument("--runs", type=int, default=5, help="with --time: runs of each tree")
    parser.add_argument("--shrink", action="store_true", help="with --time: a tiny model, to try the command")
    arguments, settings = parser.parse_known_args(argv)
    if stray := [text for text in settings if not text.startswith("--") or "=" not in text]:
        parser.error(f"{stray[0]!r} must have the form --section.key=value")
    return arguments, settings


def main(argv: Sequence[str]) -> int:
    """Compare, and return 1 if a loss differs."""
    arguments, settings = parse(argv)
    with tempfile.TemporaryDirectory() as before:
        trees = (extract(arguments.commit, Path(before)), ROOT)
        if arguments.time:
            compare_speed(trees, arguments, settings)
            return 0
        equal = [compare_losses(trees, recipe, settings, arguments.steps) for recipe in arguments.recipes or RECIPES]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
