"""The benchmarks of sharded training run, and what they measured is what sharding is for."""

from __future__ import annotations

import pytest
from support.runs import run_module

from benchmarks import record


@pytest.mark.slow
def test_sharded_rank_loads_its_part_and_frees_layers(tmp_path):
    """A rank of two reads half of the file, and what it gathers is freed."""
    output = tmp_path / "memory.json"
    done = run_module("benchmarks.sharded_memory", "--size", "mid", "--runs", "fsdp-2", "--output", output)
    assert done.returncode == 0, done.stderr
    phases = {row["work"]: row for row in record.read(output)["results"]}
    assert phases["load"]["peak_bytes"] < 0.6 * 4 * phases["load"]["parameters"]
    assert phases["train"]["peak_bytes"] < 1.2 * phases["train"]["expected_bytes"]
    assert "| fsdp 2 | load |" in done.stdout


@pytest.mark.long
def test_strategies_give_the_same_losses(tmp_path):
    output = tmp_path / "strategies.json"
    done = run_module("benchmarks.strategies", "--steps", "3", "--output", output, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = record.read(output)["results"]
    ours = [row for row in rows if "HF" not in row["variant"]]
    assert len(ours) == 6 * 2 * 4
    assert max(row["largest_relative_difference"] for row in ours) < 1e-6
    assert all(len(row["losses"]) == 3 for row in rows)
