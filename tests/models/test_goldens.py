"""Ours against the goldens of transformers (tests/support/make_goldens.py); this needs no transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import make_goldens, zoo

import models
from models import Inputs

CASES = zoo.cases()
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-6, "atol": 1e-6}}  # fp32 is stored


def golden(kind, head):
    """(inputs, {name: tensor} of all that is expected)"""
    stored = load_file(make_goldens.FOLDER / f"{kind}-{head}" / "expected.safetensors")
    inputs = {name.removeprefix("inputs."): value for name, value in stored.items() if name.startswith("inputs.")}
    lengths = {name: tuple(value.tolist()) for name, value in inputs.items() if name.endswith(("lengths", "sequences"))}
    empty = {"input_ids": None, "lengths": ()}
    expected = {name: value for name, value in stored.items() if not name.startswith("inputs.")}
    return Inputs(**(empty | inputs | lengths)), expected


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_logits_loss_and_every_gradient_are_the_golden_ones(kind, head, dtype):
    inputs, expected = golden(kind, head)
    model = models.from_pretrained(make_goldens.FOLDER / f"{kind}-{head}", head=head).to(dtype).eval()
    assert (model.report.initialised, model.report.ignored) == ([], [])
    with torch.no_grad():
        logits = model(replace(inputs, labels=None)).logits
    loss = model(inputs).loss_sum / zoo.num_targets(head, inputs.labels)
    loss.backward()
    found = {f"gradients.{name}": gradient for name, gradient in zoo.our_gradients(model).items()}
    found |= {"loss": loss.detach(), "logits": logits}
    assert found.keys() == expected.keys()
    assert sum(value.abs().max() > 1e-3 for value in expected.values()) > len(expected) / 2  # it is not all zeros
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.to(dtype), **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


def test_the_goldens_are_those_of_the_zoo_and_small():
    folders = {path.name for path in make_goldens.FOLDER.iterdir()}
    assert folders == {f"{kind}-{head}" for kind, head in CASES}  # else run tests/support/make_goldens.py
    assert sum(path.stat().st_size for path in make_goldens.FOLDER.rglob("*") if path.is_file()) < 2.5e6


@pytest.mark.oracle
@pytest.mark.parametrize("kind", dict(CASES))
def test_the_script_still_makes_what_is_committed(tmp_path, kind):
    pytest.importorskip("transformers")
    head = next(head for other, head in CASES if other == kind)
    make_goldens.make(kind, head, tmp_path)
    for name in ("model.safetensors", "expected.safetensors"):
        made, committed = load_file(tmp_path / name), load_file(make_goldens.FOLDER / f"{kind}-{head}" / name)
        assert made.keys() == committed.keys()
        for key in made:
            torch.testing.assert_close(made[key], committed[key], rtol=1e-6, atol=1e-6)
