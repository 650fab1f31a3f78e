"""The fast pieces of models/: each is the plain PyTorch it stands for, in value, gradient or distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import tiny_models as tiny
from support import zoo
from torch import nn

import models
from models.heads import find_supervised_positions
from models.inputs import IGNORE_INDEX
from models.ops.dropout import MAX_RATE, MIN_ELEMENTS, Dropout, dropout, sample_dropped_positions
from models.ops.linear_cross_entropy import CHUNK_BYTES, _chunk_bytes, linear_cross_entropy

LANGUAGE = [(kind, head) for kind in zoo.KINDS for head in models.ARCHITECTURES[kind].heads if head and "-lm" in head]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


# the loss of a language model without logits


def loss_and_gradients(function, *tensors):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    (loss / 7).backward()
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "padding"), [(0, 0), (1, 0), (37, 0), (37, 5)])
def test_linear_cross_entropy_is_linear_and_cross_entropy(monkeypatch, dtype, smoothing, bias, tokens, padding):
    monkeypatch.setattr("models.ops.linear_cross_entropy._padded_vocabulary", lambda w, dtype: len(w) + padding)
    monkeypatch.setattr(
        "models.ops.linear_cross_entropy.CHUNK_BYTES", 4 * 11 * 8
    )  # 8 tokens a chunk, the last one shorter
    generator = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((tokens, 6), (11, 6), (11,)))
    labels = torch.randint(0, 11, (tokens,), generator=generator)

    def plain(h, w, b=None):
        return F.cross_entropy(F.linear(h, w, b), labels, reduction="sum", label_smoothing=smoothing)

    def chunked(h, w, b=None):
        return linear_cross_entropy(h, w, b, labels, smoothing)

    tensors = (h, w, b) if bias else (h, w)
    found, expected = loss_and_gradients(chunked, *tensors), loss_and_gradients(plain, *tensors)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("memory", "expected"), [(2**30, 2**25), (2**34, 2**27), (2**38, 2**30)])
def test_chunks_of_logits_grow_with_the_memory_of_a_gpu(monkeypatch, memory, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert _chunk_bytes(torch.device("cuda")) == expected
    assert _chunk_bytes(torch.device("cpu")) == CHUNK_BYTES


def test_linear_cross_entropy_in_bf16_is_as_precise_as_plain(monkeypatch):
    monkeypatch.setattr("models.ops.linear_cross_entropy.CHUNK_BYTES", 4 * 50 * 8)
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(40, 16, generator=generator), torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (40,), generator=generator)

    def plain(h, w):
        return F.cross_entropy(F.linear(h, w).float(), labels, reduction="sum")

    exact = loss_and_gradients(plain, h, w)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (
            loss_and_gradients(plain, h, w),
            loss_and_gradients(lambda h, w: linear_cross_entropy(h, w, None, labels), h, w),
        )
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == c.dtype == torch.float32
        assert 0 < (a - c).norm() < 1.1 * (b - c).norm() + 1e-6 * c.norm()


def test_linear_cross_entropy_skips_frozen_gradients():
    h, w = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    loss = linear_cross_entropy(h, w, None, torch.arange(5))
    assert loss.grad_fn.saved_tensors[1] is None
    loss.backward()
    assert h.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "head"), LANGUAGE)
def test_language_model_without_logits_has_the_same_loss(tmp_path, monkeypatch, kind, head, dtype):
    model = tiny.scratch(tmp_path, kind, head, label_smoothing=0.1).to(dtype).train()
    monkeypatch.setattr("models.ops.linear_cross_entropy.CHUNK_BYTES", 4 * 5 * model.head.shape.vocab_size)
    inputs = tiny.inputs_of(model)
    found = {}
    for keep in (True, False):
        model.head.keep_logits = keep
        model.zero_grad()
        out = model(inputs)
        (out.loss_sum / 11).backward()
        found[keep] = [out.loss_sum.detach(), *(p.grad.clone() for p in model.parameters())]
        assert len(out.logits) == keep * (inputs.labels != IGNORE_INDEX).sum()
    scale = max(x.abs().max().item() for x in found[True])
    torch.testing.assert_close(found[False], found[True], rtol=0, atol=TOLERANCE[dtype] * scale)


def test_logits_are_there_wherever_someone_may_read_them(tmp_path):
    model = tiny.scratch(tmp_path, "gpt2", "causal-lm").train()
    model.head.keep_logits = False
    inputs = tiny.inputs_of(model)
    count = (inputs.labels != IGNORE_INDEX).sum()
    assert len(model(inputs).logits) == 0
    assert len(model(replace(inputs, labels=None)).logits) == len(inputs.input_ids)
    assert len(model.eval()(inputs).logits) == count
    with torch.no_grad():
        assert len(model.train()(inputs).logits) == count


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    "labels", [[], [IGNORE_INDEX] * 3, [4, IGNORE_INDEX, 0, IGNORE_INDEX, IGNORE_INDEX, 7], [1, 2, 3]]
)
def test_supervised_places_with_and_without_a_count(labels, counted):
    num_targets = sum(label != IGNORE_INDEX for label in labels)
    places = find_supervised_positions(torch.tensor(labels, dtype=torch.int64), num_targets if counted else None)
    assert (places is None) == (counted and num_targets == len(labels))
    expected = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    assert (list(range(len(labels))) if places is None else places.tolist()) == expected


# dropout


def drawn(n, rate, runs):
    """(runs, n) bool: where each of `runs` calls dropped."""
    found = torch.zeros(runs, n, dtype=torch.bool)
    for row in found:
        row[sample_dropped_positions(n, rate)] = True
    return found


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_each_position_is_dropped_independently_at_the_rate(rate):
    torch.manual_seed(0)
    runs, n = 5_000, 64
    dropped = drawn(n, rate, runs).double()
    sd = math.sqrt(rate * (1 - rate))
    z = (dropped.mean(0) - rate) / (sd / math.sqrt(runs))  # of each place
    assert z.abs().max() < 4.5
    assert 0.5 < z.square().mean() < 1.7  # not too even either
    total = dropped.sum(1)
    assert abs(total.mean() - n * rate) < 4.5 * sd * math.sqrt(n / runs)
    assert total.var() == pytest.approx(n * sd**2, rel=0.1)  # binomial
    centred = (dropped - rate) / sd
    correlation = centred.T @ centred / math.sqrt(runs)  # of each pair, about Normal(0, 1)
    pairs = correlation[torch.ones(n, n).triu(1).bool()]
    assert pairs.abs().max() < (5.5 if rate > 0.05 else 15)  # a pair of rare events is no normal sum
    assert pairs.square().mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5])
def test_the_distances_are_geometric_over_a_long_draw(rate):
    torch.manual_seed(1)
    n = 2_000_000
    distances = sample_dropped_positions(n, rate).diff()
    count = len(distances)
    assert abs(count + 1 - n * rate) < 4.5 * math.sqrt(n * rate * (1 - rate))
    for distance in (1, 2, 3, 10, 30):
        p = rate * (1 - rate) ** (distance - 1)
        assert abs((distances == distance).sum() - count * p) < 4.5 * math.sqrt(count * p)


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (5, 0.999), (10, 1e-9), (10**6, 1e-12), (8192, 0.5)])
def test_places_are_ascending_and_in_range_at_the_ends_too(n, rate):
    torch.manual_seed(0)
    for _ in range(200):
        places = sample_dropped_positions(n, rate)
        assert places.dtype == torch.int64
        if len(places):
            assert places[0] >= 0
            assert places[-1] < n
            assert (places.diff() > 0).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_draw_at_the_end_of_its_range_is_a_distance_too(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda count, dtype: torch.full((count,), uniform, dtype=dtype))
    assert sample_dropped_positions(10, 0.5).tolist() == ([] if uniform == 0 else list(range(10)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_values_are_scaled_and_gradients_share_the_mask(dtype):
    torch.manual_seed(0)
    x = torch.ones(2 * MIN_ELEMENTS, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25)
    assert y.dtype == dtype
    assert set(y.tolist()) == {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_gradcheck_of_dropout_of_any_layout(monkeypatch):
    monkeypatch.setattr("models.ops.dropout.MIN_ELEMENTS", 1)
    x = torch.randn(4, 3, 5, dtype=torch.float64).transpose(0, 2).requires_grad_()

    def seeded(x):
        torch.manual_seed(3)
        return dropout(x, 0.3)

    assert (seeded(x) == 0).any()
    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


def test_dropout_is_a_function_of_the_default_generator():
    x = torch.ones(MIN_ELEMENTS)
    found = []
    for seed in (0, 0, 1):
        torch.default_generator.manual_seed(seed)
        found.append(dropout(x, 0.1))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("rate", [0.0, 0.1, MAX_RATE + 0.1, 1.0])
@pytest.mark.parametrize("count", [0, 100, MIN_ELEMENTS])
def test_the_module_is_torchs_in_evaluation_and_at_every_rate(rate, count):
    torch.manual_seed(0)
    module = Dropout(rate)
    assert isinstance(module, nn.Dropout)  # by which engine/regularize.py finds it
    x = torch.ones(count)
    assert torch.equal(module.eval()(x), x)
    y = module.train()(x)
    assert y.shape == x.shape
    assert (y == 0).sum() == pytest.approx(count * rate, abs=5 * math.sqrt(count * rate * (1 - rate)) + 1e-9)


def test_every_dropout_of_every_architecture_is_this_one(tmp_path):
    for kind in zoo.KINDS:
        for head in models.ARCHITECTURES[kind].heads:
            model = tiny.scratch(tmp_path / f"{kind}-{head}", kind, head)
            assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {Dropout}


# activation checkpointing


def loss_and_elements_kept(model):
    """The loss of one forward, and how much is kept for the backward."""
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tiny.inputs_of(model)).loss_sum
    return loss, sum(kept)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_checkpointed_activations_change_no_gradient_and_no_name(tmp_path, monkeypatch, kind, rate):
    monkeypatch.setattr("models.ops.dropout.MIN_ELEMENTS", 1)
    head = next(head for head in models.ARCHITECTURES[kind].heads if head and head.endswith(("classification", "-lm")))
    if kind in ("t5", "mt5"):
        head = "seq2seq-lm"
    sites = dict.fromkeys(("embedding", "attention", "hidden", "drop_path"), rate)
    found = []
    for checkpointed in (False, True):
        model = tiny.scratch(tmp_path / str(checkpointed), kind, head, dropout=sites).train()
        if checkpointed:
            models.checkpoint_activations(model)
        torch.manual_seed(5)
        loss, kept = loss_and_elements_kept(model)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}, kept))
    (loss, gradients, memory), (other_loss, other_gradients, less_memory) = found
    assert other_loss == loss
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
    assert less_memory < 0.8 * memory
