"""Mixed precision on the CPU: gradients after unscaling, skipped steps, autocast, clipping."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config import OptimSettings
from engine.optim import build_optimizer
from engine.precision import Precision

CPU = torch.device("cpu")


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)).to(dtype)


def data(dtype=torch.float32, count=64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 16, generator=generator).to(dtype), torch.randint(0, 4, (count,), generator=generator)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def relative_error(found, expected):
    flat, reference = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (found, expected))
    return ((flat - reference).norm() / reference.norm()).item()


def backward_in(name, model, factor):
    """Return the gradients of factor * loss after unscaling, the precision and the optimizer."""
    inputs, labels = data()
    precision, optimizer = (
        Precision(name, CPU),
        build_optimizer(dict(model.named_parameters()), OptimSettings(weight_decay=0.0)),
    )
    logits = precision.forward(model, inputs)
    precision.backward(factor * F.cross_entropy(logits.float(), labels))
    precision.unscale_(optimizer)
    return gradients(model), precision, optimizer


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6])
def test_p15_fp16_gradients_after_unscaling_equal_fp32(factor):
    expected, _, _ = backward_in("fp32", mlp(), factor)
    found, precision, _ = backward_in("fp16", mlp(), factor)
    assert precision.scaler.get_scale() == 2.0**16
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert relative_error(found, expected) < 1e-3


def test_p15_without_the_scale_small_gradients_are_lost():
    """The error of the test above is that large without a scaler."""
    expected, _, _ = backward_in("fp32", mlp(), 1e-6)
    model, (inputs, labels) = mlp(), data()
    logits = Precision("fp16", CPU).forward(model, inputs)
    (1e-6 * F.cross_entropy(logits.float(), labels)).backward()
    assert relative_error(gradients(model), expected) > 1e-2


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_p15_non_finite_gradient_skips_the_step_and_halves_scale(factor):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    _, precision, optimizer = backward_in("fp16", model, factor)
    norm = precision.clip_(model.parameters(), 1.0)
    assert not norm.isfinite()
    assert precision.step(optimizer, norm)[0] is False
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
    assert precision.scaler.get_scale() == 2.0**15

    optimizer.zero_grad()  # the next step is an ordinary one
    inputs, labels = data()
    logits = precision.forward(model, inputs)
    precision.backward(F.cross_entropy(logits.float(), labels))
    precision.unscale_(optimizer)
    assert precision.step(optimizer, precision.clip_(model.parameters(), 1.0))[0] is True
    assert not any(map(torch.equal, model.parameters(), before))
    assert precision.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
def test_p15_non_finite_norm_skips_a_step_without_a_scaler(name, norm):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    _, precision, optimizer = backward_in(name, model, 1.0)
    stepped, on_host = precision.step(optimizer, torch.tensor(norm))
    assert stepped is False
    assert on_host == norm or math.isnan(norm)
    assert all(map(torch.equal, model.parameters(), before))
    assert precision.scaler.get_scale() == 1.0


def test_p15_fp32_equals_the_plain_loop_bit_for_bit():
    inputs, labels = data()
    ours, plain = mlp(), mlp()
    precision = Precision("fp32", CPU)
    settings = OptimSettings(lr=1e-2, weight_decay=0.01)
    optimizer, reference = (build_optimizer(dict(model.named_parameters()), settings) for model in (ours, plain))
    for _ in range(5):
        loss = F.cross_entropy(precision.forward(ours, inputs), labels)
        optimizer.zero_grad()
        precision.backward(loss)
        precision.unscale_(optimizer)
        assert precision.step(optimizer, precision.clip_(ours.parameters(), 0))[0]

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
def test_forward_runs_matrix_products_in_the_named_dtype(name, dtype):
    model = mlp()
    assert Precision(name, CPU).forward(model, data()[0]).dtype == dtype
    with Precision(name, CPU).autocast():
        assert model(data()[0]).dtype == dtype
    assert model(data()[0]).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e6])
def test_clip_returns_the_norm_before_clipping(max_norm):
    model = mlp(dtype=torch.float64)
    inputs, labels = data(torch.float64)
    F.cross_entropy(model(inputs), labels).backward()
    before = gradients(model)
    norm = torch.cat([g.flatten() for g in before]).norm()
    assert norm > 0.1
    found = Precision("fp32", CPU).clip_(model.parameters(), max_norm)
    assert found.item() == pytest.approx(norm.item(), rel=1e-12)
    if max_norm == 0.01:
        clipped = [g * 0.01 / norm for g in before]
        torch.testing.assert_close(gradients(model), clipped, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm
    else:
        assert all(map(torch.equal, gradients(model), before))


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 5.0])
def test_clip_writes_as_torch_does_and_only_above_the_norm(max_norm):
    ours, theirs = mlp(), mlp()
    inputs, labels = data()
    for model in (ours, theirs):
        F.cross_entropy(model(inputs), labels).backward()
    norm = Precision("fp32", CPU).clip_(ours.parameters(), max_norm).item()
    assert norm == nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf).item()
    assert 0.3 < norm < 5.0
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))
    assert {p.grad._version for p in ours.parameters()} == {1 if max_norm == 0.3 else 0}


# As on a GPU: the optimizer is launched before the norm is read


def as_on_a_gpu(name="fp32"):
    precision = Precision(name, CPU)
    assert not precision.reads_wait
    precision.reads_wait = True
    return precision


def take_step(precision, model, optimizer, max_norm=0.3, spoil=None):
    """Take a step on fixed data; spoil: a value that one gradient gets. Return (whether it stepped, the norm)."""
    inputs, labels = data()
    optimizer.zero_grad()
    precision.backward(F.cross_entropy(precision.forward(model, inputs).float(), labels))
    precision.unscale_(optimizer)
    if spoil is not None:
        model[0].weight.grad[3, 5] = spoil
    return precision.step(optimizer, precision.clip_(model.parameters(), max_norm))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e6])
def test_launched_steps_equal_read_ones_bit_for_bit(name, max_norm):
    launched, read = mlp(), mlp()
    settings = OptimSettings(lr=1e-2)
    runs = [
        (amp, model, build_optimizer(dict(model.named_parameters()), settings))
        for amp, model in ((as_on_a_gpu(name), launched), (Precision(name, CPU), read))
    ]
    for _ in range(4):
        (stepped, norm), expected = (take_step(*run, max_norm) for run in runs)
        assert (stepped, norm) == expected
        assert stepped
    assert all(map(torch.equal, launched.parameters(), read.parameters()))


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_p15_launched_step_skips_itself_and_changes_nothing(spoil, max_norm, name):
    model, precision = mlp(), as_on_a_gpu(name)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimSettings(lr=1e-2))

    def everything():
        states = [state[key].clone() for state in optimizer.state.values() for key in ("step", "exp_avg", "exp_avg_sq")]
        return [p.detach().clone() for p in model.parameters()] + states

    assert take_step(precision, model, optimizer)[0]
    before = everything()
    stepped, norm = take_step(precision, model, optimizer, max_norm, spoil)
    assert not stepped
    assert not math.isfinite(norm)
    assert len(before) == 4 * len([*model.parameters()])
    assert all(map(torch.equal, everything(), before))
    bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert bad == ["0.weight"]  # the others are as they were, so that the source is found
    assert not hasattr(optimizer, "found_inf")
    assert take_step(precision, model, optimizer)[0]
    assert not any(map(torch.equal, everything(), before))


def test_p15_launched_step_that_overflows_halves_the_scale():
    model, precision, (inputs, labels) = mlp(), as_on_a_gpu("fp16"), data()
    optimizer = build_optimizer(dict(model.named_parameters()), OptimSettings())
    before = [p.detach().clone() for p in model.parameters()]
    precision.backward(math.inf * F.cross_entropy(precision.forward(model, inputs).float(), labels))
    precision.unscale_(optimizer)
    assert not precision.step(optimizer, precision.clip_(model.parameters(), 1.0))[0]
    assert all(map(torch.equal, model.parameters(), before))
    assert precision.scaler.get_scale() == 2.0**15


class OwnOptimizer(torch.optim.SGD):
    """One that knows nothing of found_inf."""

    steps = 0

    def step(self):
        self.steps += 1
        super().step()


def test_own_optimizer_is_called_only_with_a_finite_norm():
    model, precision = mlp(), as_on_a_gpu()
    optimizer = OwnOptimizer(model.parameters(), lr=0.1)
    assert not take_step(precision, model, optimizer, spoil=math.nan)[0]
    assert optimizer.steps == 0
    assert take_step(precision, model, optimizer)[0]
    assert optimizer.steps == 1
