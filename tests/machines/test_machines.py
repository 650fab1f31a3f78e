"""A sample of the faults of several machines, in network namespaces; `python -m tests.machines` puts more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from machines.scenarios import BAD_INPUTS, SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
DEFAULT, SLOW = ("through",), ("cut", "bad input")  # the others, of a minute each, are for the command


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.machines", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def mark(name: str) -> list[pytest.MarkDecorator]:
    if name in DEFAULT:
        return []
    return [pytest.mark.slow if name in SLOW else pytest.mark.long]


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark(name)) for name in SCENARIOS])
def test_scenario(tmp_path, name):
    """In a process of its own, since a fork of one with threads, as pytest may have, can wait forever."""
    count = len(BAD_INPUTS) if name == "bad input" else 1
    done = run_command(name, "--count", str(count), "--output", str(tmp_path / "report.json"))
    (row,) = json.loads((tmp_path / "report.json").read_text())["results"]
    if "skipped" in row:
        pytest.skip(row["skipped"])
    assert row["failures"] == [], done.stdout
    assert row["survived"] == row["tries"] > 0


def test_the_command_lists_its_scenarios():
    done = run_command("--list")
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [*SCENARIOS]
