"""Penalties against autograd, class weights, dropout over the steps, and the seeds of a micro-batch's dropout."""

from __future__ import annotations

import random
from fnmatch import fnmatchcase
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.runs import logged_rows, run_training
from support.tiny_models import inputs_of, scratch
from torch import nn

import models
from engine.config import ConfigError, DropoutSettings, RegularizeSettings
from engine.imbalance import apply_class_weights, apply_pos_weight
from engine.regularize import DropoutSchedule, Penalties, seed_dropout, seed_everything
from models.heads import HeadShape, classification_loss
from models.inputs import IGNORE_INDEX

CPU = torch.device("cpu")


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


PENALTIES = [(0.0, 0.0, 0.0), (0.03, 0.0, 0.0), (0.0, 0.2, 0.0), (0.0, 0.0, 0.5), (0.03, 0.2, 0.5)]


@pytest.mark.parametrize(("l1", "l2", "l2_sp"), PENALTIES)
@pytest.mark.parametrize("patterns", [(), ("backbone.*",), ("*attention.query.weight", "head.*")])
def test_penalties_equal_the_gradient_of_the_penalised_loss(checkpoint_folder, l1, l2, l2_sp, patterns):
    """Against autograd, in fp64, with a new head, which l2_sp leaves out."""

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
    assert penalties.log(float(penalties.value)) == (
        {"penalty": pytest.approx(penalty.item(), rel=1e-12)} if l1 or l2 or l2_sp else {}
    )


def test_penalties_skip_a_parameter_without_gradient():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[0](torch.ones(1, 2)).sum().backward()
    Penalties(model, RegularizeSettings(l1=0.5, l2=0.5)).add_gradients_()
    assert model[1].weight.grad is None
    assert not torch.equal(model[0].weight.grad, torch.ones(2, 2))


def test_penalties_of_frozen_weights_are_zero(checkpoint_folder):
    """Gradual unfreezing starts with the head alone, of which l2_sp has no pretrained weight."""
    model = models.from_pretrained(checkpoint_folder, head="sequence-classification", labels=["a", "b"])
    settings = RegularizeSettings(l1=0.1, l2=0.1, l2_sp=0.1, penalized_parameters=("backbone.*",))
    penalties = Penalties(model, settings, model)
    model.backbone.requires_grad_(False)
    model(models.pack([[2, 7, 8, 3]], labels=torch.tensor([0]))).loss_sum.backward()
    before = [p.grad.clone() for p in model.head.parameters()]
    penalties.add_gradients_()
    assert all(map(torch.equal, [p.grad for p in model.head.parameters()], before))
    assert penalties.log(float(penalties.value)) == {"penalty": 0.0}


def test_penalty_without_an_effect_is_refused(checkpoint_folder):
    model = models.from_pretrained(checkpoint_folder, head="sequence-classification", labels=["a", "b"])
    with pytest.raises(ConfigError, match=r"'backbone.layer.\*' matches no trained matrix or embedding; one is"):
        Penalties(model, RegularizeSettings(penalized_parameters=("backbone.layer.*",)))
    scratch = models.from_pretrained(checkpoint_folder, "sequence-classification", ["a", "b"], init="scratch")
    for start, patterns in ((scratch, ()), (model, ("head.*",))):
        with pytest.raises(ConfigError, match=r"regularize.l2_sp = 0.1 has no effect: no weight"):
            Penalties(model, RegularizeSettings(l2_sp=0.1, penalized_parameters=patterns), start)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shares", [False, True])
def test_class_weights_equal_torchs_without_its_mean(smoothing, shares):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 4, generator=generator), torch.tensor([0, 1, 1, 2, 1, 0, 2, 1, IGNORE_INDEX])
    counts = np.array([2, 4, 2, 0])
    head = SimpleNamespace(shape=HeadShape(hidden_size=2, num_labels=4, label_smoothing=smoothing))
    model = SimpleNamespace(head=head, labels=("a", "b", "c", "d"))
    apply_class_weights(model, RegularizeSettings(class_weights=("balanced",)), counts)
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=labels[:-1].numpy())
    assert head.shape.class_weights == pytest.approx([*expected, 0.0])
    apply_class_weights(model, RegularizeSettings(class_weights=("1", "2", "0.5", "3")), counts)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    if shares:
        logits, labels = logits[:-1], F.one_hot(labels[:-1], 4) * 0.7 + 0.3 / 4
    found = classification_loss(logits, labels, head.shape, training=True)
    expected = F.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(classification_loss(logits, labels, head.shape, training=False), plain)


def test_pos_weight_is_torchs_for_any_micro_batches():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = (torch.rand(12, 4, generator=generator) < 0.3).double()
    labels[:, 2], labels[:, 3] = 0, 1
    counts = labels.sum(0).numpy()
    head = SimpleNamespace(shape=HeadShape(hidden_size=2, num_labels=4, problem="multi-label"))
    model = SimpleNamespace(head=head, labels=("a", "b", "none", "all"))
    notes = apply_pos_weight(model, RegularizeSettings(pos_weight=("balanced",)), counts, 12)
    assert head.shape.pos_weight == pytest.approx([12 / counts[0] - 1, 12 / counts[1] - 1, 1, 1])
    assert ["'none', 'all'" in note for note in notes] == [False, True]
    assert apply_pos_weight(model, RegularizeSettings(pos_weight=("1", "2", "0.5", "3")), counts, 12) == []
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for size in (1, 5, 12):
        pieces = zip(logits.split(size), labels.split(size), strict=True)
        found = sum(classification_loss(*piece, head.shape, training=True) for piece in pieces)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0], expected_gradient, rtol=1e-12, atol=0)
    plain = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    torch.testing.assert_close(classification_loss(logits, labels, head.shape, training=False), plain)
    labels[3, 1] = torch.nan  # no target
    known = ~labels.isnan()
    expected = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), pos_weight=weight, reduction="none")
    torch.testing.assert_close(classification_loss(logits, labels, head.shape, training=True), expected[known].sum())


@pytest.mark.parametrize(
    ("given", "counts", "message"),
    [
        (("1", "2"), [1, 1, 1], r"= \['1', '2'\] should be balanced, or 3 numbers above 0, for 'a', 'b', 'c'"),
        (("1", "0", "1"), [1, 1, 1], "3 numbers above 0"),
        (("even",), [1, 1, 1], "3 numbers above 0"),
        (("balanced",), None, "has no effect: this task does not learn one class per example"),
    ],
)
def test_bad_class_weights_are_refused(given, counts, message):
    model = SimpleNamespace(head=SimpleNamespace(shape=HeadShape(hidden_size=2)), labels=("a", "b", "c"))
    with pytest.raises(ConfigError, match=message):
        apply_class_weights(
            model, RegularizeSettings(class_weights=given), None if counts is None else np.array(counts)
        )


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
def test_dropout_schedule_over_the_steps(schedule, switch, factors):
    layer = nn.Sequential(nn.Dropout(0.2))
    dropout = DropoutSchedule(layer, DropoutSettings(schedule=schedule, switch_step=switch), 5)
    assert [dropout.factor(step) for step in range(5)] == pytest.approx(factors)
    for step in (4, 0, 2):  # in any order, as after a resume
        dropout.set_(step)
        assert layer[0].p == pytest.approx(0.2 * factors[step])


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_dropout_schedule_reaches_every_dropout_of_a_model(tmp_path, model_type):
    """With factor 0 training mode computes what evaluation does; with 1 it does not."""
    head = next(
        name for name in models.ARCHITECTURES[model_type].heads if name and not models.HEADS[name].is_language_model
    )
    rates = dict.fromkeys(("embedding", "attention", "hidden", "head", "drop_path"), 0.3)
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


def test_seed_dropout_seeds_only_the_generator_in_use(monkeypatch):
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


def test_p21_ranks_steps_and_micro_batches_have_own_masks():
    masks = {tuple(dropout_mask(*numbers).tolist()) for numbers in product((0, 1), (0, 1, 7), (0, 1, 2), (0, 1, 2, 3))}
    assert len(masks) == 2 * 3 * 3 * 4


def test_seed_everything_seeds_the_global_generators():
    def numbers(seed):
        seed_everything(seed)
        return random.random(), float(np.random.random()), torch.rand(1).item()

    with torch.random.fork_rng(devices=[]):
        first = numbers(2**40 + 1)
        assert numbers(2**40 + 2) != first
        assert numbers(2**40 + 1) == first


def test_training_does_not_depend_on_the_global_generators(tiny, tmp_path, monkeypatch):
    from engine import train

    ours, theirs = (tiny(**{"run.folder": str(tmp_path / name)}) for name in ("ours", "theirs"))
    run_training(ours)
    monkeypatch.setattr(train, "seed_everything", lambda seed: seed_everything(seed + 1))
    run_training(theirs)
    assert logged_rows(ours.run.folder) == logged_rows(theirs.run.folder)
