"""The optimizers by name: each step against a reference, exact resume, estimates, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import StopAfter, assert_same_run, run_training
from support.tiny_models import scratch
from torch import Tensor, nn

import models
from engine import optimizer_state
from engine.config import ConfigError, OptimSettings, override
from engine.optim import build_optimizer, check_names, set_learning_rate
from engine.optimizer_state import state_bytes
from engine.optimizers import SETTINGS, describe_optimizer

ROOT = Path(models.__file__).parent.parent
NAMES = [name for name in SETTINGS if name != "adamw8bit"]  # which needs a GPU
RATES = {"adamw": 1e-2, "sgd": 1e-2, "adafactor": 1e-1, "lion": 1e-2, "muon": 1e-2}


class Small(nn.Module):
    """A convolution, two layers and a head: parameters of 1, 2 and 4 dimensions, with the names of a model."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patches = nn.Conv2d(1, 5, 2, stride=2, dtype=dtype)
            self.layers = nn.ModuleList(nn.Linear(20 + i, 21 + i, dtype=dtype) for i in range(2))
            self.head = nn.Linear(22, 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(1)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).squeeze(1)


def batch_of(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    return x, x.mean((1, 2, 3))


def take_steps(model: Small, optimizer: Any, rates: list[float], start: int = 0) -> list[float]:
    losses = []
    for step, rate in enumerate(rates, start):
        set_learning_rate(optimizer, rate)
        x, y = batch_of(step, model.head.weight.dtype)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# Each step is that of the reference


class LionOfThePaper(torch.optim.Optimizer):
    """Program 1 of Chen et al. 2023, line by line, one parameter at a time."""

    def step(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                beta1, beta2 = group["betas"]
                for p in group["params"]:
                    m = self.state[p].get("m", torch.zeros_like(p))
                    c = beta1 * m + (1 - beta1) * p.grad
                    self.state[p]["m"] = beta2 * m + (1 - beta2) * p.grad
                    p.copy_(p - group["lr"] * (torch.sign(c) + group["weight_decay"] * p))


class Several:
    """Two optimizers for the parameters of one model."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def groups_of(model: Small, wanted: Callable[[str, Tensor], bool] = lambda name, p: True) -> list[dict[str, Any]]:
    """Return groups as build_optimizer makes them: matrices decay, the head has twice the rate."""
    named = [(name, p) for name, p in model.named_parameters() if wanted(name, p)]
    return [
        {
            "params": [p],
            "weight_decay": 0.1 if p.ndim >= 2 else 0.0,
            "lr_scale": 2.0 if name.startswith("head") else 1.0,
        }
        for name, p in named
    ]


def is_matrix_of_layer(name: str, p: Tensor) -> bool:
    return name.startswith("layers.") and p.ndim == 2


def of_muon(model: Small) -> Several:
    others = groups_of(model, lambda name, p: not is_matrix_of_layer(name, p))
    matrices = torch.optim.Muon(groups_of(model, is_matrix_of_layer), momentum=0.8, adjust_lr_fn="match_rms_adamw")
    return Several(matrices, torch.optim.AdamW(others, betas=(0.8, 0.95), eps=1e-6, fused=True))


# name: (settings, function(model) -> reference, largest difference)
REFERENCES: dict[str, tuple[dict[str, Any], Callable[[Small], Any], float]] = {
    "adamw": (
        {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
        lambda m: torch.optim.AdamW(groups_of(m), betas=(0.8, 0.95), eps=1e-6, fused=True),
        0.0,
    ),
    "sgd": ({}, lambda m: torch.optim.SGD(groups_of(m), lr=1.0, momentum=0.9, nesterov=True), 0.0),
    "sgd without momentum": ({"momentum": 0.0}, lambda m: torch.optim.SGD(groups_of(m), lr=1.0), 0.0),
    "adafactor": ({}, lambda m: torch.optim.Adafactor(groups_of(m)), 0.0),
    "lion": ({"beta1": 0.8}, lambda m: LionOfThePaper(groups_of(m), {"betas": (0.8, 0.99)}), 1e-15),
    "muon": ({"momentum": 0.8, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}, of_muon, 0.0),
}


def settings_of(name: str, **more: Any) -> OptimSettings:
    kind = name.split()[0]
    return OptimSettings(name=kind, lr=RATES[kind], weight_decay=0.1, head_lr=2 * RATES[kind], **more)


@pytest.mark.parametrize("name", REFERENCES)
def test_step_is_that_of_the_reference(name):
    """Ten steps with other rates in each, two multiples of the rate, and weight decay of matrices only."""
    settings, reference, limit = REFERENCES[name]
    ours, theirs = Small(), Small()
    optim = settings_of(name, **settings)
    optimizer = build_optimizer(dict(ours.named_parameters()), optim)
    rates = [optim.lr * (1 - 0.1 * step) for step in range(10)]
    losses = take_steps(ours, optimizer, rates[:5])
    optimizer.load_state_dict(optimizer.state_dict())
    losses += take_steps(ours, optimizer, rates[5:], start=5)
    assert losses == pytest.approx(take_steps(theirs, reference(theirs), rates), rel=1e-12, abs=0.0)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max().item() <= limit, key
    assert not any(torch.equal(a, b) for a, b in zip(ours.parameters(), Small().parameters(), strict=True))


@pytest.mark.oracle
def test_adafactor_is_that_of_transformers():
    """With its parameter scaling and without weight decay, which it multiplies by the size of the weights too."""
    from transformers.optimization import Adafactor

    ours, theirs = Small(), Small()
    optimizer = build_optimizer(
        dict(ours.named_parameters()), OptimSettings(name="adafactor", lr=0.1, weight_decay=0.0)
    )
    reference = Adafactor(theirs.parameters(), lr=0.1, relative_step=False, scale_parameter=True)
    rates = [0.1, 0.05, 0.02, 0.1]  # below 1 / sqrt(step), which limits torch's
    assert take_steps(ours, optimizer, rates) == pytest.approx(take_steps(theirs, reference, rates), rel=1e-10)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max().item() < 1e-10, key


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name):
    model = Small(torch.float32)
    optimizer = build_optimizer(dict(model.named_parameters()), settings_of(name))
    losses = take_steps(model, optimizer, [RATES[name] * (1 - step / 60) for step in range(60)])
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_muon_trains_the_matrices_of_the_layers(tmp_path, model_type):
    head = next(name for name in models.ARCHITECTURES[model_type].heads if name)
    model = scratch(tmp_path, model_type, head)
    named = dict(model.named_parameters())
    optimizer = build_optimizer(named, OptimSettings(name="muon", layer_decay=0.9))
    by_muon = {p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, p in named.items() if p in by_muon} == {name for name in linear if ".layers." in name}
    assert by_muon


def test_muon_alone_or_without_matrices():
    model = Small()
    matrices = {name: p for name, p in model.named_parameters() if is_matrix_of_layer(name, p)}
    optimizer = build_optimizer(matrices, OptimSettings(name="muon"))
    model(batch_of(0)[0]).sum().backward()
    before = copy.deepcopy(matrices)
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in matrices.items())
    others = {name: p for name, p in model.named_parameters() if name not in matrices}
    with pytest.raises(ConfigError, match="trains matrices of the layers, and all are frozen: set it to adamw"):
        build_optimizer(others, OptimSettings(name="muon"))


COMPILER = """
import sys, torch
from engine.config import OptimSettings
from engine.optim import build_optimizer
for name in sys.argv[1:]:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    optimizer = build_optimizer(dict(model.named_parameters()), OptimSettings(name=name))
    model["layers"][0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "torch._dynamo" not in sys.modules, name
"""


def test_no_optimizer_imports_the_compiler():
    done = subprocess.run([sys.executable, "-c", COMPILER, *NAMES], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Their states: in checkpoints, in estimates, from a stranger


CASES: dict[str, dict[str, Any]] = {name: {"optim.name": name} for name in NAMES}
CASES["sgd without momentum"] = {"optim.name": "sgd", "optim.momentum": 0.0}
CASES["muon of LoRA"] = {"optim.name": "muon", "model.lora.rank": 2}
# A step of the fp16 runs is skipped while the loss scale falls; some parameters have no state when the run stops.
MORE = {
    "train.precision": "fp16",
    "regularize.ema_decay": 0.5,
    "optim.layer_decay": 0.8,
    "model.gradual_unfreezing": 2,
    "train.max_steps": 7,
    "eval.every_steps": 4,
    "checkpoint.keep": ("last", "best"),
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_optimizer_is_one_that_never_stopped(tiny, tmp_path, name):
    through = tiny(**MORE | CASES[name])
    run_training(through)
    stopped = override(through, {"run.folder": str(tmp_path / "stopped")})
    assert run_training(stopped, StopAfter(5)) is None
    run_training(override(stopped, {"run.resume": "yes"}))
    assert_same_run(through.run.folder, stopped.run.folder)
    saved = load_file(tmp_path / "stopped/last/optimizer.safetensors")
    kinds = {key.partition("/")[0] for key in saved}
    assert ("average" in kinds, len(kinds) > 1) == (True, name != "sgd without momentum")


def test_resumed_run_may_offload_its_states(tiny, tmp_path):
    through = tiny(**{"train.max_steps": 4, "eval.every_steps": 2})
    run_training(through)
    stopped = override(through, {"run.folder": str(tmp_path / "stopped"), "optim.offload": True})
    assert run_training(stopped, StopAfter(3)) is None
    run_training(override(stopped, {"run.resume": "yes", "optim.offload": False}))
    assert_same_run(through.run.folder, stopped.run.folder)


@pytest.mark.parametrize("name", REFERENCES)
def test_state_of_a_stranger_is_refused(name):
    """Each kind of state: missing, of another shape, of another kind of number, and a step that none has taken."""
    model = Small(torch.float32)
    named = dict(model.named_parameters())
    optimizer = build_optimizer(named, settings_of(name, **REFERENCES[name][0]))
    start = optimizer_state.counters(optimizer)
    take_steps(model, optimizer, [1e-3, 1e-3])
    saved = optimizer_state.collect(optimizer, named, start)
    averages = {f"average/{name}": p.detach() for name, p in named.items()}
    optimizer_state.check(optimizer, named, saved | averages, 2)
    if name != "sgd without momentum":
        with pytest.raises(ValueError, match="no parameter has a state after 2 steps"):
            optimizer_state.check(optimizer, named, {}, 2)
    for key, value in (saved | averages).items():
        longer = torch.zeros((*value.shape[:-1], value.shape[-1] + 1) if value.ndim else (2,))
        other = " = -1 is not a number of steps" if key.startswith("step/") else " is not a tensor of torch.float32"
        for message, changed in {" has shape": longer, other: (0 * value - 1).to(torch.int8)}.items():
            with pytest.raises(ValueError, match=re.escape(f"{key}{message}")):
                optimizer_state.check(optimizer, named, saved | averages | {key: changed}, 2)
    for key in saved:
        rest = {other: value for other, value in (saved | averages).items() if other != key}
        with pytest.raises(ValueError, match=re.escape(f"{key} is missing")):
            optimizer_state.check(optimizer, named, rest, 2)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("average", [False, True])
def test_estimated_bytes_are_those_of_the_states(name, average):
    model = Small(torch.float32)
    optimizer = build_optimizer(dict(model.named_parameters()), settings_of(name, **REFERENCES[name][0]))
    estimated = state_bytes(optimizer, average)
    take_steps(model, optimizer, [1e-3])
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    weights = [p.nbytes for group in optimizer.param_groups for p in group["params"]]
    sizes = [sum(value.nbytes for value in state.values()) for state in states]
    assert estimated == [size + average * weight for size, weight in zip(sizes, weights, strict=True)]


def test_unknown_optimizer_is_estimated_as_adamw():
    p = nn.Parameter(torch.zeros(3, 4))
    assert state_bytes(torch.optim.RMSprop([p]), average=True) == [3 * p.nbytes]


# 8 bits: bitsandbytes has a CPU path of its own, which checks the same states without a GPU


def test_adamw8bit_needs_bitsandbytes_and_a_gpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'adamw8bit' needs bitsandbytes: pip install bitsandbytes"):
        check_names(OptimSettings(name="adamw8bit"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="on an NVIDIA GPU only, and this machine has none: set it to adamw"):
        check_names(OptimSettings(name="adamw8bit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_names(OptimSettings(name="adamw8bit"))
    with pytest.raises(ConfigError, match=r"on an NVIDIA GPU only, and run\.device is the CPU"):
        build_optimizer(dict(Small().named_parameters()), OptimSettings(name="adamw8bit"))


def test_adamw8bit_keeps_what_is_expected_and_resumes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pair = [nn.Linear(64, 65), nn.Linear(64, 65)]
    pair[1].load_state_dict(pair[0].state_dict())
    built = [bitsandbytes.optim.AdamW8bit([{"params": [*model.parameters()]}], lr=1e-2) for model in pair]

    def step(model, optimizer, count):
        for i in range(count):
            model(torch.full((2, 64), 1.0 + i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    start = optimizer_state.counters(built[0])
    step(pair[0], built[0], 3)
    named = dict(pair[0].named_parameters())
    sizes = [sum(v.nbytes for v in built[0].state[p].values() if isinstance(v, Tensor)) for p in named.values()]
    assert sizes == state_bytes(built[0], average=False)
    tensors, plain = optimizer_state.split(optimizer_state.collect(built[0], named, start))
    saved = copy.deepcopy(optimizer_state.join(tensors, json.loads(json.dumps(plain))))
    pair[1].load_state_dict(pair[0].state_dict())
    theirs = dict(pair[1].named_parameters())
    optimizer_state.check(built[1], theirs, saved, 3)
    optimizer_state.load(built[1], theirs, saved)
    for model, optimizer in zip(pair, built, strict=True):
        step(model, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in pair), strict=True))
    for kind in ("state1", "qmap2", "absmax1"):
        for value in (saved[f"{kind}/weight"][:-1], saved[f"{kind}/weight"].half()):
            with pytest.raises(ValueError, match=rf"{kind}/weight (has shape|is not a tensor of)"):
                optimizer_state.check(built[1], theirs, saved | {f"{kind}/weight": value}, 3)


# What is refused, and what is said


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("setting", "value"), [("beta1", 0.8), ("beta2", 0.9), ("eps", 1e-6), ("momentum", 0.5)])
def test_setting_of_another_optimizer_is_refused(monkeypatch, name, setting, value):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optim = OptimSettings(**{"name": name, setting: value})
    if setting in SETTINGS[name]:
        check_names(optim)
    else:
        with pytest.raises(ConfigError, match=rf"optim\.{setting} = {value} has no effect on {name}, only on .* and "):
            check_names(optim)


def test_muon_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"optim.name = 'muon' needs torch 2.9 or newer, and this is torch "):
        check_names(OptimSettings(name="muon"))


def test_rate_of_adamw_gets_a_note_where_another_is_usual():
    for name in SETTINGS:
        notes = describe_optimizer(OptimSettings(name=name))
        assert len(notes) == (name in ("sgd", "adafactor", "lion")), name
        assert all(note.startswith(f"optim.lr = 5e-05 is a learning rate of adamw; {name} ") for note in notes)
        assert describe_optimizer(OptimSettings(name=name, lr=1e-3)) == []
