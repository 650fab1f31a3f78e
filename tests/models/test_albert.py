"""What is ALBERT's own: layers that share their weights, computed several times."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny_models as tiny

import models
from models import ModelError

HEAD = "sequence-classification"


def build(folder, depth=4, **options):
    tiny.config_folder(folder, "albert", num_hidden_layers=depth)
    return models.from_pretrained(folder, head=HEAD, labels=["a", "b", "c"], init="scratch", **options)


def gradients(model, inputs, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(inputs).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_deeper_model_has_no_more_weights(tmp_path):
    shallow, deep = (build(tmp_path / str(depth), depth) for depth in (1, 5))
    assert [name for name, _ in shallow.named_parameters()] == [name for name, _ in deep.named_parameters()]
    inputs = tiny.inputs_of(deep)
    assert not torch.equal(shallow.eval()(inputs).logits, deep.eval()(inputs).logits)


def test_drop_path_rises_with_the_depth(tmp_path):
    model = build(tmp_path, dropout={"drop_path": 0.3}).train()
    rates = []
    layer = model.backbone.layers[0]
    layer.register_forward_pre_hook(
        lambda m, args, k: rates.append(k["drop_path_share"] * m.drop_path_rate), with_kwargs=True
    )
    model(tiny.inputs_of(model))
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_stored_inputs_give_the_same_gradients(tmp_path):
    model = build(tmp_path, dropout={"hidden": 0.3, "drop_path": 0.4}).train()
    inputs = tiny.inputs_of(model)
    expected = gradients(model, inputs)
    models.checkpoint_activations(model)
    found = gradients(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lora_changes_every_depth_and_merges(tmp_path):
    model = build(tmp_path).eval()
    inputs = tiny.inputs_of(model)
    before = model(inputs).logits
    chosen = models.add_lora(model, 2, targets=["*.query", "*.value"])
    assert chosen == [f"backbone.layers.0.attention.{name}" for name in ("query", "value")]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    after = model(inputs).logits
    assert not torch.allclose(before, after)
    assert set(gradients(model, inputs)) == {name for name, p in model.named_parameters() if p.requires_grad}
    models.save_pretrained(model, tmp_path / "merged")
    merged = models.from_pretrained(tmp_path / "merged", head=HEAD).eval()
    torch.testing.assert_close(merged(inputs).logits, after, rtol=1e-5, atol=1e-5)


def test_reinitialising_counts_the_layers_with_weights(tmp_path):
    models.save_pretrained(build(tmp_path), tmp_path)
    model = models.from_pretrained(tmp_path, head=HEAD, reinit_layers=1)
    assert sum(name.startswith("backbone.layers.0.") for name in model.report.initialised) == 16
    with pytest.raises(ModelError, match=r"reinit_layers = 2: the model has 1 layers"):
        models.from_pretrained(tmp_path, head=HEAD, reinit_layers=2)


def test_keeping_a_part_of_several_groups_is_refused(tmp_path):
    tiny.config_folder(tmp_path, "albert", num_hidden_layers=4, num_hidden_groups=2)
    models.from_pretrained(tmp_path, init="scratch")
    with pytest.raises(ModelError, match="share their weights in 2 groups"):
        models.from_pretrained(tmp_path, init="scratch", keep_layers=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_groups": 3, "num_hidden_layers": 2}, "num_hidden_groups = 3 is more than num_hidden_layers = 2"),
        ({"inner_group_num": 2}, "inner_group_num = 2 is not supported"),
        ({"num_hidden_layers": 10_000}, "a model of 10000 layers"),
    ],
)
def test_other_ways_to_share_are_refused(tmp_path, fields, message):
    tiny.config_folder(tmp_path, "albert", **fields)
    with pytest.raises(ModelError, match=message):
        models.from_pretrained(tmp_path, init="scratch")


def test_published_config_is_read_as_it_is(tmp_path):
    """albert-base-v2's, with fields that transformers does not read."""
    raw = {
        "architectures": ["AlbertForMaskedLM"],
        "attention_probs_dropout_prob": 0,
        "bos_token_id": 2,
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "embedding_size": 128,
        "eos_token_id": 3,
        "gap_size": 0,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "inner_group_num": 1,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "albert",
        "net_structure_type": 0,
        "num_attention_heads": 12,
        "num_hidden_groups": 1,
        "num_hidden_layers": 12,
        "num_memory_blocks": 0,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30000,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = models.from_pretrained(tmp_path, init="scratch")
    assert sum(p.numel() for p in model.parameters()) == 11_683_584 - 768 * 769  # the paper's 12M, without the pooler
