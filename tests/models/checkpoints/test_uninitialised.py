"""Uninitialised gives modules memory without values; these tests fail when torch initialises modules in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import config_folder, scratch
from support.zoo import ZOO
from torch import nn
from torch.overrides import TorchFunctionMode

import models
from models.checkpoints.uninitialised import Uninitialised
from models.vit import LayerScale

# Every kind of module that holds parameters in the architectures and heads, and how one is made.
DRAWN = {
    nn.Linear: lambda: nn.Linear(3, 4),
    nn.Embedding: lambda: nn.Embedding(5, 6),
    nn.Conv2d: lambda: nn.Conv2d(3, 4, 2),
}
CONSTANT = {
    nn.LayerNorm: lambda: nn.LayerNorm(7),
    nn.RMSNorm: lambda: nn.RMSNorm(7),
    LayerScale: lambda: LayerScale(7),
}
MODULES = DRAWN | CONSTANT


class Recorder(TorchFunctionMode):
    """Notes the modules of all functions that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.append(getattr(function, "__module__", None))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", DRAWN, ids=lambda kind: kind.__name__)
def test_modules_draw_through_torch_nn_init(kind):
    with Recorder() as recorder:
        DRAWN[kind]()
    assert "torch.nn.init" in recorder.called


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_building_a_module_inside_draws_nothing(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with Uninitialised(Path("x"), 100, 1000, mark=True) as mode:
        module = MODULES[kind]()
    assert torch.equal(torch.get_rng_state(), before)
    parameters = list(module.parameters())
    assert mode.tensors == len(parameters)
    assert mode.numbers == sum(p.numel() for p in parameters)
    assert all(p.requires_grad for p in parameters)
    assert all(p.isnan().all() if kind in DRAWN else p.isfinite().all() for p in parameters)


def test_constants_keep_their_values():
    with Uninitialised(Path("x"), 100, 1000, mark=True):
        assert torch.equal(torch.ones(2), torch.tensor([1.0, 1.0]))
        assert torch.equal(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 0]))
        assert torch.empty(2).isnan().all()


@pytest.mark.parametrize("kind", ZOO)
def test_every_module_with_parameters_is_one_of_these(tmp_path, kind):
    for head in models.ARCHITECTURES[kind].heads:
        model = scratch(tmp_path, kind, head)
        kinds = {type(m) for m in model.modules() if [*m.parameters(recurse=False)]}
        assert kinds <= {*MODULES, type(model.backbone)}


@pytest.mark.parametrize("kind", ZOO)
def test_loading_draws_nothing_from_the_default_generator(tmp_path, kind):
    config_folder(tmp_path, kind)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    models.save_pretrained(models.from_pretrained(tmp_path, init="scratch"), tmp_path)
    models.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_limits_name_the_folder():
    with (
        Uninitialised(Path("there"), 1, 1000),
        pytest.raises(models.ModelError, match=r"there: config.json .* too large"),
    ):
        nn.Linear(2, 2)
    with Uninitialised(Path("there"), 100, 3), pytest.raises(models.ModelError, match="far too large"):
        nn.Linear(2, 2)
