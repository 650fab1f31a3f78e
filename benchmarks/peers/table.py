"""One table over several runs of benchmarks.peers:

    python -m benchmarks.peers.table [benchmarks/history ...] [--commit SHA]

A ratio is of the two runs of one round; over the rounds of all records its median (least - most) is printed, and "not
resolved" where 1 lies among them. Only records of one commit: that of the newest record, if none is named.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peers.__main__ import FIGURES, OURS, ratios

SPEED, MEMORY, START = FIGURES


def records(places: Sequence[Path], commit: str) -> tuple[str, list[dict[str, Any]]]:
    """(commit, its records of peers, oldest first); SystemExit where there is none."""
    files = [file for place in places for file in (sorted(place.glob("*-peers.json")) if place.is_dir() else [place])]
    found = sorted((record.read(file) for file in files), key=lambda content: str(content["date"]))
    found = [content for content in found if content["benchmark"] == "peers"]
    if not commit and found:
        commit = found[-1]["commit"]
    chosen = [content for content in found if content["commit"].startswith(commit)]
    if not chosen:
        raise SystemExit(f"no record of benchmarks.peers of commit {commit or 'any'} in {', '.join(map(str, places))}")
    return commit, chosen


def rounds(contents: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[float], dict[str, list[float]]]]:
    """For each work and peer: (work, peer, our samples/s, {figure: ours over theirs in each round of every record})."""
    ours: dict[tuple[str, str], list[float]] = defaultdict(list)
    theirs: dict[tuple[str, str], list[float]] = defaultdict(list)
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for content in contents:
        sides = {(row["work"], row["variant"]): row["runs"] for row in content["results"]}
        for (work, peer), runs in sides.items():
            if peer != OURS:
                of_ours = sides[work, OURS]
                ours[work, peer] += [run[SPEED] for run in of_ours]
                theirs[work, peer] += [run[SPEED] for run in runs]
                for figure in FIGURES:
                    pairs = ([run[figure] for run in side] for side in (of_ours, runs))
                    found[work, peer][figure] += ratios(*pairs)
    for (work, peer), by_figure in found.items():
        speeds = [statistics.median(side[work, peer]) for side in (ours, theirs)]
        yield work, peer, speeds, by_figure


def cell(values: Sequence[float]) -> str:
    """1.53 (1.46 - 1.59), and whether it says anything."""
    text = f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"
    return text if len(values) > 1 and not min(values) <= 1 <= max(values) else f"{text}, not resolved"


def table(contents: Sequence[dict[str, Any]]) -> str:
    """In Markdown, a line for each work and peer."""
    lines = [
        "| work | beside | rounds | samples/s: ours, theirs | times as fast | of its memory | starts times as soon |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, peer, (ours, theirs), found in sorted(rounds(contents), key=lambda row: row[:2]):
        soon = [1 / value for value in found[START]]
        lines.append(
            f"| `{work}` | {peer} | {len(soon)} | {ours:.1f}, {theirs:.1f} | {cell(found[SPEED])} | "
            f"{cell(found[MEMORY])} | {cell(soon)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, default=[record.HISTORY], help="records, or folders of them")
    parser.add_argument("--commit", default="", help="the beginning of its hash")
    arguments = parser.parse_args()
    commit, contents = records(arguments.places, arguments.commit)
    print(f"commit {commit[:7]}, {len(contents)} records of {contents[0]['date'][:10]}\n\n{table(contents)}")


if __name__ == "__main__":
    main()
