"""How much of a step fits into memory: found when a run starts, halved when it turns out too much, and of no effect."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from support.runs import CPU, logged_rows, run_module, run_training

from data import MicroBatching
from engine import memory as fit
from engine.allocator import keep_freed_memory
from engine.distributed import Ranks
from engine.errors import TrainingError
from models import TaskModel

SHORT = {"model.dropout.all": 0.0, "train.max_steps": 8, "eval.every_steps": 100}


def losses_of(config):
    return [row["loss"] for row in logged_rows(config.run.folder) if "lr" in row]


def full_above(monkeypatch, tokens, error=None):
    """Memory that a micro-batch of more than so many tokens does not fit into; returns the sizes of those that did."""
    forward, fitted = TaskModel.forward, []

    def limited(self, batch):
        size = sum(batch.lengths)
        if self.training and size > tokens:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        fitted.extend([size] * (self.training and size > 0))
        return forward(self, batch)

    monkeypatch.setattr(TaskModel, "forward", limited)
    return fitted


@pytest.fixture
def whole(tiny, tmp_path):
    """The losses of a run that was never cut."""
    config = tiny(**SHORT, **{"run.folder": str(tmp_path / "whole")})
    run_training(config)
    return losses_of(config)


# found when the run starts


def free(monkeypatch, share):
    """So much memory that `share` of the longest 16 reviews fit, by the model of memory."""
    measure = fit.kept_bytes

    def measured(objective, batch, amp):
        kept = measure(objective, batch, amp)
        states = (1 + fit.STATES) * sum(4 * p.numel() for p in objective.parameters())
        wanted = states + share * 16 / len(batch.ids) * kept
        monkeypatch.setattr(fit, "free_bytes", lambda device: wanted / fit.USED)
        return kept

    monkeypatch.setattr(fit, "kept_bytes", measured)


def limit_shown(capsys):
    found = re.search(r"of at most ([\d,]+) tokens", capsys.readouterr().out)
    return int(found[1].replace(",", "")) if found else 0


@pytest.mark.parametrize("share", [1.1, 0.5, 0.01])
def test_p01_auto_finds_a_limit_that_changes_no_loss(tiny, whole, monkeypatch, capsys, share):
    free(monkeypatch, share)
    fitted = full_above(monkeypatch, 10**9)
    config = tiny(**SHORT, **{"train.micro_batch_size": "auto"})
    capsys.readouterr()
    run_training(config)
    limit = limit_shown(capsys)
    assert (limit == 0) == (share > 1)
    if share == 0.5:
        assert 16 * 30 * 0.4 < limit < 16 * 34 * 0.6
        assert max(fitted) <= limit
    assert losses_of(config) == pytest.approx(whole, rel=1e-5)


def test_what_does_not_fit_in_a_trial_is_halved(tiny, whole, monkeypatch, capsys):
    fitted = full_above(monkeypatch, 150)
    config = tiny(**SHORT, **{"train.micro_batch_size": "auto"})
    capsys.readouterr()
    run_training(config)
    assert 75 < limit_shown(capsys) <= 150
    assert 75 < max(fitted) <= 150
    assert losses_of(config) == pytest.approx(whole, rel=1e-5)


def test_a_dry_run_shows_what_was_found_and_trains_nothing(tiny, monkeypatch, capsys):
    free(monkeypatch, 0.5)
    config = tiny(**SHORT, **{"train.micro_batch_size": "auto", "run.dry_run": True})
    assert run_training(config) == {}
    assert limit_shown(capsys)


def test_p20_an_example_that_does_not_fit_alone_is_said_before_training(tiny, monkeypatch):
    full_above(monkeypatch, 20)
    with pytest.raises(TrainingError, match=r"^one example of \d+ tokens does not fit into memory; train.checkpoint_"):
        run_training(tiny(**SHORT, **{"train.micro_batch_size": "auto"}))


def test_a_trial_leaves_no_gradient_behind_and_other_errors_are_not_taken_for_one_of_memory(tiny, monkeypatch):
    full_above(monkeypatch, 20, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    for changes in ({"train.micro_batch_size": "auto"}, {}):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            run_training(tiny(**SHORT, **changes))


def test_kept_bytes_are_those_of_the_storages_without_the_parameters():
    layer = torch.nn.Linear(3, 5)

    class Objective(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, batch):
            x = self.layer(batch)  # keeps the batch, and the weight, which is a parameter
            return x.sigmoid().exp()  # keeps both results

    from engine.precision import Precision

    amp = Precision("fp32", CPU.device)
    assert fit.kept_bytes(Objective(), torch.randn(7, 3), amp) == 4 * (7 * 3 + 7 * 5 + 7 * 5)


def test_two_ranks_find_one_limit_and_the_run_of_one(tiny, tmp_path, reviews, checkpoint_folder):
    from support.runs import arguments_of

    one = tiny(**SHORT)
    run_training(one)
    two = tiny(**SHORT, **{"run.folder": str(tmp_path / "two"), "train.micro_batch_size": "auto"})
    done = run_module("engine.train", *arguments_of(two, tmp_path / "two.toml"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)


# halved during the run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"train.micro_batch_size": 9}, {"train.micro_batch_tokens": 250}])
def test_p01_out_of_memory_halves_the_micro_batch_and_changes_no_loss(
    tiny, tmp_path, monkeypatch, capsys, settings, precision
):
    settings = SHORT | settings | {"train.precision": precision}
    config = tiny(**settings, **{"run.folder": str(tmp_path / "fits")})
    run_training(config)
    fitted = full_above(monkeypatch, 140)
    other = tiny(**settings)
    capsys.readouterr()
    run_training(other)
    assert "step 1: out of memory; from here on " in capsys.readouterr().out
    assert 70 < max(fitted) <= 140
    assert losses_of(other) == pytest.approx(losses_of(config), rel=1e-5 if precision == "fp32" else 1e-2)


def test_a_host_that_is_out_of_memory_says_it_otherwise(tiny, whole, monkeypatch):
    said = (
        "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    )
    fitted = full_above(monkeypatch, 140, RuntimeError(said))
    config = tiny(**SHORT)
    run_training(config)
    assert max(fitted) <= 140
    assert losses_of(config) == pytest.approx(whole, rel=1e-5)


def test_p20_out_of_memory_on_one_example_says_what_would_work(tiny, monkeypatch):
    full_above(monkeypatch, 20)
    with pytest.raises(
        TrainingError, match=r"^step 1: one example of \d+ tokens does not fit into memory; train.check"
    ):
        run_training(tiny(**SHORT))


def test_p20_out_of_memory_on_one_of_several_ranks_says_how_to_go_on():
    class Batch:
        num_tokens, ids = 300, ("a", "b")

    ranks = Ranks(rank=1, world_size=2, device=CPU.device)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(TrainingError, match=r"of rank 1; go on .* with --resume --train.micro_batch_tokens=150"):
        fit.halve_micro_batches(MicroBatching(), [Batch()], error, 6, ranks)
    assert fit.halve_micro_batches(MicroBatching(max_examples=4), [Batch()], error, 6, CPU) == MicroBatching(
        max_tokens=150
    )


# what is free


def test_the_host_says_what_is_free_and_ranks_share_it(monkeypatch):
    alone = fit.free_bytes(CPU.device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fit.free_bytes(CPU.device) == pytest.approx(alone / 4, rel=0.3)


def test_what_a_container_may_have_and_what_is_unknown(tmp_path):
    assert fit._left_in_group(tmp_path) == fit._available(tmp_path / "meminfo") == float("inf")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert fit._left_in_group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert fit._left_in_group(tmp_path) == 700
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert fit._available(tmp_path / "meminfo") == 5 * 1024


# what the C library keeps

FAULTS = """
import resource, sys, torch
from engine.allocator import keep_freed_memory
keeps = keep_freed_memory(torch.device("cpu"))
for i in range(30):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(10_000_000)
print(keeps, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_kept_is_not_asked_for_again():
    def run(**env):
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=True)
        keeps, faults = done.stdout.split()
        return keeps == "True", int(faults)

    (keeps, faults), (tuned_keeps, tuned_faults) = run(), run(MALLOC_ARENA_MAX="8")
    assert not tuned_keeps  # the user has tuned it
    if sys.platform == "linux" and keeps:
        assert faults < tuned_faults / 10
    assert not keep_freed_memory(torch.device("cuda"))
