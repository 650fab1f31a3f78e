"""Summaries of what software does: the descriptions of Debian's packages, each with its own one-line synopsis.

    python -m benchmarks.prepare package_descriptions

On Debian or Ubuntu, with no more than apt: the index of descriptions is fetched into a temporary folder, and nothing of
the system is changed. The descriptions have the licences of their packages, so they are read here and not handed on.
Written are train.jsonl and validation.jsonl: a package a line, {"id", "text", "summary"}, the text being the first
paragraph of the description. Of packages that share a paragraph or a synopsis only the first is taken, so that nothing
is in both files. And model/, a small T5 with a tokenizer learned from the training texts, to be learned from scratch: a
pretrained T5 is in no package.
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

CAT = "/usr/lib/apt/apt-helper"  # reads the index in whatever way it is compressed
SHORTEST, LONGEST = 8, 80  # words of a text that is worth a summary
VALIDATION = 200


def read_index() -> str:
    """All records of Debian's Translation-en: Package, Description-en with a synopsis, and an indented text."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--option=Dir::State::Lists={folder}/lists", f"--option=Dir::Cache={folder}/cache"]
        for name in ("lists", "cache"):
            (Path(folder) / name / "partial").mkdir(parents=True)
        update = ["apt-get", "update", "--quiet=2", "--option=Acquire::Languages=en", *own]
        subprocess.run([*update, "--option=APT::Sandbox::User=root"], check=True)
        files = sorted(Path(folder).glob("lists/*Translation-en*"))
        if not files:
            raise SystemExit(
                "apt found no descriptions in English: are there Debian's or Ubuntu's sources in /etc/apt?"
            )
        return "\n\n".join(
            subprocess.run([CAT, "cat-file", file], check=True, capture_output=True, text=True).stdout for file in files
        )


def read_packages(index: str) -> Iterator[dict[str, str]]:
    """{"id", "text", "summary"} of each package, by name."""
    record = re.compile(r"^Package: (.+)\n(?:.+\n)*?Description-en: (.+)\n((?: .*(?:\n|\Z))+)", re.MULTILINE)
    for package, synopsis, text in sorted(record.findall(index)):
        first, *_ = re.split(r"^ \.$", text, maxsplit=1, flags=re.MULTILINE)
        yield {"id": package, "text": " ".join(first.split()), "summary": synopsis.strip()}


def chosen(packages: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """Those with a text of some length, and with nothing that an earlier one has (an update has the same name)."""
    seen: set[str] = set()
    rows = []
    for row in packages:
        own = {row["id"], row["text"].lower(), row["summary"].lower()}
        if SHORTEST <= len(row["text"].split()) <= LONGEST and not own & seen:
            rows.append(row)
        seen |= own
    return rows


def prepare(folder: Path) -> None:
    rows = chosen(read_packages(read_index()))
    random.Random(0).shuffle(rows)
    parts = {"validation": rows[:VALIDATION], "train": rows[VALIDATION:]}
    for name, part in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [text for row in parts["train"] for text in (row["text"], row["summary"])]
    write_small_t5(folder / "model", texts, vocab_size=2000)
