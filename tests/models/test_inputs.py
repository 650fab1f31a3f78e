"""ModelInputs: what a model reads of a micro-batch, from Python or from the loader."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from support import tiny_models as tiny

import data
import models
from data.batch import IGNORE_INDEX as IGNORE_INDEX_OF_DATA
from models.inputs import IGNORE_INDEX, ModelInputs

FIELDS = {name for name, member in vars(ModelInputs).items() if isinstance(member, property)}


@pytest.mark.parametrize("cls", [models.Inputs, data.Batch])
def test_protocol_is_satisfied(cls):
    declared = get_type_hints(cls)
    assert {field.name for field in fields(cls)} >= FIELDS
    for name in FIELDS:
        wanted = get_type_hints(vars(ModelInputs)[name].fget)["return"]
        assert declared[name] == wanted or declared[name] in getattr(wanted, "__args__", ())


def test_ignore_index_is_one_number():
    default = inspect.signature(torch.nn.functional.cross_entropy).parameters["ignore_index"].default
    assert IGNORE_INDEX == IGNORE_INDEX_OF_DATA == default


def test_batch_and_inputs_give_the_same_output(tmp_path):
    model = tiny.scratch(tmp_path, "gpt2", "causal-lm").eval()
    inputs = tiny.inputs_of(model)
    count = int((inputs.labels != IGNORE_INDEX).sum())
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)} | {"num_targets": count}
    batch = data.Batch(**values, indices=tuple(range(len(inputs.lengths))), ids=("",) * len(inputs.lengths))
    assert torch.equal(model(batch).logits, model(inputs).logits)
    assert torch.equal(model(batch).loss_sum, model(inputs).loss_sum)


@pytest.mark.parametrize(("kind", "field"), [("bert", "input_ids"), ("vit", "pixel_values"), ("t5", "input_ids")])
def test_a_field_that_is_missing_is_named(tmp_path, kind, field):
    model = tiny.scratch(tmp_path, kind, None).eval()
    other = models.pack_images(torch.zeros(1, 3, 8, 8)) if kind != "vit" else models.pack([[1, 2]])
    with pytest.raises(models.ModelError, match=f"this model reads {field}"):
        model(other)


def test_to_keeps_what_is_no_tensor():
    inputs = models.pack([[1, 2], [3]], labels=torch.tensor([1, 0])).to("cpu")
    assert inputs.lengths == (2, 1)
    assert inputs.num_targets is None
    assert inputs.labels.tolist() == [1, 0]
