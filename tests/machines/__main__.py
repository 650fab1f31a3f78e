"""Put runs on two machines, which are network namespaces, to the faults of several machines; count what they survive.

python -m tests.machines [--count N] [--seed S] [--output FILE] [--list] [NAME ...]
"""

from __future__ import annotations

import argparse
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

from faults.runs import as_json, without_paths  # noqa: E402

from machines.scenarios import SCENARIOS, run_scenario  # noqa: E402


def main(argv: list[str]) -> int:
    """Run the named scenarios and print a line for each; return 1 if any try failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}; none: all")
    parser.add_argument("--count", type=int, default=10, help="tries of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the report; rows of other names in it are kept")
    parser.add_argument("--list", action="store_true", help="print the names and their meanings")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in SCENARIOS]:
        parser.error(f"no {', '.join(unknown)}; --list shows the names")
    if arguments.list:
        for name, (what, _) in SCENARIOS.items():
            print(f"{name:<12} {what}")
        return 0
    rows: list[dict[str, Any]] = []
    for name in arguments.names or SCENARIOS:
        rows.append(row := run_row(name, arguments.count, arguments.seed))
        print_row(row)
        if arguments.output:
            write_report(arguments.output, rows)
    return int(any(row["survived"] < row["tries"] for row in rows))


def run_row(name: str, count: int, seed: int) -> dict[str, Any]:
    """Return the row of a scenario: its counts, the seed, and the seconds it took."""
    since = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="machines-") as folder:
        result, reason = run_scenario(name, count, seed, Path(folder))
        result.failures = [without_paths(text, Path(folder)) for text in result.failures]
    row = {"scenario": name, "what": SCENARIOS[name][0], "seed": seed} | as_json(result)
    return row | {"seconds": round(time.monotonic() - since)} | ({"skipped": reason} if reason else {})


def print_row(row: dict[str, Any]) -> None:
    skipped = f"  skipped: {row['skipped']}" if "skipped" in row else ""
    print(f"{row['scenario']:<12} {row['survived']} of {row['tries']}  {row['seconds']} s  {row['what']}{skipped}")
    for kind, times in row["details"].items():
        print(f"{'':<14}{kind}: {times}")
    for failure in row["failures"][:10]:
        print(f"{'':<14}FAILED {failure}")
    sys.stdout.flush()


def write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows to a report, in the place of older rows of the same names."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TESTS, capture_output=True, text=True).stdout.strip()
    old = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
    merged = {row["scenario"]: row for row in old} | {row["scenario"]: row | {"commit": commit} for row in rows}
    report = {
        "schema": 1,
        "command": "python -m tests.machines --count N --output benchmarks/results/machines.json",
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "results": [merged[name] for name in SCENARIOS if name in merged],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
