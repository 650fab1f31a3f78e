"""Files as people have them: wrapped names, other heads, other names of activations and sizes, too few labels."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny

import models
from models import ModelError
from models.ops.layers import ACTIVATIONS

CLASSIFIER = "sequence-classification"


def saved(folder, model_type, head, **options):
    """A tiny model with random weights, and the folder of its files."""
    model = tiny.scratch(folder / "config", model_type, head, **options).eval()
    models.save_pretrained(model, folder / "model")
    return model, folder / "model"


def change_tensors(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors")


def change_config(folder, drop=(), **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def test_activations_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").activations.ACT2FN
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64, requires_grad=True)
    for name, function in ACTIVATIONS.items():
        ours, expected = (torch.cat([f(x), *torch.autograd.grad(f(x).sum(), x)]) for f in (function, theirs[name]))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert not set(theirs) - set(ACTIVATIONS) - {"prelu", "xielu", "laplace", "sqrtsoftplus"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize(("model_type", "head"), [("bert", CLASSIFIER), ("gpt2", "causal-lm"), ("t5", "seq2seq-lm")])
def test_names_of_a_wrapped_model_are_read(tmp_path, model_type, head, prefix):
    model, folder = saved(tmp_path, model_type, head)
    change_tensors(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    back = models.from_pretrained(folder, head=head).eval()
    assert not back.report.initialised
    inputs = tiny.inputs_of(model)
    assert torch.equal(back(inputs).loss_sum, model(inputs).loss_sum)


def test_one_tensor_wrapped_and_unwrapped_is_refused(tmp_path):
    _, folder = saved(tmp_path, "bert", CLASSIFIER)
    change_tensors(folder, lambda tensors: tensors | {"module.classifier.bias": torch.zeros(3)})
    with pytest.raises(ModelError, match="the same tensor under two names"):
        models.from_pretrained(folder, head=CLASSIFIER)


def test_names_of_an_unmerged_adapter_are_said(tmp_path):
    _, folder = saved(tmp_path, "bert", CLASSIFIER)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros(2, 24)})
    with pytest.raises(ModelError, match=r"names of an adapter that was not merged: save it with peft's"):
        models.from_pretrained(folder, head=CLASSIFIER)


def test_the_second_head_of_gpt2_is_left_out(tmp_path):
    model, folder = saved(tmp_path, "gpt2", "causal-lm")
    second = {f"multiple_choice_head.summary.{name}": torch.zeros(1, 24) for name in ("weight", "bias")}
    change_tensors(folder, lambda tensors: tensors | second)
    change_config(folder, architectures=["GPT2DoubleHeadsModel"])
    back = models.from_pretrained(folder, head="causal-lm").eval()
    assert set(back.report.ignored) == set(second)
    inputs = tiny.inputs_of(model)
    assert torch.equal(back(inputs).loss_sum, model.eval()(inputs).loss_sum)


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
@pytest.mark.parametrize(
    ("head", "task", "tensors"),
    [
        (CLASSIFIER, "SequenceClassification", {"classification_head.dense.weight": (24, 24)}),
        ("question-answering", "QuestionAnswering", {"qa_outputs.weight": (2, 24), "qa_outputs.bias": (2,)}),
    ],
)
def test_t5_heads_on_the_decoder_are_refused_by_their_class(tmp_path, model_type, head, task, tensors):
    _, folder = saved(tmp_path, model_type, "seq2seq-lm")
    saved_class = f"{'M' if model_type == 'mt5' else ''}T5For{task}"
    change_tensors(folder, lambda t: t | {name: torch.zeros(shape) for name, shape in tensors.items()})
    change_config(folder, architectures=[saved_class])
    with pytest.raises(ModelError, match=f"a {saved_class}'s.* is computed differently .*head_init reset starts a new"):
        models.from_pretrained(folder, head=head)
    again = models.from_pretrained(folder, head=head, head_init="reset")
    assert set(tensors) < set(again.report.ignored)
    assert models.from_pretrained(folder, head="seq2seq-lm").report.initialised == []


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "distilbert"])
def test_common_names_of_sizes_are_read(tmp_path, model_type):
    """With n_head alone missing, the default would silently compute another number of heads."""
    head = "seq2seq-lm" if model_type == "t5" else CLASSIFIER
    model, folder = saved(tmp_path, model_type, head)
    common = {"num_heads": "num_attention_heads", "n_head": "num_attention_heads", "n_heads": "num_attention_heads"}
    common |= {"n_embd": "hidden_size", "d_model": "hidden_size", "dim": "hidden_size"}
    common |= {"n_layer": "num_hidden_layers", "num_layers": "num_hidden_layers", "n_layers": "num_hidden_layers"}
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({common.get(name, name): value for name, value in raw.items()}))
    back = models.from_pretrained(folder, head=head).eval()
    inputs = tiny.inputs_of(model)
    assert torch.equal(back(inputs).loss_sum, model(inputs).loss_sum)


@pytest.mark.parametrize(
    ("changes", "labels", "note"),
    [
        ({"num_labels": 3, "id2label": {"0": "no", "1": "yes"}}, ("no", "yes", "LABEL_2"), "names 2 of 3 classes"),
        ({"id2label": {"2": "c", "0": "a"}}, ("a", "LABEL_1", "c"), "names 2 of 3 classes"),
        ({"num_labels": 7, "id2label": {"2": "c", "0": "a", "1": "b"}}, ("a", "b", "c"), ""),  # the head decides
        ({"id2label": None}, ("LABEL_0", "LABEL_1", "LABEL_2"), ""),
        ({"num_labels": 2, "id2label": None}, ("LABEL_0", "LABEL_1", "LABEL_2"), ""),
        ({"label2id": {"c": 0, "b": 1, "a": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}, ("a", "b", "c"), ""),
    ],
)
def test_labels_are_as_many_as_the_head_has_outputs(tmp_path, changes, labels, note):
    _, folder = saved(tmp_path, "bert", CLASSIFIER, num_labels=3)
    change_config(folder, **changes)
    model = models.from_pretrained(folder, head=CLASSIFIER)
    assert model.labels == labels
    assert bool(note) == bool(model.report.notes)
    assert note in str(model.report)
    models.save_pretrained(model, tmp_path / "again")
    assert models.from_pretrained(tmp_path / "again", head=CLASSIFIER).labels == labels


def test_labels_of_classes_that_the_head_lacks_are_refused(tmp_path):
    _, folder = saved(tmp_path, "bert", CLASSIFIER, num_labels=3)
    for numbers in ("012345", "123"):
        change_config(folder, id2label={number: f"class {number}" for number in numbers})
        with pytest.raises(ModelError, match=r"id2label names the class 3, but there are 3 classes, from 0 to 2"):
            models.from_pretrained(folder, head=CLASSIFIER)
    change_config(folder, id2label={"0": "a"})
    with pytest.raises(ModelError, match=r"knows .*id2label of config.json names 1 of 3 classes.*head_init reset"):
        models.from_pretrained(folder, head=CLASSIFIER, labels=["a", "b", "c"])


def test_an_unknown_problem_type_is_refused(tmp_path):
    _, folder = saved(tmp_path, "bert", CLASSIFIER)
    change_config(folder, problem_type="classification")
    with pytest.raises(ModelError, match=r"problem_type = 'classification': known are single_label_classification"):
        models.from_pretrained(folder, head=CLASSIFIER)
