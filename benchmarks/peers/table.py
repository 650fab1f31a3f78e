"""Print one table of several records of benchmarks.peers:

    python -m benchmarks.peers.table [benchmarks/history ...] [--commit SHA]

Each ratio is that of the two runs of one round. The table has the median (minimum - maximum) over the rounds of all
records; "not resolved" means that 1 lies between them. Only the records of one commit are used, by default the newest.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peers.compare_trainers import FIGURES, OURS, ratios

SPEED, MEMORY, START = FIGURES


def read_records(paths: Sequence[Path], commit: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (commit, its records of peers, oldest first). Raises SystemExit if there is none."""
    files = [file for path in paths for file in (sorted(path.glob("*-peers.json")) if path.is_dir() else [path])]
    found = sorted((record.read(file) for file in files), key=lambda content: str(content["date"]))
    found = [content for content in found if content["benchmark"] == "peers"]
    if not commit and found:
        commit = found[-1]["commit"]
    chosen = [content for content in found if content["commit"].startswith(commit)]
    if not chosen:
        raise SystemExit(f"no record of benchmarks.peers of commit {commit or 'any'} in {', '.join(map(str, paths))}")
    return commit, chosen


def rounds(contents: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[float], dict[str, list[float]]]]:
    """Yield (workload, peer, [our samples/s, theirs], {figure: ours over theirs in each round of every record})."""
    ours: dict[tuple[str, str], list[float]] = defaultdict(list)
    theirs: dict[tuple[str, str], list[float]] = defaultdict(list)
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for content in contents:
        sides = {(row["work"], row["variant"]): row["runs"] for row in content["results"]}
        for (workload, peer), runs in sides.items():
            if peer != OURS:
                our_runs = sides[workload, OURS]
                ours[workload, peer] += [run[SPEED] for run in our_runs]
                theirs[workload, peer] += [run[SPEED] for run in runs]
                for figure in FIGURES:
                    pairs = ([run[figure] for run in side] for side in (our_runs, runs))
                    found[workload, peer][figure] += ratios(*pairs)
    for (workload, peer), by_figure in found.items():
        speeds = [statistics.median(side[workload, peer]) for side in (ours, theirs)]
        yield workload, peer, speeds, by_figure


def format_cell(values: Sequence[float]) -> str:
    """Return median (minimum - maximum), such as "1.53 (1.46 - 1.59)", with "not resolved" where it applies."""
    text = f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"
    return text if len(values) > 1 and not min(values) <= 1 <= max(values) else f"{text}, not resolved"


def table(contents: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with a line per workload and peer."""
    lines = [
        "| workload | peer | rounds | samples/s: ours, theirs | times as fast | of its memory | starts times as soon |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload, peer, (ours, theirs), found in sorted(rounds(contents), key=lambda row: row[:2]):
        soon = [1 / value for value in found[START]]
        lines.append(
            f"| `{workload}` | {peer} | {len(soon)} | {ours:.1f}, {theirs:.1f} | {format_cell(found[SPEED])} | "
            f"{format_cell(found[MEMORY])} | {format_cell(soon)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "records", nargs="*", type=Path, default=[record.HISTORY], help="records, or folders of records"
    )
    parser.add_argument("--commit", default="", help="the beginning of its hash")
    arguments = parser.parse_args()
    commit, contents = read_records(arguments.records, arguments.commit)
    print(f"commit {commit[:7]}, {len(contents)} records of {contents[0]['date'][:10]}\n\n{table(contents)}")


if __name__ == "__main__":
    main()
