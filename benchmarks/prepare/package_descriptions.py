"""Summaries of software: the descriptions of Debian's packages with their one-line synopses.

    python -m benchmarks.prepare package_descriptions

Source: apt's index of descriptions, on Debian or Ubuntu. It is fetched into a temporary folder; the system is not
changed. The descriptions have the licences of their packages and are therefore not redistributed.

Output:
- train.jsonl and validation.jsonl with a package per line: {"id", "text", "summary"}. The text is the first paragraph
  of the description. Of packages with the same paragraph or synopsis only the first is used: the files do not overlap;
- model/: the configuration of a small T5 and a tokenizer trained on the training texts. It is trained from scratch,
  since no package has a pretrained T5.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.prepare.small_t5 import write_small_t5

CAT = "/usr/lib/apt/apt-helper"  # reads the index in any compression
MIN_WORDS, MAX_WORDS = 8, 80  # of a text
NUM_VALIDATION = 200


def read_index() -> str:
    """Return all records of Translation-en: Package, Description-en with a synopsis, and an indented text."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--option=Dir::State::Lists={folder}/lists", f"--option=Dir::Cache={folder}/cache"]
        for name in ("lists", "cache"):
            (Path(folder) / name / "partial").mkdir(parents=True)
        update = ["apt-get", "update", "--quiet=2", "--option=Acquire::Languages=en", *own]
        subprocess.run([*update, "--option=APT::Sandbox::User=root"], check=True)
        files = sorted(Path(folder).glob("lists/*Translation-en*"))
        if not files:
            raise SystemExit("apt found no English descriptions; are the sources of Debian or Ubuntu in /etc/apt?")
        return "\n\n".join(
            subprocess.run([CAT, "cat-file", file], check=True, capture_output=True, text=True).stdout for file in files
        )


def read_packages(index: str) -> Iterator[dict[str, str]]:
    """Yield {"id", "text", "summary"} of each package, ordered by name."""
    record = re.compile(r"^Package: (.+)\n(?:.+\n)*?Description-en: (.+)\n((?: .*(?:\n|\Z))+)", re.MULTILINE)
    for package, synopsis, text in sorted(record.findall(index)):
        first, *_ = re.split(r"^ \.$", text, maxsplit=1, flags=re.MULTILINE)
        yield {"id": package, "text": " ".join(first.split()), "summary": synopsis.strip()}


def select_packages(packages: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """Return the packages with a text of suitable length that share no name, text or summary with an earlier one."""
    seen: set[str] = set()
    rows = []
    for row in packages:
        own = {row["id"], row["text"].lower(), row["summary"].lower()}
        if MIN_WORDS <= len(row["text"].split()) <= MAX_WORDS and not own & seen:
            rows.append(row)
        seen |= own
    return rows


def prepare(folder: Path) -> None:
    """Write train.jsonl, validation.jsonl and model/."""
    rows = select_packages(read_packages(read_index()))
    random.Random(0).shuffle(rows)
    splits = {"validation": rows[:NUM_VALIDATION], "train": rows[NUM_VALIDATION:]}
    for name, split in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [text for row in splits["train"] for text in (row["text"], row["summary"])]
    write_small_t5(folder / "model", texts, vocab_size=2000)
