"""Published models for Chinese that are BERTs by another name, tried by the fields of their config.json."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import zoo

import models
from models import ModelError

BASE = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 21128,
}
WWM = {
    "bos_token_id": 0,
    "directionality": "bidi",
    "eos_token_id": 2,
    "output_past": True,
    "pooler_type": "first_token_transform",
}
WWM |= {"pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128}
TYPES = {"task_type_vocab_size": 3, "type_vocab_size": 4, "use_task_id": True, "vocab_size": 40000}
PUBLISHED = {
    "chinese-roberta-wwm-ext": BASE | WWM | {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "chinese-macbert-base": BASE | {"model_type": "bert", "layer_norm_eps": 1e-12, "gradient_checkpointing": False},
    "ernie-1.0-base-zh": BASE | {"model_type": "ernie", "hidden_act": "relu", "vocab_size": 18000},
    "ernie-3.0-base-zh": BASE | TYPES | {"model_type": "ernie", "max_position_embeddings": 2048},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_that_of_a_bert(tmp_path, name):
    raw = PUBLISHED[name]
    config = models.ARCHITECTURES[raw["model_type"]].read_config(raw)
    assert (config.first_position, config.embedding_width, config.project_embeddings) == (0, 768, False)
    assert config.task_type_vocab_size == (3 if "use_task_id" in raw else 0)
    small = {"hidden_size": 24, "vocab_size": 50, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw | small))
    model = models.from_pretrained(tmp_path, head="masked-lm", init="scratch").eval()
    assert model(models.pack([[5, 6, 7], [8, 9]])).logits.shape == (5, 50)
    assert model.num_token_types == raw["type_vocab_size"]


def test_older_export_of_ernie_is_read_by_its_prefix(tmp_path):
    zoo.save_oracle(tmp_path, "ernie", "sequence-classification")
    inputs = models.pack([[5, 6, 7], [8, 9]])
    expected = models.from_pretrained(tmp_path, head="sequence-classification").eval()(inputs).logits
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("ernie.", "bert.", 1): tensor for name, tensor in tensors.items()}
    assert "bert.embeddings.task_type_embeddings.weight" in renamed
    save_file(renamed, tmp_path / "model.safetensors")
    model = models.from_pretrained(tmp_path, head="sequence-classification").eval()
    assert model.report.initialised == []
    assert torch.equal(model(inputs).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert", "use_task_id": True}, 'only ERNIE has: its model_type is "ernie"'),
        ({"model_type": "ernie", "use_task_id": "yes"}, "use_task_id = 'yes' should be true or false"),
        ({"model_type": "ernie_m"}, "model_type = 'ernie_m' is not supported; choose from bert"),
        ({"model_type": "nezha"}, "model_type = 'nezha' is not supported; choose from bert"),
    ],
)
def test_what_is_no_bert_is_refused(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(BASE | fields))
    with pytest.raises(ModelError) as caught:
        models.from_pretrained(tmp_path, init="scratch")
    assert message in str(caught.value)
