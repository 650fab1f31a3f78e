"""Learning rates at closed-form points, parameter groups, the tables of optimizers and schedules, and our AdamW."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.runs import arguments_of
from support.tiny_models import scratch
from torch import nn

import models
from engine import offload
from engine import optim as optimizers
from engine.config import ConfigError, OptimSettings, RegularizeSettings, TrainSettings
from engine.errors import TrainingError
from engine.optim import (
    build_optimizer,
    check_names,
    check_parameters,
    check_schedule,
    count_steps,
    learning_rate,
    lr_scales,
    names_without_gradient,
    set_learning_rate,
    to_steps,
)
from engine.regularize import Penalties
from engine.undecorated import SGD, AdamW

ROOT = Path(models.__file__).parent.parent
SCHEDULES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


def parameters(model):
    return dict(model.named_parameters())


# (schedule, step of 100, factor of the peak) with 10 steps of warm-up, min_lr_ratio 0.1 and a wsd decay of 20 steps
POINTS = [
    *((schedule, step, (step + 1) / 10) for schedule in SCHEDULES for step in (0, 4, 9)),
    *((schedule, 10, 1.0) for schedule in SCHEDULES[:-1]),
    *(("constant", step, 1.0) for step in (55, 99)),
    ("linear", 55, 0.55),
    ("linear", 99, 1 - 0.9 * 89 / 90),
    ("cosine", 40, 0.1 + 0.9 * 0.75),
    ("cosine", 55, 0.55),
    ("cosine", 70, 0.1 + 0.9 * 0.25),
    ("cosine", 99, 0.1 + 0.9 * math.sin(math.pi / 180) ** 2),
    ("inverse_sqrt", 39, 0.5),
    ("inverse_sqrt", 89, 1 / 3),
    ("wsd", 55, 1.0),
    ("wsd", 80, 1.0),
    ("wsd", 81, 0.955),
    ("wsd", 90, 0.55),
    ("wsd", 99, 0.145),
]


@pytest.mark.parametrize(("schedule", "step", "factor"), POINTS)
@pytest.mark.parametrize(("warmup", "decay"), [(0.1, 0.2), (10, 20)], ids=["share", "steps"])
def test_learning_rate_at_known_points(schedule, step, factor, warmup, decay):
    optim = OptimSettings(lr=3e-4, lr_schedule=schedule, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=0.1)
    assert learning_rate(step, 100, optim) == pytest.approx(3e-4 * factor, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_learning_rate_ends_at_the_minimum(schedule):
    optim = OptimSettings(lr=1.0, lr_schedule=schedule, warmup_steps=3, min_lr_ratio=0.25)
    assert learning_rate(40, 40, optim) == pytest.approx(0.25, rel=1e-12)
    assert learning_rate(39, 40, optim) > 0.25


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1, 0.9])
def test_learning_rate_of_a_single_step_is_the_peak(schedule, warmup):
    assert learning_rate(0, 1, OptimSettings(lr=2e-5, lr_schedule=schedule, warmup_steps=warmup)) == pytest.approx(
        2e-5, rel=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 7, 30])
def test_learning_rate_rises_in_the_warmup_only(schedule, warmup):
    optim = OptimSettings(lr=1.0, lr_schedule=schedule, warmup_steps=warmup, decay_steps=0.3)
    rates = [learning_rate(step, 30, optim) for step in range(30)]
    top = max(0, to_steps(warmup, 30) - 1)
    assert max(rates) == rates[top] == 1.0
    assert all((a < b) if step < top else (a >= b) for step, (a, b) in enumerate(pairwise(rates)))
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("warmup", "decay", "total"), [(10, 11, 20), (0.5, 0.6, 100), (0.1, 0.91, 1000), (40, 0.0, 20), (5, 0.8, 20)]
)
def test_overlapping_warmup_and_decay_are_refused(warmup, decay, total):
    optim = OptimSettings(lr_schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    with pytest.raises(ConfigError) as error:
        check_schedule(optim, total)
    for part in (f"optim.warmup_steps = {warmup}", f"optim.decay_steps = {decay}", f"the {total:,} steps"):
        assert part in str(error.value)
    check_schedule(OptimSettings(lr_schedule="linear", warmup_steps=warmup, decay_steps=decay), total)


@pytest.mark.parametrize("total", range(1, 60))
@pytest.mark.parametrize(("warmup", "decay"), [(0.5, 0.5), (0.3, 0.7), (0.1, 0.9), (0.1, 0.2), (0.0, 0.9999)])
def test_rounded_shares_make_no_jump_in_the_learning_rate(warmup, decay, total):
    optim = OptimSettings(lr=1.0, lr_schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    check_schedule(optim, total)
    warm = to_steps(warmup, total)
    assert warm == total or learning_rate(warm, total, optim) == 1.0


EPOCHS = [(1.1, 50, 55), (0.1, 30, 3), (3.0, 7, 21), (1 / 3, 9, 3), (2 / 3, 3, 2), (1.5, 7, 11)]
EPOCHS += [(1e-9, 7, 1), (2.001, 50, 101), (5e-324, 1, 1), (1e9, 10**6, 10**15), (0.7, 10, 7), (1.0000001, 10, 11)]


@pytest.mark.parametrize(("epochs", "epoch_steps", "steps"), EPOCHS)
def test_count_steps_rounds_up_except_within_rounding_error(epochs, epoch_steps, steps):
    assert count_steps(TrainSettings(epochs=epochs), epoch_steps) == steps
    assert count_steps(TrainSettings(epochs=epochs, max_steps=4), epoch_steps) == 4


@pytest.mark.parametrize("too_many", [{"epochs": 1e308}, {"epochs": 1e20}, {"max_steps": 10**400}], ids=str)
def test_too_many_steps_are_refused(too_many):
    ((name, value),) = too_many.items()
    with pytest.raises(ConfigError, match=f"train.{name} = ") as error:
        count_steps(TrainSettings(**too_many), 100)
    assert str(value) in str(error.value)


def test_warmup_longer_than_the_run_does_not_reach_the_peak():
    assert learning_rate(9, 10, OptimSettings(lr=1.0, warmup_steps=40)) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "total", "steps"), [(0, 50, 0), (0.1, 50, 5), (0.999, 1000, 999), (1, 50, 1), (7, 50, 7)]
)
def test_steps_of_takes_values_below_one_as_shares(value, total, steps):
    assert to_steps(value, total) == steps


@pytest.mark.parametrize("head", sorted(filter(None, models.ARCHITECTURES["bert"].heads)))
def test_biases_and_norms_do_not_decay(checkpoint_folder, head):
    labels = ["a", "b"] if models.HEADS[head].has_labels else None
    model = models.from_pretrained(checkpoint_folder, head=head, labels=labels)
    model.backbone.word_embeddings.weight.requires_grad_(False)
    settings = OptimSettings(lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(parameters(model), settings)
    names = {p: name for name, p in model.named_parameters()}
    decay, other = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.8, 0.95) and g["eps"] == 1e-6 and g["lr"] == 1e-3 for g in optimizer.param_groups)
    plain = {name for name in names.values() if name.endswith(".bias") or "norm" in name}
    assert other == plain
    assert decay == set(names.values()) - plain - {"backbone.word_embeddings.weight"}


@pytest.mark.parametrize(
    ("model_type", "unchanged"),
    [
        ("vit", {"class_token", "position_embeddings"}),
        ("deit", {"class_token", "distillation_token", "position_embeddings"}),
        ("dinov2_with_registers", {"class_token", "position_embeddings", "register_tokens"}),
        ("beit", {"class_token", *(f"layers.{i}.attention.relative_positions.table.weight" for i in range(2))}),
        ("bert", set()),  # the positions of texts are embeddings like any other, as in transformers
        ("gpt2", set()),
        ("t5", set()),
    ],
)
def test_tokens_and_positions_of_images_do_not_decay(tmp_path, model_type, unchanged):
    """As in timm. A step with zero gradients moves a parameter by its decay alone; the penalties have the same rule."""
    head = "image-classification" if unchanged else next(filter(None, models.ARCHITECTURES[model_type].heads))
    model = scratch(tmp_path, model_type, head)
    optimizer = build_optimizer(parameters(model), OptimSettings(lr=0.1, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {name.removeprefix("backbone.") for name in kept if before[name].ndim >= 2} == unchanged
    assert all(name in kept for name, p in before.items() if p.ndim < 2)
    assert Penalties(model, RegularizeSettings(l2=1.0)).weights.keys() == before.keys() - kept


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(parameters(nn.Linear(2, 2)), OptimSettings())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_lr_scale_of_a_group_multiplies_its_learning_rate():
    body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "lr_scale": 10.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for lr in (0.125, 0.25):  # twice: the factor is not applied to its own result
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, 10 * lr]


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_layer_decay_falls_from_the_head_to_the_embeddings(tmp_path, model_type):
    """The scale of every parameter follows from the depth in its name; the embeddings are below the deepest stack."""
    head = next(name for name in models.ARCHITECTURES[model_type].heads if name)
    model = scratch(tmp_path, model_type, head)
    scales = lr_scales(parameters(model), OptimSettings(layer_decay=0.5))
    depths = {}
    for name in scales:
        stack, found, rest = name.partition(".layers.")
        if found:
            depths.setdefault(stack, set()).add(int(rest.split(".")[0]))
    for name, scale in scales.items():
        stack, found, rest = name.partition(".layers.")
        if found:
            assert scale == 0.5 ** (len(depths[stack]) - int(rest.split(".")[0])), name
        elif name.startswith("head.") or name.split(".")[-2] == "norm":
            assert scale == 1.0, name
        else:
            assert scale == 0.5 ** (max(map(len, depths.values())) + 1), name
    assert {0.5, 1.0} < set(scales.values()) | {1.0}
    assert set(lr_scales(parameters(model), OptimSettings()).values()) == {1.0}


def test_head_lr_and_lr_scales_set_rates_by_name(tmp_path):
    model = scratch(tmp_path, "bert", "sequence-classification")
    optim = OptimSettings(lr=1e-4, head_lr=1e-3, layer_decay=0.5, lr_scales=("*embeddings*=0", "head.dense.*=2"))
    optim = replace(optim, weight_decay=0.1)
    optimizer = build_optimizer(parameters(model), optim)
    set_learning_rate(optimizer, 1e-4)
    rates = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[p] for name, p in model.named_parameters()}
    assert found["head.classifier.weight"] == (pytest.approx(1e-3), 0.1)
    assert found["head.dense.weight"] == (pytest.approx(2e-4), 0.1)
    assert found["head.dense.bias"] == (pytest.approx(2e-4), 0.0)
    assert found["backbone.word_embeddings.weight"] == (0.0, 0.1)
    assert found["backbone.layers.1.mlp.up.weight"] == (pytest.approx(5e-5), 0.1)
    assert found["backbone.layers.0.mlp.up.bias"] == (pytest.approx(2.5e-5), 0.0)
    assert found["backbone.embedding_norm.bias"] == (pytest.approx(1.25e-5), 0.0)


def test_groups_are_decaying_parameters_and_the_others(tmp_path):
    model = scratch(tmp_path, "bert", "sequence-classification")
    decaying, others = build_optimizer(parameters(model), OptimSettings()).param_groups
    assert all(map(torch.equal, decaying["params"], [p for p in model.parameters() if p.ndim >= 2]))
    assert all(map(torch.equal, others["params"], [p for p in model.parameters() if p.ndim < 2]))


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            OptimSettings(lr_scales=("backbone.layer.*=0.5",)),
            r"'backbone.layer.\*=0.5' matches no parameter; one is called",
        ),
        (OptimSettings(lr_scales=("head.*",)), r"'head.\*' should be PATTERN=FACTOR"),
        (OptimSettings(lr_scales=("head.*=-1",)), r"should be PATTERN=FACTOR"),
        (OptimSettings(lr=0.0, head_lr=1e-3), r"optim.head_lr = 0.001 is a multiple of optim.lr = 0"),
    ],
)
def test_bad_lr_scales_and_head_lr_are_refused(tmp_path, optim, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(parameters(scratch(tmp_path, "bert", "sequence-classification")), optim)


def test_without_gradient_names_unreached_parameters():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2, bias=False), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    model["used"](torch.ones(1, 2)).sum().backward()
    assert names_without_gradient(model) == ["unused.weight"]


# Optimizers and schedules by name, and which parameters are optimised


def test_own_schedule_gives_the_factor_after_the_warmup(monkeypatch):
    monkeypatch.setitem(optimizers.SCHEDULES, "halving", lambda step, total_steps, optim: 0.5**step)
    optim = OptimSettings(lr=2.0, lr_schedule="halving", warmup_steps=2)
    check_schedule(optim, 5)
    assert [learning_rate(step, 5, optim) for step in range(5)] == [1.0, 2.0, 0.5, 0.25, 0.125]


def test_own_optimizer_gets_the_groups_and_the_settings(monkeypatch):
    monkeypatch.setitem(optimizers.OPTIMIZERS, "own", lambda groups, optim: torch.optim.SGD(groups, lr=optim.lr))
    optimizer = build_optimizer(parameters(nn.Linear(2, 2)), OptimSettings(name="own", lr=0.3, weight_decay=0.2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.2), (0.3, 0.0)]


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (OptimSettings(lr_schedule="cosin"), r"optim.lr_schedule = 'cosin': choose from .*did you mean 'cosine'\?"),
        (OptimSettings(name="adam"), r"optim.name = 'adam': choose from adamw.*did you mean 'adamw'\?"),
    ],
)
def test_unknown_schedule_or_optimizer_is_refused(optim, message):
    model = nn.Linear(2, 2)
    for check in (lambda: check_names(optim), lambda: check_schedule(optim, 10)):
        with pytest.raises(ConfigError, match=message):
            check()
    if optim.name != "adamw":
        with pytest.raises(ConfigError, match=message):
            build_optimizer(parameters(model), optim)


def test_parameter_missing_from_the_optimizer_is_named():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2, bias=False), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["body"].parameters(), lr=1.0)
    with pytest.raises(TrainingError, match=r"in no group of the optimizer: head\.weight; add them"):
        check_parameters(model, optimizer)
    check_parameters(model["body"], optimizer)


def test_optimizer_parameter_outside_the_objective_is_refused():
    model, other = nn.Linear(2, 2), nn.Linear(3, 4, bias=False)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": other.parameters()}], lr=1.0)
    with pytest.raises(TrainingError, match=r"trained but not saved: one of shape \(4, 3\) in group 1; make"):
        check_parameters(model, optimizer)


def test_frozen_parameter_in_a_group_is_allowed():
    """Gradual unfreezing trains it later."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(parameters(model), OptimSettings())
    model.bias.requires_grad_(False)
    check_parameters(model, optimizer)


def test_check_parameters_names_some_of_many():
    model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(1_500))
    with pytest.raises(TrainingError, match=r"optimizer: 0\.weight, .*, 7\.weight, and 1,491 more; add"):
        check_parameters(model, torch.optim.SGD(model[1499].parameters(), lr=1.0))


# The undecorated optimizers: these tests fail where torch changes what it relies on


UNWRAPPED = [*((torch.optim.Optimizer, name) for name in ("add_param_group", "zero_grad", "state_dict"))]
UNWRAPPED += [(torch.optim.Optimizer, "load_state_dict"), (torch.optim.AdamW, "step"), (torch.optim.SGD, "step")]


@pytest.mark.parametrize(("owner", "name"), UNWRAPPED, ids=[f"{owner.__name__}.{name}" for owner, name in UNWRAPPED])
def test_unwrapped_method_is_torchs_own(owner, name):
    """torch still decorates it, with functools.wraps, and what is inside is written in torch/optim."""
    method = inspect.unwrap(getattr(owner, name))
    assert method is not getattr(owner, name), "no longer decorated: AdamW need not replace it"
    assert method.__name__ == name
    assert Path(inspect.getfile(method)).parent.name == "optim"
    assert inspect.unwrap(getattr(SGD if owner is torch.optim.SGD else AdamW, name)) is method


def test_offloaded_adamw_steps_as_adamw_in_parts(monkeypatch):
    """Parts of at most 20 numbers: two of the first group, its large matrix alone, and the second group."""
    monkeypatch.setattr(offload, "PART", 20)
    pair = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 9), nn.Linear(9, 2)) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    built = []
    for model, kind in zip(pair, (AdamW, offload.OffloadedAdamW), strict=True):
        groups = [{"params": [*model[:2].parameters()]}, {"params": [*model[2:].parameters()], "lr": 0.2}]
        built.append(kind(groups, lr=0.1, weight_decay=0.3, fused=True))
    sizes = [[p.numel() for p in part["params"]] for part in offload.split_groups(built[1].param_groups, 20)]
    assert sizes == [[12, 4], [36], [9], [18, 2]]
    for step in range(3):
        for model, optimizer in zip(pair, built, strict=True):
            model(torch.full((2, 3), 1.0 + step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True))
    assert str(built[0].state_dict()) == str(built[1].state_dict())


def test_offloading_is_for_adamw():
    with pytest.raises(ConfigError, match=r"optim\.offload moves the states of adamw, and optim\.name = 'sgd'"):
        check_names(OptimSettings(name="sgd", offload=True))


def test_training_does_not_import_the_compiler(tiny, tmp_path):
    arguments = arguments_of(tiny(**{"train.max_steps": 3, "eval.every_steps": 2}), tmp_path / "recipe.toml")
    code = "import sys; from engine.train import main; main(sys.argv[1:]); sys.exit('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
