"""Compare two records of benchmarks.throughput, or plot all records of a folder:

    python -m benchmarks.compare A.json B.json
    python -m benchmarks.compare benchmarks/history --plot history.png

Each rate is divided by the rate of a matrix product timed in the same run. This removes the machine's own variation.
A difference is reported only if the runs of A and B do not overlap and their medians differ by more than NOISE.
Everything else is "within noise". A slower result never makes the command fail.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

NOISE = 0.03  # relative difference of medians below which nothing is reported, even if the runs do not overlap
Rates = dict[tuple[str, str], list[float]]  # {(workload, variant): one number per run}


def normalise_rates(content: dict[str, Any]) -> Rates:
    """Return the examples per TFLOP of the reference product of every run."""
    return {
        (row["work"], row["variant"]): [
            run["samples_per_second"] / run["gemm_flops_per_second"] * 1e12 for run in row["runs"]
        ]
        for row in content["results"]
    }


def peak_memory(content: dict[str, Any]) -> Rates:
    """Return the peak memory of every run, in MB."""
    return {
        (row["work"], row["variant"]): [float(run["peak_memory_mb"]) for run in row["runs"]]
        for row in content["results"]
    }


def verdict(a: Sequence[float], b: Sequence[float], words: tuple[str, str]) -> str:
    """Return the ratio b / a of the medians, and words[0] below 1, words[1] above 1, or "within noise"."""
    ratio = statistics.median(b) / statistics.median(a)
    apart = max(a) < min(b) or max(b) < min(a)
    outcome = words[ratio > 1] if apart and abs(ratio - 1) > NOISE else "within noise"
    return f"{ratio:.2f} {outcome}"


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return a line per case; it says so where only one record has the case."""
    rates, others = normalise_rates(a), normalise_rates(b)
    sizes, other_sizes = peak_memory(a), peak_memory(b)
    if not rates.keys() & others.keys():
        return ["the two records have no case in common"]
    lines = []
    for key in rates | others:
        name = " ".join(key)
        if key not in rates or key not in others:
            lines.append(f"{name}: only in {'A' if key in rates else 'B'}")
            continue
        speed = verdict(rates[key], others[key], ("slower", "faster"))
        memory = verdict(sizes[key], other_sizes[key], ("less memory", "more memory"))
        counts = f"{len(rates[key])} and {len(others[key])} runs"
        lines.append(f"{name}: rate {speed}, peak memory {memory} ({counts})")
    return lines


def describe(path: Path, content: dict[str, Any]) -> str:
    """Return a line on the commit, machine and torch version of a record."""
    machine = content["machine"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    changed = " with changes" if content["changed"] else ""
    return f"{path.name}: commit {content['commit'][:7]}{changed}, {where}, torch {content['versions']['torch']}"


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the rate of each case over the records, relative to its first record.

    Records of different machines are separate lines. Raises SystemExit if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for position, content in enumerate(records):
        machine = content["machine"]
        where = ", ".join(machine["gpus"]) or machine["cpu"]
        for key, rates in normalise_rates(content).items():
            series.setdefault(f"{' '.join(key)} ({where})", []).append((position, rates))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        first = statistics.median(points[0][1])
        medians = [statistics.median(rates) / first for _, rates in points]
        below = [m - min(rates) / first for m, (_, rates) in zip(medians, points, strict=True)]
        above = [max(rates) / first - m for m, (_, rates) in zip(medians, points, strict=True)]
        axes.errorbar([position for position, _ in points], medians, (below, above), marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(records)), [f"{r['commit'][:7]}\n{r['date'][:10]}" for r in records])
    axes.set_ylabel("rate over the reference product, first record = 1")
    axes.legend(fontsize="small")
    figure.savefig(path)


def main(argv: Sequence[str]) -> int:
    """Print the comparison, or plot the records; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="two files, or a folder of records")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot all records to this .png or .svg file")
    arguments = parser.parse_args(argv)
    paths = [file for path in arguments.records for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    named = [(path, record.read(path)) for path in paths]
    named = [(path, content) for path, content in named if content["benchmark"] == "throughput"]
    if arguments.plot and named:
        plot([content for _, content in named], arguments.plot)
        print(f"{len(named)} records plotted in {arguments.plot}")
        return 0
    if len(named) != 2:
        parser.error(f"found {len(named)} records of benchmarks.throughput; give two, or --plot for any number")
    (path_a, a), (path_b, b) = named
    print(f"A  {describe(path_a, a)}\nB  {describe(path_b, b)}\nB / A:")
    print("\n".join(compare(a, b)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
