"""Measure the host memory of each rank while a model of 297 M parameters is loaded and trained on a CPU:

    python -m benchmarks.sharded_memory [--size 300M] [--output FILE]

A BERT with random weights in fp32 is written once. 1, 2 and 4 ranks then load it and take 3 steps of 4 short texts,
with distributed.strategy = ddp and fsdp. For each phase the table has the memory of the rank that needs most, above
that of its process before it read the model (torch alone needs some 300 MB). Beside it is what the formula says:

- load: 4 bytes a parameter, of fsdp divided by W.
- train: 16 bytes a parameter (weight, gradient, two moments), of fsdp divided by W. fsdp also gathers what is outside
  of the layers, and two layers, with the gradient of one; each needs a copy for the exchange.
- evaluate: with fsdp the whole model is gathered once more.

Anonymous memory is counted (RssAnon), and its peak in the phase (VmHWM). ddp on 4 ranks is only loaded, since training
it needs 20 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.sharded_memory.big_model import SIZES
from benchmarks.strategies.launch import launch

RUNS = (("ddp", 1, "train"), ("ddp", 2, "train"), ("fsdp", 2, "train"), ("ddp", 4, "load"), ("fsdp", 4, "train"))
MB = 1e6


def formula(phase: str, strategy: str, ranks: int, sizes: dict[str, int]) -> float:
    """Return the bytes of a rank that are expected at the peak of a phase."""
    parameters, outside, layer = sizes["parameters"], sizes["outside_layers"], sizes["largest_layer"]
    if strategy == "ddp":
        return parameters * (4 if phase == "load" else 16)
    if phase == "load":
        return parameters * 4 / ranks
    if phase == "evaluate":
        return parameters * (12 / ranks + 4)  # the gradients are freed
    return parameters * 16 / ranks + 4 * (3 * outside + 4 * layer)


def read_run(folder: Path, strategy: str, ranks: int) -> list[dict[str, Any]]:
    """Return a row for each phase of a run: that of the rank that needs most."""
    measured = [
        json.loads((folder / f"memory.{strategy}.{ranks}.{rank}.json").read_text(encoding="utf-8"))
        for rank in range(ranks)
    ]
    sizes, rows = measured[0], []
    for phase in sizes["phases"]:
        above = [
            {name: one["phases"][phase][name] - one["phases"]["start"][name] for name in ("RssAnon", "RssFile")}
            | {"peak": one["phases"][phase]["VmHWM"] - sum(one["phases"]["start"][n] for n in ("RssAnon", "RssFile"))}
            for one in measured
        ]
        if phase not in ("start", "first step"):
            worst = {name: max(one[name] for one in above) for name in above[0]}
            expected = round(formula(phase, strategy, ranks, sizes))
            work = {"work": phase, "variant": f"{strategy} {ranks}", "parameters": sizes["parameters"]}
            rows.append(
                work | {"expected_bytes": expected, "after_bytes": worst["RssAnon"], "peak_bytes": worst["peak"]}
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown, in MB."""
    lines = ["| ranks | phase | formula | peak | after it |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = " | ".join(f"{row[name] / MB:,.0f}" for name in ("expected_bytes", "peak_bytes", "after_bytes"))
        lines.append(f"| {row['variant']} | {row['work']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharded_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="300M")
    parser.add_argument("--runs", default="", help="comma-separated, such as fsdp-2,fsdp-4; default all")
    parser.add_argument("--output", type=Path, help="a JSON file for the record")
    arguments = parser.parse_args()
    chosen = arguments.runs.split(",") if arguments.runs else [f"{strategy}-{ranks}" for strategy, ranks, _ in RUNS]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write = [sys.executable, "-m", "benchmarks.sharded_memory.big_model", arguments.size, str(folder)]
        subprocess.run(write, check=True)
        for strategy, ranks, last in RUNS:
            if f"{strategy}-{ranks}" in chosen:
                launch("benchmarks.sharded_memory.ranks", [str(folder), strategy, last], ranks)
                rows += read_run(folder, strategy, ranks)
                if arguments.output:  # after each run, since the next may be killed
                    record.save(arguments.output, record.describe("sharded_memory", rows))
    print(f"{rows[0]['parameters']:,} parameters; MB of a rank above the process before\n{table(rows)}")


if __name__ == "__main__":
    main()
