"""All pages: their sentences and lines are short; links, files, settings, modules and options that they name exist."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from support.pages import PAGES, ROOT, anchors, count_words, read_page, sentences

import models as native
from engine.config import Config
from engine.config.schema import all_settings
from engine.tasks import TASKS

LEGEND = read_page("tests/contracts/README.md")
# The page whose tree has a line for every file of these folders.
TREES = {
    "engine/README.md": ("engine", "engine/config", "engine/report"),
    "models/README.md": ("models", "models/ops", "models/checkpoints", "models/generation"),
    "data/README.md": ("data", "data/formats", "data/augmentation", "data/tokenizers"),
    "benchmarks/README.md": ("benchmarks", "benchmarks/gpu_check", "benchmarks/scaling", "benchmarks/peers"),
    "tests/README.md": ("tests/support",),
    "tests/contracts/README.md": ("tests/contracts",),
}


def test_sentences_end_where_they_end():
    """The splitter against a paragraph split by hand: abbreviations, numbers, code and links end no sentence."""
    text = "# A title. No sentence.\n\nAs in Lee et al. 2013, `a. b. c` is 2.5 (see\n[a page](x. y.md)). Yes! One\n"
    text += "- an item (e.g. this)\n- another? Two.\n\n| a table. | b |\n\n    indented. x\n\n```\nfenced. x\n```\n"
    assert sentences(text) == [
        "As in Lee et al. 2013, CODE is 2.5 (see a page).",
        "Yes!",
        "One",
        "an item (e.g. this)",
        "another?",
        "Two.",
    ]
    assert count_words("A word, `two words` - and 3 more.") == 7


@pytest.mark.parametrize("page", [page for page in PAGES if "zh-CN" not in page])
def test_sentences_have_at_most_25_words(page):
    assert [sentence for sentence in sentences(read_page(page)) if count_words(sentence) > 25] == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_have_at_most_120_characters(page):
    """Rows of tables may be longer on other pages than the first: a row cannot be wrapped."""
    lines = read_page(page).splitlines()
    is_first = page.startswith("README")
    assert [line for line in lines if len(line) > 120 and (is_first or not line.lstrip().startswith("|"))] == []


@pytest.mark.parametrize("page", PAGES)
def test_contents_of_a_long_page_are_its_headings(page):
    text = read_page(page)
    if len(text.splitlines()) <= 100:
        return
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings: list[str] = re.findall(r"^## (.+)$", plain, flags=re.MULTILINE)
    assert headings[0] in ("Contents", "目录")
    contents = plain.partition(f"## {headings[0]}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- \[(.+)\]\(#.+\)$", contents, flags=re.MULTILINE) == headings[1:]


def test_readme_is_short():
    assert len(read_page("README.md").splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_resolve(page):
    folder = (ROOT / page).parent
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", read_page(page)):
        target = folder / name if name else ROOT / page
        assert target.exists(), name
        if anchor:
            assert anchors(target.read_text(encoding="utf-8")).count(anchor) == 1, f"{name}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_a_page_exist(page):
    for name in re.findall(r"`((?:engine|models|data|benchmarks|tests)/[\w/.]+\.\w+)`", read_page(page)):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_functions_named_in_a_page_exist(page):
    names = set(re.findall(r"(?:-m |`)((?:engine|models|data|benchmarks|tests)(?:\.[a-z_]\w*)+)", read_page(page)))
    for name in names - set(all_settings(Config())):
        parent, _, last = name.rpartition(".")
        is_found = last == "py" or importlib.util.find_spec(name) or hasattr(importlib.import_module(parent), last)
        assert is_found, name


@pytest.mark.parametrize("page", PAGES)
def test_settings_named_in_a_page_exist(page):
    text = read_page(page)
    known = set(all_settings(Config()))
    sections = "|".join({key.split(".")[0] for key in known})
    options = set(re.findall(rf"--((?:{sections})(?:\.\w+)+)", text))
    assert options <= known
    inline = set(re.findall(rf"`((?:{sections})(?:\.\w+)+)[` =]", text))
    named = {name for name in inline if not name.endswith((".safetensors", ".py", ".md"))}
    modules = {name for name in named - known if name.startswith("data.") and importlib.util.find_spec(name)}
    assert named - modules <= known


@pytest.mark.parametrize("page", TREES)
def test_tree_of_a_page_names_every_file(page):
    text = read_page(page)
    missing = [
        path.relative_to(ROOT).as_posix()
        for folder in TREES[page]
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.name not in ("__init__.py", "__main__.py") and not re.search(rf"\b{path.stem}\b", text)
    ]
    assert missing == []


def options_by_module() -> dict[str, set[str]]:
    """Return {module: its options on all pages}, of the modules whose options are not settings."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for command in re.findall(r"python -m (\S+(?: [^`#|&\n]*)?)", read_page(page).replace("\\\n", " ")):
            module, _, rest = command.partition(" ")
            found.setdefault(module, set()).update(re.findall(r"(?<!\S)--[a-z][\w-]*(?![\w.-])", rest))
    return {module.rstrip("`,.:;)"): names for module, names in found.items() if names and "." in module}


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(options_by_module()))
def test_options_of_a_command_are_in_its_help(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {name for name in options_by_module()[module] if name not in done.stdout} <= {"--help"}


def test_pages_list_all_architectures_and_tasks():
    models_page = read_page("models/README.md").lower().replace("-", "")
    tasks_page = read_page("engine/tasks/README.md").lower().replace("-", "")
    assert [name for name in native.ARCHITECTURES if name.replace("-", "") not in models_page] == []
    assert [name for name in TASKS if name.replace("-", "") not in tasks_page] == []


def test_faults_of_hf_trainer_are_those_that_were_counted():
    """The rows of README.md beside benchmarks/results/faults_of_peers.json."""
    results = json.loads((ROOT / "benchmarks/results/faults_of_peers.json").read_text())["results"]
    survived = {(row["fault"], row["side"]): f"{row['survived']} of {row['tries']}" for row in results}
    table = read_page("README.md").partition("## Beside HF Trainer")[2]
    for fault, words in {
        "kill in a save": "killed inside a save",
        "no optimizer file": "without its optimizer file",
        "bit flip": "a flipped bit",
        "SIGTERM": "SIGTERM",
        "NaN loss": "a loss of NaN",
    }.items():
        (row,) = [line for line in table.splitlines() if line.startswith("|") and words in line]
        assert re.findall(r"\d+ of \d+", row)[:2] == [survived[fault, "ours"], survived[fault, "hf"]], row


def test_losses_of_hf_trainer_are_those_that_were_measured():
    """The rows of README.md beside benchmarks/results/strategies.json: four ranks, accumulation 4."""
    results = json.loads((ROOT / "benchmarks/results/strategies.json").read_text())["results"]
    table = read_page("README.md").partition("## Beside HF Trainer")[2]
    for models, words in ((("BERT", "T5"), "BERT and T5"), (("GPT-2", "ViT"), "GPT-2 and ViT")):
        (row,) = [line for line in table.splitlines() if line.startswith("|") and words in line]
        printed = re.findall(r"\de-\d\d", row)
        found = {(r["work"], r["variant"]): r for r in results if r["accumulation"] == 4}
        measured = [
            f"{found[work, variant]['largest_relative_difference']:.0e}"
            for variant in ("DDP 4", "HF Trainer, DDP 4")
            for work in models
        ]
        assert printed == measured, row


def test_legend_of_promises_names_the_tests():
    """Each pattern of the legend matches a test, and each test with a code in its name is in the row of the code."""
    rows = re.findall(r"^\| ([PF]\d+) \|.*$", LEGEND, flags=re.MULTILINE)
    assert rows == [f"P{i}" for i in range(1, 22)] + [f"F{i}" for i in range(1, 21) if i != 16]
    by_code = {line.split()[1]: line for line in LEGEND.splitlines() if re.match(r"\| [PF]\d", line)}
    listed = {code: re.findall(r"`(tests/[\w/.]+)::([\w*]+)`", line) for code, line in by_code.items()}
    tests: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tests[path.relative_to(ROOT).as_posix()] = re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    for file, pattern in (entry for entries in listed.values() for entry in entries):
        assert fnmatch.filter(tests[file], pattern), (file, pattern)
    for file, names in tests.items():
        for name in names:
            for kind, number in re.findall(r"(?<=_)([pf])(\d\d)(?=_)", name):
                assert file in dict(listed[f"{kind.upper()}{int(number)}"]), (file, name)
