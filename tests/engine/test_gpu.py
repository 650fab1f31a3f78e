"""Tests that need a GPU: the same run as on the CPU, mixed precision, resume, ranks over NCCL.

On a GPU the order of additions is not fixed, so two runs are equal only up to rounding, which grows from step to step:
losses are compared with tolerances, and weights not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runs import (
    QuietStop,
    StopAfter,
    arguments_of,
    logged_rows,
    run_module,
    run_training,
    tiny_config,
)

from engine import train
from engine.checkpoint import claim
from engine.distributed import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = Ranks(rank=0, world_size=1, device=torch.device("cuda", 0))
FIRST, LATER = 1e-5, 1e-3  # relative tolerances of the first loss and of later ones, in fp32
VARIANTS = {"whole": {}, "micro": {"train.micro_batch_size": 3}, "workers": {"data.num_workers": 2}}


@pytest.fixture
def on_gpu(checkpoint_folder, reviews, tmp_path):
    """Return on_gpu(name, **settings), which trains a tiny run on the GPU in its own folder and returns its log."""

    def run(name, stop=None, **changes):
        folder = tmp_path / name
        config = tiny_config(checkpoint_folder, reviews, folder, {"run.device": "cuda"} | changes)
        with claim(config, GPU) as resumed:
            train.train(config, GPU, QuietStop() if stop is None else stop, resumed)  # a stop is false at first
        return [row for row in logged_rows(folder) if "lr" in row]

    return run


def test_p01_gpu_run_equals_the_cpus_in_any_micro_batches(on_gpu, tiny):
    changes = {"model.dropout.all": 0.0, "train.max_steps": 8}
    run_training(tiny(**changes))
    expected = [row["loss"] for row in logged_rows(tiny().run.folder) if "lr" in row]
    for name, machine in VARIANTS.items():
        found = [row["loss"] for row in on_gpu(name, **changes | machine)]
        assert found == pytest.approx(expected, rel=LATER)
        assert found[0] == pytest.approx(expected[0], rel=FIRST)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_as_fp32(on_gpu, precision):
    changes = {"model.dropout.all": 0.0, "train.max_steps": 50, "optim.lr": 3e-3}
    fp32 = [row["loss"] for row in on_gpu("fp32", **changes)]
    mixed = [row["loss"] for row in on_gpu(precision, **changes | {"train.precision": precision})]
    assert mixed[0] == pytest.approx(fp32[0], rel=2e-2)
    assert sum(mixed[-5:]) < 0.7 * sum(mixed[:5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_are_equal_bit_for_bit(on_gpu, precision):
    changes = {"train.precision": precision, "run.deterministic": True, "train.micro_batch_size": 5}
    try:
        first, second = (on_gpu(name, **changes) for name in ("first", "second"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 5e-3)])
def test_p04_resumed_gpu_run_continues_the_stopped_one(on_gpu, tmp_path, precision, tolerance):
    """Losses differ by less than with a new optimizer (0.06 at step 9) or other dropout (0.007 at step 8, then 0.1)."""
    changes = {"train.precision": precision, "model.dropout.all": 0.1, "train.micro_batch_size": 5}
    whole = on_gpu("whole", **changes)
    on_gpu("stopped", StopAfter(7), **changes)
    resumed = on_gpu("stopped", **changes | {"run.resume": "yes"})
    for name in ("step", "lr"):
        assert [row[name] for row in resumed] == [row[name] for row in whole]
    losses, expected = ([row["loss"] for row in rows] for rows in (resumed, whole))
    assert losses == pytest.approx(expected, rel=tolerance)
    files = (tmp_path / name / "last" / "state.json" for name in ("stopped", "whole"))
    stopped, uninterrupted = (json.loads(file.read_text())["train"] for file in files)
    for counter in ("step", "position", "samples"):
        assert stopped[counter] == uninterrupted[counter]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_p01_two_ranks_over_nccl_train_as_one(on_gpu, checkpoint_folder, reviews, tmp_path):
    changes = {"model.dropout.all": 0.0, "train.max_steps": 8, "train.global_batch_size": 15}
    expected = [row["loss"] for row in on_gpu("one", **changes)]
    two = tiny_config(checkpoint_folder, reviews, tmp_path / "two", {"run.device": "cuda"} | changes)
    done = run_module("engine.train", *arguments_of(two, tmp_path / "two.toml"), ranks=2)
    assert done.returncode == 0, done.stderr
    found = [row["loss"] for row in logged_rows(Path(two.run.folder)) if "lr" in row]
    assert found == pytest.approx(expected, rel=LATER)
