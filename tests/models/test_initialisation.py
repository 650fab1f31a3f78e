"""Loading draws the weights that no file has, and no others; and what is drawn for a head is whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support.zoo import has_labels

import models
from models import ModelError


def saved(folder, kind, head):
    """The file of a tiny model with this head."""
    tiny.config_folder(folder, kind)
    models.save_pretrained(models.from_pretrained(folder, head=head, labels=tiny_labels(head), init="scratch"), folder)
    return folder


def tiny_labels(head):
    return ["no", "yes"] if has_labels(head) else None


@pytest.mark.parametrize(
    ("kind", "in_file", "head", "options", "drawn"),
    [
        ("gpt2", "causal-lm", "causal-lm", {}, []),  # the output is the embedding
        ("gpt2", None, "causal-lm", {}, []),
        ("t5", "seq2seq-lm", "seq2seq-lm", {}, []),
        ("bert", "masked-lm", "masked-lm", {}, []),
        ("bert", None, "masked-lm", {}, ["dense"]),
        ("bert", "masked-lm", "masked-lm", {"head_init": "reset"}, ["dense"]),
        ("bert", "sequence-classification", "sequence-classification", {}, []),
        ("gpt2", "causal-lm", "sequence-classification", {}, ["classifier"]),
    ],
)
def test_only_a_new_head_is_drawn_and_never_the_vocabulary(tmp_path, monkeypatch, kind, in_file, head, options, drawn):
    folder = saved(tmp_path, kind, in_file)
    sizes, normal = {}, torch.Tensor.normal_  # by place: under a default device one call passes here twice
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda x, *a, **k: sizes.update({x.data_ptr(): x.numel()}) or normal(x, *a, **k)
    )
    model = models.from_pretrained(folder, head=head, labels=tiny_labels(head), **options)
    assert list(sizes.values()) == [model.get_parameter(f"head.{name}.weight").numel() for name in drawn]
    assert all(p.isfinite().all() for p in model.parameters())


def test_new_language_model_head_is_equal_on_any_backbone(tmp_path):
    folder = saved(tmp_path, "bert", None)
    loaded = models.from_pretrained(folder, head="masked-lm", seed=3)
    scratch = models.from_pretrained(folder, head="masked-lm", seed=3, init="scratch")
    for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "decoder.bias"):
        assert torch.equal(loaded.head.get_parameter(name), scratch.head.get_parameter(name)), name


def test_of_a_head_that_is_in_the_file_nothing_is_made_up(tmp_path):
    """All that is left of it is the second name of the embedding."""
    path = saved(tmp_path, "bert", "masked-lm") / "model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
    kept["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(kept, path)
    with pytest.raises(ModelError, match="a part of the head is missing"):
        models.from_pretrained(tmp_path, head="masked-lm")
    assert models.from_pretrained(tmp_path, head="masked-lm", head_init="reset").report.initialised
