"""P1, settings of the machine alone: compiled or recomputed layers give the same run."""

from __future__ import annotations

import pytest
from support.runs import logged_rows, run_training

import models

SHORT = {"model.dropout.all": 0.0, "train.max_steps": 6, "train.micro_batch_tokens": 120, "eval.every_steps": 3}
SETTINGS = {
    "checkpointed": {"train.activation_checkpointing": True},
    "compiled": {"train.compile": True},
    "both": {"train.compile": True, "train.activation_checkpointing": True},
}


def losses_of(config):
    """Return the losses of the steps and of the evaluations."""
    return [row["loss"] for row in logged_rows(config.run.folder) if "loss" in row]


def run(tiny, folder, **changes):
    config = tiny(**SHORT, **changes, **{"run.folder": str(folder)})
    run_training(config)
    return losses_of(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_p01_compiled_or_recomputed_layers_change_no_loss(tiny, tmp_path, monkeypatch, name):
    calls, compiled = [], models.compile_layers

    def compile_layers(model):
        calls.append(model)
        compiled(model, backend="aot_eager")

    monkeypatch.setattr(models, "compile_layers", compile_layers)
    plain = run(tiny, tmp_path / "plain")
    assert calls == []
    found = run(tiny, tmp_path / "other", **SETTINGS[name])
    assert len(calls) == ("train.compile" in SETTINGS[name])
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_run_compiled_by_inductor_learns_the_same(tiny, tmp_path):
    assert run(tiny, tmp_path / "a", **SETTINGS["compiled"]) == pytest.approx(run(tiny, tmp_path / "b"), rel=1e-4)
