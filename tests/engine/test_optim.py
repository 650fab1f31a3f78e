"""Schedules at closed-form points, parameter groups, penalties, dropout seeds, and mixed precision on the CPU."""

from __future__ import annotations

import math
import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from support.runs import arguments_of
from support.tiny_models import inputs_of, scratch
from torch import nn

import models
from engine.config import ConfigError, DropoutSettings, OptimSettings, RegularizeSettings, TrainSettings
from engine.optim import (
    AdamW,
    build_optimizer,
    check_schedule,
    count_steps,
    learning_rate,
    lr_scales,
    set_learning_rate,
    steps_of,
    without_gradient,
)
from engine.precision import Precision
from engine.regularize import DropoutSchedule, Penalties, seed_dropout, weigh_classes_
from models.heads import HeadShape, classification_loss
from models.inputs import IGNORE_INDEX

CPU = torch.device("cpu")
ROOT = Path(models.__file__).parent.parent
SCHEDULES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]

# (schedule, step of 100, factor of the peak) with 10 steps of warm-up, min_lr 0.1 and a wsd decay of 20 steps
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
def test_the_step_after_the_last_would_be_at_the_minimum(schedule):
    optim = OptimSettings(lr=1.0, lr_schedule=schedule, warmup_steps=3, min_lr_ratio=0.25)
    assert learning_rate(40, 40, optim) == pytest.approx(0.25, rel=1e-12)
    assert learning_rate(39, 40, optim) > 0.25


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1, 0.9])
def test_a_run_of_one_step_is_at_the_peak(schedule, warmup):
    assert learning_rate(0, 1, OptimSettings(lr=2e-5, lr_schedule=schedule, warmup_steps=warmup)) == pytest.approx(
        2e-5, rel=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 7, 30])
def test_the_rate_rises_to_the_peak_and_never_again(schedule, warmup):
    optim = OptimSettings(lr=1.0, lr_schedule=schedule, warmup_steps=warmup, decay_steps=0.3)
    rates = [learning_rate(step, 30, optim) for step in range(30)]
    top = max(0, steps_of(warmup, 30) - 1)
    assert max(rates) == rates[top] == 1.0
    assert all((a < b) if step < top else (a >= b) for step, (a, b) in enumerate(pairwise(rates)))
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("warmup", "decay", "total"), [(10, 11, 20), (0.5, 0.6, 100), (0.1, 0.91, 1000), (40, 0.0, 20), (5, 0.8, 20)]
)
def test_a_warmup_and_a_decay_that_overlap_are_refused(warmup, decay, total):
    optim = OptimSettings(lr_schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    with pytest.raises(ConfigError) as error:
        check_schedule(optim, total)
    for part in (f"optim.warmup_steps = {warmup}", f"optim.decay_steps = {decay}", f"the {total:,} steps"):
        assert part in str(error.value)
    check_schedule(OptimSettings(lr_schedule="linear", warmup_steps=warmup, decay_steps=decay), total)


@pytest.mark.parametrize("total", range(1, 60))
@pytest.mark.parametrize(("warmup", "decay"), [(0.5, 0.5), (0.3, 0.7), (0.1, 0.9), (0.1, 0.2), (0.0, 0.9999)])
def test_shares_that_fit_never_jump_however_they_are_rounded(warmup, decay, total):
    optim = OptimSettings(lr=1.0, lr_schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    check_schedule(optim, total)
    warm = steps_of(warmup, total)
    assert warm == total or learning_rate(warm, total, optim) == 1.0


EPOCHS = [(1.1, 50, 55), (0.1, 30, 3), (3.0, 7, 21), (1 / 3, 9, 3), (2 / 3, 3, 2), (1.5, 7, 11)]
EPOCHS += [(1e-9, 7, 1), (2.001, 50, 101), (5e-324, 1, 1), (1e9, 10**6, 10**15), (0.7, 10, 7), (1.0000001, 10, 11)]


@pytest.mark.parametrize(("epochs", "epoch_steps", "steps"), EPOCHS)
def test_a_begun_step_is_whole_and_rounding_begins_none(epochs, epoch_steps, steps):
    assert count_steps(TrainSettings(epochs=epochs), epoch_steps) == steps
    assert count_steps(TrainSettings(epochs=epochs, max_steps=4), epoch_steps) == 4


@pytest.mark.parametrize("too_many", [{"epochs": 1e308}, {"epochs": 1e20}, {"max_steps": 10**400}], ids=str)
def test_more_steps_than_can_be_counted_are_a_sentence(too_many):
    ((name, value),) = too_many.items()
    with pytest.raises(ConfigError, match=f"train.{name} = ") as error:
        count_steps(TrainSettings(**too_many), 100)
    assert str(value) in str(error.value)


def test_a_warmup_longer_than_the_run_never_reaches_the_peak():
    assert learning_rate(9, 10, OptimSettings(lr=1.0, warmup_steps=40)) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "total", "steps"), [(0, 50, 0), (0.1, 50, 5), (0.999, 1000, 999), (1, 50, 1), (7, 50, 7)]
)
def test_below_one_is_a_share(value, total, steps):
    assert steps_of(value, total) == steps


@pytest.mark.parametrize("head", sorted(filter(None, models.ARCHITECTURES["bert"].heads)))
def test_biases_and_norms_do_not_decay(checkpoint_folder, head):
    labels = ["a", "b"] if models.HEADS[head].has_labels else None
    model = models.from_pretrained(checkpoint_folder, head=head, labels=labels)
    model.backbone.word_embeddings.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimSettings(lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-6), weight_decay=0.3)
    names = {p: name for name, p in model.named_parameters()}
    decay, other = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.8, 0.95) and g["eps"] == 1e-6 and g["lr"] == 1e-3 for g in optimizer.param_groups)
    plain = {name for name in names.values() if name.endswith(".bias") or "norm" in name}
    assert other == plain
    assert decay == set(names.values()) - plain - {"backbone.word_embeddings.weight"}


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimSettings(), 0.1)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_a_group_may_have_a_rate_of_its_own():
    body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "lr_scale": 10.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for lr in (0.125, 0.25):  # it does not pile up
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, 10 * lr]


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_layer_decay_falls_from_the_head_to_the_embeddings(tmp_path, model_type):
    """Every parameter, against the depth that its name says; the embeddings lie below the deepest stack."""
    head = next(name for name in models.ARCHITECTURES[model_type].heads if name)
    model = scratch(tmp_path, model_type, head)
    scales = lr_scales(model, OptimSettings(layer_decay=0.5))
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
    assert set(lr_scales(model, OptimSettings()).values()) == {1.0}


def test_a_head_and_named_parameters_have_rates_of_their_own(tmp_path):
    model = scratch(tmp_path, "bert", "sequence-classification")
    optim = OptimSettings(lr=1e-4, head_lr=1e-3, layer_decay=0.5, lr_scales=("*embeddings*=0", "head.dense.*=2"))
    optimizer = build_optimizer(model, optim, 0.1)
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


def test_without_rates_of_their_own_there_are_the_two_groups_there_were(tmp_path):
    model = scratch(tmp_path, "bert", "sequence-classification")
    decaying, others = build_optimizer(model, OptimSettings(), 0.1).param_groups
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
def test_a_rate_that_cannot_be_is_one_sentence(tmp_path, optim, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(scratch(tmp_path, "bert", "sequence-classification"), optim, 0.1)


def test_without_gradient_names_what_backward_did_not_reach():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2, bias=False), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    model["used"](torch.ones(1, 2)).sum().backward()
    assert without_gradient(model) == ["unused.weight"]


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)).to(dtype)


def data(dtype=torch.float32, count=64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 16, generator=generator).to(dtype), torch.randint(0, 4, (count,), generator=generator)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


PENALTIES = [(0.0, 0.0, 0.0), (0.03, 0.0, 0.0), (0.0, 0.2, 0.0), (0.0, 0.0, 0.5), (0.03, 0.2, 0.5)]


@pytest.mark.parametrize(("l1", "l2", "l2_sp"), PENALTIES)
@pytest.mark.parametrize("patterns", [(), ("backbone.*",), ("*attention.query.weight", "head.*")])
def test_penalties_are_the_gradient_of_the_penalised_loss(checkpoint_folder, l1, l2, l2_sp, patterns):
    """Against autograd, in fp64, with a head that is new and so is not held by l2_sp."""

    def build():
        labels = ["a", "b"]
        model = models.from_pretrained(checkpoint_folder, head="sequence-classification", labels=labels, dropout=0.0)
        return model.double()

    start, found, expected = build(), build(), build()
    for model in (found, expected):
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        model.backbone.layers[0].mlp.up.weight.data[0] = 0.0  # |w| at 0 has gradient 0
    batch = models.pack([[2, 7, 8, 3], [2, 9, 3]], labels=torch.tensor([0, 1]))
    found(batch).loss_sum.backward()
    penalties = Penalties(found, RegularizeSettings(l1=l1, l2=l2, l2_sp=l2_sp, penalized_parameters=patterns), start)
    penalties.add_gradients_()

    before, penalty = dict(start.named_parameters()), torch.zeros((), dtype=torch.float64)
    for name, w in expected.named_parameters():
        if w.ndim < 2 or (patterns and not any(fnmatchcase(name, pattern) for pattern in patterns)):
            continue
        penalty = penalty + l1 * w.abs().sum() + l2 / 2 * w.square().sum()
        if not name.startswith("head."):
            penalty = penalty + l2_sp / 2 * (w - before[name].detach()).square().sum()
    (expected(batch).loss_sum + penalty).backward()
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-12, atol=1e-12)
    assert penalties.log() == ({"penalty": pytest.approx(penalty.item(), rel=1e-12)} if l1 or l2 or l2_sp else {})


def test_penalties_leave_a_parameter_without_gradient_alone():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[0](torch.ones(1, 2)).sum().backward()
    Penalties(model, RegularizeSettings(l1=0.5, l2=0.5)).add_gradients_()
    assert model[1].weight.grad is None
    assert not torch.equal(model[0].weight.grad, torch.ones(2, 2))


def test_a_penalty_on_nothing_is_refused(checkpoint_folder):
    model = models.from_pretrained(checkpoint_folder, head="sequence-classification", labels=["a", "b"])
    with pytest.raises(ConfigError, match=r"'backbone.layer.\*' matches no trained matrix or embedding; one is"):
        Penalties(model, RegularizeSettings(penalized_parameters=("backbone.layer.*",)))
    scratch = models.from_pretrained(checkpoint_folder, "sequence-classification", ["a", "b"], init="scratch")
    for start, patterns in ((scratch, ()), (model, ("head.*",))):
        with pytest.raises(ConfigError, match=r"regularize.l2_sp = 0.1 has no effect: no weight"):
            Penalties(model, RegularizeSettings(l2_sp=0.1, penalized_parameters=patterns), start)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shares", [False, True])
def test_class_weights_are_those_of_torch_without_its_mean(smoothing, shares):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 4, generator=generator), torch.tensor([0, 1, 1, 2, 1, 0, 2, 1, IGNORE_INDEX])
    counts = np.array([2, 4, 2, 0])
    head = SimpleNamespace(shape=HeadShape(hidden_size=2, num_labels=4, label_smoothing=smoothing))
    model = SimpleNamespace(head=head, labels=("a", "b", "c", "d"))
    weigh_classes_(model, RegularizeSettings(class_weights=("balanced",)), counts)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels[:-1].numpy())
    assert head.shape.class_weights == pytest.approx([*expected, 0.0])
    weigh_classes_(model, RegularizeSettings(class_weights=("1", "2", "0.5", "3")), counts)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    if shares:
        logits, labels = logits[:-1], F.one_hot(labels[:-1], 4) * 0.7 + 0.3 / 4
    found = classification_loss(logits, labels, head.shape, training=True)
    expected = F.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(classification_loss(logits, labels, head.shape, training=False), plain)


@pytest.mark.parametrize(
    ("given", "counts", "message"),
    [
        (("1", "2"), [1, 1, 1], r"= \['1', '2'\] should be balanced, or 3 numbers above 0, for 'a', 'b', 'c'"),
        (("1", "0", "1"), [1, 1, 1], "3 numbers above 0"),
        (("even",), [1, 1, 1], "3 numbers above 0"),
        (("balanced",), None, "has no effect where no single class is learned"),
    ],
)
def test_class_weights_that_cannot_be_are_one_sentence(given, counts, message):
    model = SimpleNamespace(head=SimpleNamespace(shape=HeadShape(hidden_size=2)), labels=("a", "b", "c"))
    with pytest.raises(ConfigError, match=message):
        weigh_classes_(model, RegularizeSettings(class_weights=given), None if counts is None else np.array(counts))


@pytest.mark.parametrize(
    ("schedule", "switch", "factors"),
    [
        ("constant", 0.5, [1, 1, 1, 1, 1]),
        ("linear", 0.5, [0, 0.25, 0.5, 0.75, 1]),
        ("early", 4, [1, 0.75, 0.5, 0.25, 0]),
        ("early", 0.4, [1, 0.5, 0, 0, 0]),
        ("early", 0, [0, 0, 0, 0, 0]),
        ("late", 0.4, [0, 0, 1, 1, 1]),
        ("late", 0, [1, 1, 1, 1, 1]),
    ],
)
def test_dropout_over_the_steps(schedule, switch, factors):
    layer = nn.Sequential(nn.Dropout(0.2))
    dropout = DropoutSchedule(layer, DropoutSettings(schedule=schedule, switch_step=switch), 5)
    assert [dropout.factor(step) for step in range(5)] == pytest.approx(factors)
    for step in (4, 0, 2):  # in any order, as after a resume
        dropout.set_(step)
        assert layer[0].p == pytest.approx(0.2 * factors[step])


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_a_schedule_reaches_every_dropout_of_a_model(tmp_path, model_type):
    """At factor 0 training mode computes what evaluation does; at 1 it does not."""
    head = next(name for name in models.ARCHITECTURES[model_type].heads if name and not name.endswith("-lm"))
    rates = dict.fromkeys(("embedding", "attention", "hidden", "head", "path"), 0.3)
    model = scratch(tmp_path, model_type, head, dropout=rates)
    inputs = inputs_of(model)
    expected = model.eval()(inputs).logits
    model.train()
    schedule = DropoutSchedule(model, DropoutSettings(schedule="late", switch_step=1), 2)
    schedule.set_(0)
    torch.testing.assert_close(model(inputs).logits, expected)
    schedule.set_(1)
    assert not torch.allclose(model(inputs).logits, expected)


def dropout_mask(*numbers):
    with torch.random.fork_rng(devices=[]):
        seed_dropout(*numbers, CPU)
        return F.dropout(torch.ones(512), 0.5)


def test_dropout_is_a_function_of_four_numbers():
    torch.manual_seed(0)
    first = dropout_mask(3, 1, 4, 1)
    torch.manual_seed(99)
    assert torch.equal(dropout_mask(3, 1, 4, 1), first)
    assert 150 < (first == 0).sum() < 362
    for changed in [(4, 1, 4, 1), (3, 2, 4, 1), (3, 1, 5, 1), (3, 1, 4, 2), (1, 3, 4, 1), (3, 4, 1, 1)]:
        assert not torch.equal(dropout_mask(*changed), first), changed


def test_only_the_generator_in_use_is_seeded(monkeypatch):
    seeds: list[int] = []

    class Generator:
        manual_seed = seeds.append

    monkeypatch.setattr(torch.cuda, "default_generators", (None, Generator, None))
    monkeypatch.setattr(torch, "manual_seed", None)
    before = torch.get_rng_state()
    seed_dropout(3, 1, 4, 1, torch.device("cuda", 1))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        seed_dropout(3, 1, 4, 1, CPU)
        assert [torch.initial_seed()] == seeds


def test_p21_ranks_steps_and_micro_batches_draw_different_masks():
    masks = {tuple(dropout_mask(*numbers).tolist()) for numbers in product((0, 1), (0, 1, 7), (0, 1, 2), (0, 1, 2, 3))}
    assert len(masks) == 2 * 3 * 3 * 4


def relative_error(found, expected):
    flat, reference = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (found, expected))
    return ((flat - reference).norm() / reference.norm()).item()


def backward_in(name, model, factor):
    """Gradients of factor * loss after unscaling, and the precision and optimizer that made them."""
    inputs, labels = data()
    precision, optimizer = Precision(name, CPU), build_optimizer(model, OptimSettings(), 0.0)
    with precision.autocast():
        logits = model(inputs)
    precision.backward(factor * F.cross_entropy(logits.float(), labels))
    precision.unscale_(optimizer)
    return gradients(model), precision, optimizer


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6])
def test_p15_fp16_gradients_after_unscaling_are_those_of_fp32(factor):
    expected, _, _ = backward_in("fp32", mlp(), factor)
    found, precision, _ = backward_in("fp16", mlp(), factor)
    assert precision.scaler.get_scale() == 2.0**16
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert relative_error(found, expected) < 1e-3


def test_p15_without_the_scale_small_gradients_are_lost():
    """What the test above would see if the scaler did nothing."""
    expected, _, _ = backward_in("fp32", mlp(), 1e-6)
    model, (inputs, labels) = mlp(), data()
    with Precision("fp16", CPU).autocast():
        logits = model(inputs)
    (1e-6 * F.cross_entropy(logits.float(), labels)).backward()
    assert relative_error(gradients(model), expected) > 1e-2


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_p15_a_gradient_that_is_not_finite_skips_the_step_and_halves_the_scale(factor):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    _, precision, optimizer = backward_in("fp16", model, factor)
    norm = precision.clip_(model.parameters(), 1.0)
    assert not math.isfinite(norm)
    assert precision.step(optimizer, norm) is False
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
    assert precision.scaler.get_scale() == 2.0**15

    optimizer.zero_grad()  # and the next step is an ordinary one
    inputs, labels = data()
    with precision.autocast():
        logits = model(inputs)
    precision.backward(F.cross_entropy(logits.float(), labels))
    precision.unscale_(optimizer)
    assert precision.step(optimizer, precision.clip_(model.parameters(), 1.0)) is True
    assert not any(map(torch.equal, model.parameters(), before))
    assert precision.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
def test_p15_without_a_scaler_a_step_that_is_not_finite_is_skipped_too(name, norm):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    _, precision, optimizer = backward_in(name, model, 1.0)
    assert precision.step(optimizer, norm) is False
    assert all(map(torch.equal, model.parameters(), before))
    assert precision.scaler.get_scale() == 1.0


def test_p15_fp32_is_the_plain_loop_bit_for_bit():
    inputs, labels = data()
    ours, plain = mlp(), mlp()
    precision = Precision("fp32", CPU)
    optimizer, reference = (build_optimizer(model, OptimSettings(lr=1e-2), 0.01) for model in (ours, plain))
    for _ in range(5):
        with precision.autocast():
            loss = F.cross_entropy(ours(inputs), labels)
        optimizer.zero_grad()
        precision.backward(loss)
        precision.unscale_(optimizer)
        assert precision.step(optimizer, precision.clip_(ours.parameters(), 0))

        expected = F.cross_entropy(plain(inputs), labels)
        reference.zero_grad()
        expected.backward()
        reference.step()
        assert torch.equal(loss, expected)
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))
    assert not torch.equal(ours[0].weight, mlp()[0].weight)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_runs_matrix_products_in_the_named_dtype(name, dtype):
    model = mlp()
    with Precision(name, CPU).autocast():
        assert model(data()[0]).dtype == dtype
    assert model(data()[0]).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e6])
def test_clip_returns_the_norm_before(max_norm):
    model = mlp(dtype=torch.float64)
    inputs, labels = data(torch.float64)
    F.cross_entropy(model(inputs), labels).backward()
    before = gradients(model)
    norm = torch.cat([g.flatten() for g in before]).norm()
    assert norm > 0.1
    found = Precision("fp32", CPU).clip_(model.parameters(), max_norm)
    assert found == pytest.approx(norm.item(), rel=1e-12)
    if max_norm == 0.01:
        clipped = [g * 0.01 / norm for g in before]
        torch.testing.assert_close(gradients(model), clipped, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm
    else:
        assert all(map(torch.equal, gradients(model), before))


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 5.0])
def test_gradients_are_written_by_clipping_only_where_it_changes_them_and_then_as_torch_does(max_norm):
    ours, theirs = mlp(), mlp()
    inputs, labels = data()
    for model in (ours, theirs):
        F.cross_entropy(model(inputs), labels).backward()
    norm = Precision("fp32", CPU).clip_(ours.parameters(), max_norm)
    assert norm == nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf).item()
    assert 0.3 < norm < 5.0
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))
    assert {p.grad._version for p in ours.parameters()} == {1 if max_norm == 0.3 else 0}


# What an optimizer of torch's does beside its step


def test_the_optimizer_is_torchs_bit_for_bit():
    theirs, ours = (nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9), "eps": 1e-6, "fused": True}
    pairs = [(theirs, torch.optim.AdamW(theirs.parameters(), **settings)), (ours, AdamW(ours.parameters(), **settings))]
    for step in range(4):
        for model, optimizer in pairs:
            model(torch.full((2, 5), float(step), dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert str(pairs[0][1].state_dict()) == str(pairs[1][1].state_dict())


def test_a_run_does_not_import_the_compiler(tiny, tmp_path):
    arguments = arguments_of(tiny(**{"train.max_steps": 3, "eval.every_steps": 2}), tmp_path / "recipe.toml")
    code = "import sys; from engine.train import main; main(sys.argv[1:]); sys.exit('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
