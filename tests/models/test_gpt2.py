"""What is GPT-2's own: its scaling, precision and initialisation, its file's legacy names, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import zoo

import models
from models.errors import ModelError


def edit(folder, rename=lambda name: name, more=None):
    """Rewrite model.safetensors with other names, and with more tensors."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | (more or {}), folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("inverse", [False, True])
def test_upcast_attention_is_that_of_transformers(tmp_path, inverse):
    changes = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": inverse}
    oracle = zoo.save_oracle(tmp_path, "gpt2", "causal-lm", **changes)
    inputs = zoo.make_inputs("gpt2", None, oracle.config)
    model = models.from_pretrained(tmp_path, head="causal-lm").eval()
    with torch.no_grad():
        _, theirs = zoo.run_oracle(oracle, "gpt2", "causal-lm", inputs)
        torch.testing.assert_close(model(inputs).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("upcast", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_upcast_attention_is_in_fp32_under_autocast(tmp_path, monkeypatch, upcast, dtype):
    zoo.save_oracle(tmp_path, "gpt2", None, reorder_and_upcast_attn=upcast)
    model = models.from_pretrained(tmp_path).eval()
    seen = []

    def attention(query, key, value, **options):
        out = original(query, key, value, **options)
        seen.append(out.dtype)  # that of the products inside
        return out

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(models.pack([[5, 6, 7]]))
    assert seen == [dtype] * 2


def test_what_joins_the_residual_starts_smaller_with_depth(tmp_path):
    zoo.save_oracle(tmp_path, "gpt2", None, n_embd=96, n_layer=8, initializer_range=0.02)
    model = models.from_pretrained(tmp_path, init="scratch")
    for layer in model.backbone.layers:
        for part, std in (
            (layer.attention.qkv, 0.02),
            (layer.mlp.up, 0.02),
            (layer.attention.output, 0.02 / math.sqrt(16)),
            (layer.mlp.down, 0.02 / math.sqrt(16)),
        ):
            assert float(part.weight.detach().std()) == pytest.approx(std, rel=0.1)
            assert not part.bias.any()
    assert float(model.backbone.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_causal_masks_in_old_files_are_ignored(tmp_path):
    zoo.save_oracle(tmp_path, "gpt2", "causal-lm")
    inputs = models.pack([[5, 6, 7], [8, 9]])
    expected = models.from_pretrained(tmp_path, head="causal-lm").eval()(inputs).logits
    edit(tmp_path, more={"transformer.h.0.attn.bias": torch.ones(1, 1, 20, 20).bool()})
    edit(tmp_path, more={"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)})
    model = models.from_pretrained(tmp_path, head="causal-lm").eval()
    assert torch.equal(model(inputs).logits, expected)
    assert len(model.report.ignored) == 2
    edit(tmp_path, rename=lambda name: name.removeprefix("transformer."))
    assert torch.equal(models.from_pretrained(tmp_path, head="causal-lm").eval()(inputs).logits, expected)


def test_own_output_matrix_is_used_and_a_copy_is_tied(tmp_path):
    zoo.save_oracle(tmp_path, "gpt2", "causal-lm")
    embedding = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    edit(tmp_path, more={"lm_head.weight": embedding.clone()})
    tied = models.from_pretrained(tmp_path, head="causal-lm")
    assert tied.head.decoder.weight is tied.backbone.embedding.weight
    edit(tmp_path, more={"lm_head.weight": embedding + 1})
    own = models.from_pretrained(tmp_path, head="causal-lm")
    assert torch.equal(own.head.decoder.weight, embedding + 1)
    assert torch.equal(own.backbone.embedding.weight, embedding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"activation_function": "prelu"}, "activation_function = 'prelu'"),
        ({"n_head": 5}, "n_embd = 24 is not a multiple of n_head = 5"),
        ({"attn_pdrop": 1.0}, "attn_pdrop = 1.0"),
        ({"n_layer": 0}, "n_layer = 0 should be at least 1"),
        ({"scale_attn_weights": "yes"}, "scale_attn_weights = 'yes'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, message):
    zoo.save_oracle(tmp_path, "gpt2", None)
    set_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rate"),
    [({}, 0.1), ({"hidden_dropout": 0.3}, 0.3), ({"hidden_dropout": 0.3, "classifier_dropout": 0.0}, 0.0)],
)
def test_the_token_classifiers_dropout(tmp_path, changes, rate):
    zoo.save_oracle(tmp_path, "gpt2", "token-classification")
    set_config(tmp_path, **changes)
    assert models.from_pretrained(tmp_path, head="token-classification").head.dropout.p == rate


def test_dropout_sites(tmp_path):
    zoo.save_oracle(tmp_path, "gpt2", None, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    model = models.from_pretrained(tmp_path)
    layer = model.backbone.layers[0]
    assert (model.backbone.dropout.p, layer.attention.dropout, layer.dropout.p) == (0.1, 0.2, 0.3)
    model = models.from_pretrained(tmp_path, dropout=0.0)
    inputs = models.pack([[5, 6, 7], [8, 9]])
    assert torch.equal(model.train()(inputs).logits, model.eval()(inputs).logits)


def test_a_later_token_changes_nothing_before_it(tmp_path):
    zoo.save_oracle(tmp_path, "gpt2", None)
    model = models.from_pretrained(tmp_path).eval()
    one, other = model(models.pack([[5, 6, 7, 8]])).logits, model(models.pack([[5, 6, 7, 9]])).logits
    assert torch.equal(one[:3], other[:3])
    assert not torch.equal(one[3], other[3])
