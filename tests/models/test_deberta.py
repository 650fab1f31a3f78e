"""What is DeBERTa's own: published files and fields, the convolution, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support import zoo

import models
from models import ModelError

V3 = {  # the fields of deberta-v3-base
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 0,
    "vocab_size": 128100,
}


def test_published_config_is_read_as_it_is(tmp_path):
    config = models.ARCHITECTURES["deberta-v2"].read_config(V3)
    assert config.kinds == ("c2p", "p2c")
    assert (config.distances.size, config.distances.longest, config.distances.logarithmic) == (256, 512, True)
    assert config.norm_positions
    large = {"hidden_size": 1536, "num_attention_heads": 24, "attention_head_size": 64, "conv_kernel_size": 3}
    config = models.ARCHITECTURES["deberta-v2"].read_config(V3 | large | {"conv_act": "gelu"})
    assert (config.conv_kernel_size, config.conv_act, config.conv_groups) == (3, "gelu", 1)


def test_published_language_model_head_is_read_by_its_names(tmp_path):
    """Files of v3 have lm_predictions and mask_predictions, and some position embeddings that are not added."""
    oracle = zoo.save_oracle(tmp_path, "deberta-v2", "masked-lm")
    inputs = zoo.make_inputs("deberta-v2", "masked-lm", oracle.config)
    tensors = load_file(tmp_path / "model.safetensors")
    names = {name: name.replace("cls.predictions.transform", "lm_predictions.lm_head") for name in tensors}
    names = {name: new.replace("cls.predictions.bias", "lm_predictions.lm_head.bias") for name, new in names.items()}
    assert sum("lm_predictions" in name for name in names.values()) == 5
    more = {
        "mask_predictions.dense.weight": torch.ones(2),
        "deberta.embeddings.position_embeddings.weight": torch.ones(2),
    }
    save_file({names[name]: tensor for name, tensor in tensors.items()} | more, tmp_path / "model.safetensors")
    model = models.from_pretrained(tmp_path, head="masked-lm").eval()
    assert not model.report.initialised
    assert sorted(model.report.ignored) == sorted(more)
    with torch.no_grad():
        _, theirs = zoo.run_oracle(oracle, "deberta-v2", "masked-lm", inputs)
        ours = model(replace(inputs, labels=None)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    models.save_pretrained(model, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["legacy"] is True
    assert {name for name in load_file(tmp_path / "export" / "model.safetensors") if "lm_predictions" in name} == set()


@pytest.mark.parametrize("depth", [1, 2])
def test_convolution_is_that_of_transformers(tmp_path, depth):
    fields = {"conv_kernel_size": 3, "conv_act": "gelu", "num_hidden_layers": depth}
    oracle = zoo.save_oracle(tmp_path, "deberta-v2", "sequence-classification", dtype=torch.float64, **fields)
    inputs = zoo.make_inputs("deberta-v2", "sequence-classification", oracle.config)
    model = models.from_pretrained(tmp_path, head="sequence-classification").double().eval()
    with torch.no_grad():
        loss, theirs = zoo.run_oracle(oracle, "deberta-v2", "sequence-classification", inputs)
        out = model(inputs)
    torch.testing.assert_close(out.logits, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.loss_sum / len(inputs.lengths), loss, rtol=1e-10, atol=1e-10)


def test_texts_may_be_longer_without_absolute_positions(tmp_path):
    oracle = zoo.save_oracle(tmp_path, "deberta-v2", None, dtype=torch.float64)
    ids = torch.randint(1, 31, (1, 50))
    model = models.from_pretrained(tmp_path).double().eval()
    assert oracle.config.max_position_embeddings < 50
    with torch.no_grad():
        torch.testing.assert_close(model(models.pack(ids.tolist())).logits, oracle(ids).last_hidden_state[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relative_attention": False}, "relative_attention = False is not supported"),
        ({"relative_attention": None}, "relative_attention = False is not supported"),
        ({"pos_att_type": "p2p|c2p"}, "pos_att_type = 'p2p|c2p' should be p2c, c2p or p2c|c2p"),
        ({"pos_att_type": None}, "pos_att_type = None should be p2c"),
        ({"pos_att_type": 3}, "pos_att_type = 3 should be a text or a list of texts"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd = 'batch_norm' none or layer_norm"),
        ({"position_buckets": 1}, "position_buckets = 1 should be from 2 to less than"),
        ({"position_buckets": 40}, "position_buckets = 40 should be from 2 to less than twice"),
        ({"conv_kernel_size": 4}, "conv_kernel_size = 4 should be odd"),
        ({"conv_kernel_size": 3, "conv_groups": 5}, "hidden_size = 24 is not a multiple of conv_groups = 5"),
        ({"embedding_size": 12}, "embedding_size = 12 is not supported"),
        ({"attention_head_size": 5}, "attention_head_size = 5 is not supported"),
        ({"pooler_dropout": 0.1}, "pooler_dropout = 0.1 is not supported"),
    ],
)
def test_what_is_computed_differently_is_refused(tmp_path, fields, message):
    tiny.config_folder(tmp_path, "deberta-v2", **fields)
    with pytest.raises(ModelError) as caught:
        models.from_pretrained(tmp_path, init="scratch")
    assert message in str(caught.value)
