"""Put the faults F1 to F20 to the engine and count what it survives; see README.md.

python -m tests.faults [--count N | --sample] [--seed S] [--output FILE] [--list] [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of a process with threads may hang
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402

torch.set_num_threads(1)
if importlib.util.find_spec("pytest") is None:
    raise SystemExit('tests.faults needs what the tests need: pip install -e ".[test]"')

from faults.catalogue import FAULTS, Fault  # noqa: E402
from faults.runs import Result, as_json, without_paths  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the named faults and print a line for each; return 1 if any try failed."""
    arguments = parse(argv)
    if arguments.list:
        for name, fault in FAULTS.items():
            print(f"{name:<14} {fault.full:>6}  {fault.what}")
        return 0
    rows: list[dict[str, Any]] = []
    for name in arguments.names or FAULTS:
        count = FAULTS[name].sample if arguments.sample else arguments.count
        row = run_fault(name, FAULTS[name], count, arguments.seed)
        rows.append(row)
        print_row(row)
        if arguments.output:
            write_report(arguments.output, rows, arguments.seed)
    return int(any(row["survived"] < row["tries"] for row in rows))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}; none: all")
    parser.add_argument("--count", type=int, default=0, help="tries of each fault; 0: the full count of each")
    parser.add_argument("--sample", action="store_true", help="the small counts of the tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the report; rows of other faults in it are kept")
    parser.add_argument("--list", action="store_true", help="print the names, full counts and meanings")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in FAULTS]:
        parser.error(f"no fault {', '.join(unknown)}; --list shows them")
    return arguments


def run_fault(name: str, fault: Fault, count: int, seed: int) -> dict[str, Any]:
    """Return the row of a fault: its counts, the seed, the seconds it took, and those of a CPU."""
    row: dict[str, Any] = {"fault": name, "what": fault.what, "seed": seed}
    since, worked = time.monotonic(), sum(os.times()[:4])  # of this process and its children
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        if reason := fault.cannot_run():
            return row | as_json(Result()) | {"skipped": reason, "seconds": 0, "cpu_seconds": 0}
        result = fault.run(count or fault.full, seed, Path(folder))
        result.failures = [without_paths(text, Path(folder)) for text in result.failures]
    seconds = {"seconds": round(time.monotonic() - since), "cpu_seconds": round(sum(os.times()[:4]) - worked)}
    return row | as_json(result) | seconds


def print_row(row: dict[str, Any]) -> None:
    skipped = f"  skipped: {row['skipped']}" if "skipped" in row else ""
    cost = f"{row['seconds']} s, {row['cpu_seconds']} s of a CPU"
    print(f"{row['fault']:<14} {row['survived']} of {row['tries']}  {cost}  {row['what']}{skipped}")
    for kind, times in row["details"].items():
        print(f"{'':<16}{kind}: {times}")
    for failure in row["failures"][:10]:
        print(f"{'':<16}FAILED {failure}")
    sys.stdout.flush()


def write_report(path: Path, rows: list[dict[str, Any]], seed: int) -> None:
    """Write the rows to a report, in the place of older rows of the same faults."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TESTS, capture_output=True, text=True).stdout.strip()
    old = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
    new = {row["fault"]: row | {"commit": commit} for row in rows}
    merged = {row["fault"]: row for row in old} | new
    report = {
        "schema": 1,
        "command": "python -m tests.faults --output benchmarks/results/faults.json",
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "results": [merged[name] for name in FAULTS if name in merged],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
