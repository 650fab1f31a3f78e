"""The manuals: the blocks of a page, unchanged and in order, in one new small checkout for each page.

They are slow, since every command imports torch. Blocks of the language console need what a test has not: a network,
several machines, hours. test_pages.py checks that their modules and options exist.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import FOLDERS, find_blocks, read_page, run_block, small_checkout

MANUALS = [f"{folder}/README.md" for folder in FOLDERS]
KINDS = ("bash", "python", "toml")
# Each is run by a test of its own: the plugins and the loop of engine/README.md, the exported graph.
OWN_TESTS = re.compile(r"# (my_\w+\.py: torchrun|in my_loop\.py|run_onnx\.py)")


def blocks_of_manuals() -> list[object]:
    found = []
    for page in MANUALS:
        for i, block in enumerate(find_blocks(read_page(page))):
            if block.language in KINDS and not OWN_TESTS.match(block.text):
                name = f"{page.removesuffix('/README.md')}-{i}-{block.title[:40]}"
                found.append(pytest.param(page, block, id=name))
    return found


@pytest.fixture(scope="module")
def checkout_of(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path):
    """checkout_of(page) returns the checkout in which the blocks of the page run."""
    made: dict[str, Path] = {}

    def of(page: str) -> Path:
        if page not in made:
            made[page] = small_checkout(tmp_path_factory.mktemp("manual") / "checkout", checkpoint_folder)
        return made[page]

    return of


def test_languages_of_blocks_are_known():
    languages = {block.language for page in MANUALS for block in find_blocks(read_page(page))}
    assert languages <= {*KINDS, "console", ""}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), blocks_of_manuals())
def test_block_of_a_manual_runs(checkout_of, page, block):
    run_block(checkout_of(page), block)
