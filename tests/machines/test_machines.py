"""A sample of the faults of several machines, in network namespaces; `python -m tests.machines` puts more of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from machines.scenarios import BAD_INPUTS, SCENARIOS, run_scenario

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ("through",)  # the others take a minute each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in SCENARIOS]
)
def test_sample(tmp_path, name):
    result, reason = run_scenario(name, len(BAD_INPUTS) if name == "bad input" else 1, 0, tmp_path)
    if reason:
        pytest.skip(reason)
    assert result.failures == []
    assert result.survived == result.tries > 0


def test_the_command_lists_its_scenarios():
    done = subprocess.run(
        [sys.executable, "-m", "tests.machines", "--list"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [*SCENARIOS]
