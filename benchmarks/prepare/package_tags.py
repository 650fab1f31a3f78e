"""Tags of software: the one-line synopses of Debian's packages with the tags that Debian's volunteers gave them.

    python -m benchmarks.prepare package_tags

Source: apt's index of packages, on Debian. The descriptions have the licences of their packages and are therefore not
redistributed.

Output: packages.jsonl, {"id", "text", "labels", "source"}. The text is the synopsis; the labels are the tags (debtags)
that at least 250 packages have. `source` is the source package: its binary packages have similar synopses and must stay
in the same split. Only packages with tags are used, and each synopsis once. Volunteers leave out tags more often than
they give wrong ones, so no score can be perfect.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MIN_PACKAGES = 250  # with a tag


def read_index() -> str:
    """Return the records of all packages that apt knows, separated by empty lines."""
    found = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    if "\nTag: " not in found:
        raise SystemExit("apt knows no packages with tags; run apt-get update on Debian 12 or later")
    return found


def read_packages(index: str) -> Iterator[dict[str, str | list[str]]]:
    """Yield {"id", "text", "labels", "source"} of each package with tags."""
    for record in index.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in record.replace("\n ", " ").split("\n") if ": " in line)
        if "Tag" in fields and "Description" in fields:
            yield {
                "id": fields["Package"],
                "text": fields["Description"],
                "labels": sorted(tag.strip() for tag in fields["Tag"].split(",")),
                "source": fields.get("Source", fields["Package"]).split(" ")[0],
            }


def prepare(folder: Path) -> None:
    """Write packages.jsonl."""
    once = {str(row["text"]).lower(): row for row in read_packages(read_index())}
    counts = Counter(tag for row in once.values() for tag in row["labels"])
    kept = {tag for tag, count in counts.items() if count >= MIN_PACKAGES and not tag.endswith("::TODO")}
    with (folder / "packages.jsonl").open("w", encoding="utf-8") as stream:
        for row in once.values():
            row["labels"] = [tag for tag in row["labels"] if tag in kept]
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
