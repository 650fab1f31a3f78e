"""Settings of the machine alone: a run with them is the run without, however its layers are computed (P1)."""

from __future__ import annotations

import pytest
from support.runs import logged_rows, run_training

import models

SHORT = {"model.dropout.all": 0.0, "train.max_steps": 6, "train.micro_batch_tokens": 120, "eval.every_steps": 3}
WAYS = {
    "checkpointed": {"train.activation_checkpointing": True},
    "compiled": {"train.compile": True},
    "both": {"train.compile": True, "train.activation_checkpointing": True},
}


def losses_of(config):
    """Of the steps, and of the evaluations."""
    return [row["loss"] for row in logged_rows(config.run.folder) if "loss" in row]


def run(tiny, folder, **changes):
    config = tiny(**SHORT, **changes, **{"run.folder": str(folder)})
    run_training(config)
    return losses_of(config)


@pytest.mark.parametrize("way", WAYS)
def test_p01_how_layers_are_computed_changes_no_loss(tiny, tmp_path, monkeypatch, way):
    calls, compiled = [], models.compile_layers

    def compile_layers(model):
        calls.append(model)
        compiled(model, backend="aot_eager")

    monkeypatch.setattr(models, "compile_layers", compile_layers)
    plain = run(tiny, tmp_path / "plain")
    assert calls == []
    found = run(tiny, tmp_path / "other", **WAYS[way])
    assert len(calls) == ("train.compile" in WAYS[way])
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_is_really_compiled_learns_the_same(tiny, tmp_path):
    assert run(tiny, tmp_path / "a", **WAYS["compiled"]) == pytest.approx(run(tiny, tmp_path / "b"), rel=1e-4)
