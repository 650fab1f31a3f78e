"""Gradual unfreezing: which parameters are trained in each step, and that the others do not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import logged_rows, run_training
from support.tiny_models import scratch

import models
from engine.config import ConfigError
from engine.regularize import GradualUnfreezing


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("model_type", "head"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
def test_unfreezing_adds_one_layer_at_a_time_from_the_top(tmp_path, model_type, head):
    model = scratch(tmp_path, model_type, head)
    everything = trained(model)
    unfreezing = GradualUnfreezing(model, 3, 100)
    changes = [step for step in range(20) if unfreezing.set_(step)]
    layers = len(model.backbone.layers)
    assert changes == [0, *range(3, 3 * (layers + 2), 3)]
    unfreezing.set_(2)
    assert all(name.startswith("head.") or ".norm." in name for name in trained(model))
    for count in range(1, layers + 1):
        before = trained(model)
        unfreezing.set_(3 * count)
        added = trained(model) - before
        assert added
        assert all(name.startswith(f"backbone.layers.{layers - count}.") for name in added)
    unfreezing.set_(3 * layers + 3)
    assert trained(model) == everything
    assert unfreezing.set_(4) is True  # a pure function of the step, so it also goes back
    assert unfreezing.set_(5) is False


def test_frozen_layer_stays_frozen_and_takes_no_turn(tmp_path):
    model = scratch(tmp_path, "bert", "sequence-classification")
    top = len(model.backbone.layers) - 1
    models.freeze(model, ["backbone.*embedding*", f"backbone.layers.{top}.*"])
    wanted = trained(model)
    unfreezing = GradualUnfreezing(model, 3, 100)
    unfreezing.set_(0)
    assert all(name.startswith("head.") for name in trained(model))
    unfreezing.set_(3)  # the layer below the frozen one is the second part
    assert any(name.startswith(f"backbone.layers.{top - 1}.") for name in trained(model))
    unfreezing.set_(99)
    assert trained(model) == wanted


def test_first_stage_equals_a_run_with_the_backbone_frozen(tiny, tmp_path):
    """Until the second stage the losses equal those with model.freeze, bit for bit."""
    gradual = tiny(**{"model.gradual_unfreezing": 5, "run.folder": str(tmp_path / "gradual")})
    frozen = tiny(**{"model.freeze": ("backbone.*",), "run.folder": str(tmp_path / "frozen")})
    run_training(gradual)
    run_training(frozen)
    ours, theirs = (
        [row["loss"] for row in logged_rows(config.run.folder) if "lr" in row] for config in (gradual, frozen)
    )
    assert ours[:6] == theirs[:6]  # step 6 has the weights after five steps
    assert ours[6:] != theirs[6:]


def test_weight_takes_the_steps_from_its_turn_on(tiny):
    config = tiny(**{"model.gradual_unfreezing": 5})
    run_training(config)
    state = load_file(Path(config.run.folder) / "last" / "optimizer.safetensors")
    taken = {key.partition("/")[2]: int(value) for key, value in state.items() if key.startswith("step/")}
    for part, steps in {"head.": 20, "backbone.layers.1.": 15, "backbone.layers.0.": 10, "embedding": 5}.items():
        assert {count for name, count in taken.items() if part in name} == {steps}


def test_more_stages_than_steps_are_refused(tiny):
    with pytest.raises(
        ConfigError, match=r"model\.gradual_unfreezing = 0\.4: unfreezing 4 groups of layers, one every 8 steps, takes"
    ):
        run_training(tiny(**{"model.gradual_unfreezing": 0.4}))
