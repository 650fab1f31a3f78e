"""What software is for: Debian's packages, a line that describes each, and the tags that Debian's people gave it.

    python -m benchmarks.prepare package_tags

On Debian, with nothing but apt: its own index of packages is read, fetched into a temporary folder where the system has
none. The descriptions have the licences of their packages, so they are read here and not handed on. Written is
packages.jsonl: {"id", "text", "labels", "source"}. The text is the synopsis, the labels are the tags (debtags) that at
least 250 packages have; `source` is the source package, whose parts have much the same synopsis: they must stay on one
side of a split. Only packages with tags are taken, and each synopsis once. Tags are given by volunteers: one that is
there is right more surely than one that is not is wrong, so no score can be perfect.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

RAREST = 250  # packages that have a tag


def read_index() -> str:
    """All records of the packages that apt knows, with an empty line between two."""
    found = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    if "\nTag: " not in found:
        raise SystemExit("apt knows no packages with tags: run apt-get update, on Debian 12 or later")
    return found


def read_packages(index: str) -> Iterator[dict[str, str | list[str]]]:
    """{"id", "text", "labels", "source"} of each package with tags."""
    for record in index.split("\n\n"):
        fields = dict(part.split(": ", 1) for part in record.replace("\n ", " ").split("\n") if ": " in part)
        if "Tag" in fields and "Description" in fields:
            yield {
                "id": fields["Package"],
                "text": fields["Description"],
                "labels": sorted(tag.strip() for tag in fields["Tag"].split(",")),
                "source": fields.get("Source", fields["Package"]).split(" ")[0],
            }


def prepare(folder: Path) -> None:
    once = {str(row["text"]).lower(): row for row in read_packages(read_index())}
    counts = Counter(tag for row in once.values() for tag in row["labels"])
    kept = {tag for tag, count in counts.items() if count >= RAREST and not tag.endswith("::TODO")}
    with (folder / "packages.jsonl").open("w", encoding="utf-8") as stream:
        for row in once.values():
            row["labels"] = [tag for tag in row["labels"] if tag in kept]
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
