"""The average of the weights: its formula, its use in evaluation and checkpoints, and that training ignores it."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from support.runs import logged_rows, run_training
from torch import nn

from engine.ema import Ema


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_average_is_the_weighted_sum_of_all_earlier_weights(decay):
    """In fp64: the weights of a step count 1 - d of that step times the d of all later steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema, history = Ema(optimizer, decay), []
    for step in range(1, 8):
        model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        ema.update_(step)
        history.append(model.weight.detach().clone())
    rates = [min(decay, (1 + step) / (10 + step)) for step in range(1, 8)]
    shares = [(1 - rates[i]) * math.prod(rates[i + 1 :]) for i in range(7)]
    shares[0] = math.prod(rates[1:])  # the first weights are the first average
    expected = sum(share * weight for share, weight in zip(shares, history, strict=True))
    last = model.weight.detach().clone()
    with ema.in_place_of_weights():
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.weight, last)
    torch.testing.assert_close(optimizer.state[model.weight]["average"], expected, rtol=1e-12, atol=1e-12)


def test_weights_are_restored_after_an_error():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = Ema(optimizer, 0.9)
    for step in (1, 2):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        ema.update_(step)
    last = model.weight.detach().clone()

    def fails():
        with ema.in_place_of_weights():
            assert not torch.equal(model.weight, last)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.equal(model.weight, last)


def test_average_is_evaluated_and_saved_and_training_is_the_same(tiny, tmp_path):
    plain, averaged = (
        tiny(**{"run.folder": str(tmp_path / name), "regularize.ema_decay": decay, "eval.every_steps": 20})
        for name, decay in (("plain", 0.0), ("averaged", 0.9))
    )
    run_training(plain)
    run_training(averaged)
    steps = [[row for row in logged_rows(tmp_path / name) if "lr" in row] for name in ("plain", "averaged")]
    assert steps[0] == steps[1]
    found, expected = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("averaged", "plain"))
    assert all(map(torch.equal, found.values(), expected.values()))
    best = load_file(tmp_path / "averaged" / "best" / "model.safetensors")
    averages = load_file(tmp_path / "averaged" / "last" / "optimizer.safetensors")
    assert torch.equal(best["classifier.weight"], averages["average/head.classifier.weight"])
    assert not torch.equal(best["classifier.weight"], found["classifier.weight"])
    losses = [
        row["evaluation"]["loss"]
        for name in ("plain", "averaged")
        for row in logged_rows(tmp_path / name)
        if "evaluation" in row
    ]
    assert losses[0] != losses[1]
