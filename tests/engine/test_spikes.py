"""Spikes of the loss are told with their examples and cost healthy steps nothing; the norms of a run in one line."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from support.runs import StopAfter, logged_rows, run_training

from engine import spikes
from engine.config import override
from engine.spikes import FEWEST, WINDOW, SpikeWatch, describe_norms
from models import TaskModel

NAN, INF = math.nan, math.inf


def watch(before, deviations=6.0):
    return SpikeWatch(deviations, before)


def noise(count, level=1.0, share=0.1):
    return (level * np.exp(share * np.random.default_rng(0).standard_normal(count))).tolist()


@pytest.mark.parametrize(
    ("before", "loss", "is_spike"),
    [
        (noise(50), 1.4, False),
        (noise(50), 3.0, True),
        (noise(50, level=1e-3), 3e-3, True),
        (noise(50, share=1.2), 3.0, False),  # single examples differ by as much
        (noise(FEWEST - 1), 3.0, False),
        (noise(FEWEST), 3.0, True),
        ([5.0] * 60 + noise(50), 3.0, True),  # the losses of the beginning are forgotten
        ([1.0] * 50, 1.05, False),
        ([1.0] * 50, 1.1, True),
        ([*noise(49), 9.0], 3.0, False),  # a spike before was larger
        (noise(50), NAN, False),
        (noise(50), INF, False),
        ([*noise(40), NAN, 0.0, INF], 3.0, True),
        ([0.0] * 50, 3.0, False),
    ],
)
def test_spike_is_far_above_the_losses_before(before, loss, is_spike):
    batch = SimpleNamespace(ids=("a", "b"))
    found = watch(before).check(loss, [batch])
    assert bool(found) == is_spike
    if is_spike:
        assert found["spike"]["ids"] == ["a", "b"]
        assert found["spike"]["median"] == pytest.approx(
            np.median([x for x in before[-WINDOW:] if 0 < x < INF]), rel=0.01
        )
    assert watch(before, deviations=0).check(loss, [batch]) == {}


def test_ids_of_a_spike_are_those_of_all_ranks(monkeypatch):
    monkeypatch.setattr(spikes, "all_gather", lambda ids: [ids, ["c"]])
    micro_batches = [SimpleNamespace(ids=("a",)), SimpleNamespace(ids=("b",))]
    assert watch(noise(50)).check(9.0, micro_batches)["spike"]["ids"] == ["a", "b", "c"]


def test_calm_runs_have_hardly_any_spike():
    rng = np.random.default_rng(1)
    calm = {
        "many examples": 2 + 0.1 * rng.standard_normal(4000),
        "falling": 5 * np.exp(-np.arange(4000) / 500) + 0.5 + 0.1 * rng.standard_normal(4000),
        "few examples": rng.exponential(0.3, (4000, 16)).mean(1),
        "one example": rng.lognormal(-1, 1.2, 4000),
    }
    for name, losses in calm.items():
        found = SpikeWatch(6.0)
        assert sum(bool(found.check(loss, [])) for loss in losses) <= 2, name


SPIKE = {"train.max_steps": 16, "eval.every_steps": 8, "optim.lr": 1e-4}


def record_and_spoil(monkeypatch, spoiled=()):
    """Multiply the loss of the training step with these ids by 20; return a list of the ids of all training steps."""
    forward, steps = TaskModel.forward, []

    def spiked(self, batch):
        out = forward(self, batch)
        if not self.training or not batch.ids:
            return out
        steps.append(batch.ids)
        return out._replace(loss_sum=out.loss_sum * 20) if batch.ids == spoiled else out

    monkeypatch.setattr(TaskModel, "forward", spiked)
    return steps


def test_healthy_run_exchanges_no_ids(tiny, monkeypatch, capsys):
    monkeypatch.setattr(spikes, "all_gather", None)
    run_training(tiny(**SPIKE))
    assert not [row for row in logged_rows(tiny().run.folder) if "spike" in row]
    out = capsys.readouterr().out
    assert "is a spike" not in out
    norms = [(row["step"], row["grad_norm"]) for row in logged_rows(tiny().run.folder) if "grad_norm" in row]
    assert len(norms) == 16
    assert describe_norms(norms, 1.0) in out
    assert re.search(r"gradient norm: median [\d.]+, 95% [\d.]+, largest [\d.]+ at step \d+; \d+% of the logged", out)


def test_spike_of_a_run_is_told_with_its_examples(tiny, tmp_path, monkeypatch, capsys):
    steps = record_and_spoil(monkeypatch)
    run_training(tiny(**SPIKE, **{"run.folder": str(tmp_path / "healthy")}))
    ids = steps[12]
    record_and_spoil(monkeypatch, ids)
    config = tiny(**SPIKE, **{"run.folder": str(tmp_path / "through")})
    capsys.readouterr()
    run_training(config)
    said = re.findall(
        r"^step +(\d+)  the loss ([\d.]+) is a spike \(median before: 0\.\d+\); (.*)$", capsys.readouterr().out, re.M
    )
    assert [(step, text) for step, _, text in said] == [
        ("13", f"example ids {', '.join(ids[:8])}, and {len(ids) - 8} more")
    ]
    rows = [row for row in logged_rows(config.run.folder) if "spike" in row]
    assert [(row["step"], row["spike"]["ids"]) for row in rows] == [(13, [*ids])]

    # A resumed run compares with the losses before, and tells the same.
    stopped = override(config, {"run.folder": str(tmp_path / "stopped")})
    assert run_training(stopped, StopAfter(11)) is None
    run_training(override(stopped, {"run.resume": "yes"}))
    assert logged_rows(stopped.run.folder) == logged_rows(config.run.folder)


@pytest.mark.parametrize(
    ("norms", "max_norm", "line"),
    [
        ([], 1.0, ""),
        ([(10, 0.5)], 0.0, "gradient norm: median 0.5, 95% 0.5, largest 0.5 at step 10"),
        (
            [(i, 0.1 * i) for i in range(1, 101)],
            7.5,
            "gradient norm: median 5.05, 95% 9.5, largest 10 at step 100; 25% of the logged steps were clipped to 7.5",
        ),
    ],
)
def test_norms_of_a_run_are_one_line(norms, max_norm, line):
    assert describe_norms(norms, max_norm) == line
