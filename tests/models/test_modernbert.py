"""What is ModernBERT's own: both layouts of config.json, windows, poolings, its dense layer, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_models as tiny
from support import zoo

import models
from data import load_tokenizer
from data.formats.lines import locate
from models import ModelError

BASE = {  # fields of ModernBERT-base, as published
    "model_type": "modernbert",
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "tie_word_embeddings": True,
    "vocab_size": 50368,
}
READ = models.ARCHITECTURES["modernbert"].read_config
HEADS = ("sequence-classification", "token-classification", "masked-lm")


def kinds_of(depth: int, every: int) -> list[str]:
    return ["sliding_attention" if i % every else "full_attention" for i in range(depth)]


def test_published_config_is_read_as_it_is():
    config = READ(BASE)
    assert [i for i in range(22) if config.is_global(i)] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert config.thetas == (160000.0, 10000.0)
    assert (config.hidden_size, config.local_attention, config.layer_norm_eps, config.norm_bias) == (
        768,
        128,
        1e-5,
        False,
    )


def test_newer_layout_says_the_same():
    """transformers 5 writes the kind of each layer, and the thetas by kind."""
    older = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
    newer = {name: value for name, value in BASE.items() if name not in older}
    newer["layer_types"] = kinds_of(22, 3)
    thetas = {"full_attention": 160000.0, "sliding_attention": 10000.0}
    newer["rope_parameters"] = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in thetas.items()}
    ours, theirs = READ(newer), READ(BASE)
    assert [ours.is_global(i) for i in range(22)] == [theirs.is_global(i) for i in range(22)]
    assert replace(ours, kinds=()) == theirs


def test_local_theta_of_none_is_the_default():
    assert READ(BASE | {"local_rope_theta": None}).thetas == (160000.0, 10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": kinds_of(21, 3)}, "layer_types = .* for each of the 22 layers"),
        ({"layer_types": ["chunked_attention"] * 22}, "should name full_attention or sliding_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}}},
            "full_attention need .* no sc",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "need a rope_theta above 0, and no scaling: {'rope_type': 'linear'}",
        ),
        ({"global_rope_theta": 0.0}, "need a rope_theta above 0"),
        ({"rope_parameters": 7}, "need a rope_theta above 0, and no scaling: 7"),
        ({"hidden_size": 36}, "heads of 3 numbers; rotary positions need an even number"),
        ({"head_dim": 32}, "head_dim = 32 should be hidden_size / num_attention_heads"),
        ({"local_attention": 0}, "local_attention = 0 should be at least 1"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers = 0 should be at least 1"),
        ({"hidden_activation": "wave"}, "hidden_activation = 'wave' is not supported"),
    ],
)
def test_other_values_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        READ(BASE | changes)


def test_unknown_pooling_is_refused(tmp_path):
    folder = tiny.config_folder(tmp_path, "modernbert", classifier_pooling="max")
    with pytest.raises(ModelError, match="pooling = 'max': choose from cls, mean, last"):
        models.from_pretrained(folder, head="sequence-classification", labels=["a", "b"], init="scratch")


@pytest.mark.parametrize("window", [1, 2, 3, 64])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_long_texts_beside_short_ones_equal_transformers(tmp_path, monkeypatch, depth, window):
    """Texts of several blocks and of one token, layers that are no multiple of global_attn_every_n_layers, in fp64."""
    monkeypatch.setattr(zoo, "LENGTHS", (70, 1, 33, 150, 2))
    fields = {"num_hidden_layers": depth, "local_attention": window, "max_position_embeddings": 160}
    head = "token-classification"
    oracle = zoo.save_oracle(tmp_path, "modernbert", head, dtype=torch.float64, num_labels=3, **fields)
    inputs = zoo.make_inputs("modernbert", head, oracle.config)
    model = models.from_pretrained(tmp_path, head=head).double().eval()
    with torch.no_grad():
        found = model(replace(inputs, labels=None)).logits
        _, expected = zoo.run_oracle(oracle, "modernbert", head, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_fewer_layers_keep_their_kinds(tmp_path):
    fields = {"num_hidden_layers": 4, "layer_types": kinds_of(4, 3)[::-1]}
    folder = tiny.config_folder(tmp_path / "config", "modernbert", **fields)
    models.save_pretrained(models.from_pretrained(folder, init="scratch"), folder)
    model = models.from_pretrained(folder, keep_layers=2)
    assert model.backbone.are_global == [True, False]
    models.save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["layer_types"] == fields["layer_types"][:2]
    pytest.importorskip("transformers").ModernBertModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_pooling_is_read_and_written(tmp_path, pooling):
    """A new classifier has the file's pooling or the recipe's, and transformers computes the same from the export."""
    transformers = pytest.importorskip("transformers")
    other = {"cls": "mean", "mean": "cls"}[pooling]
    folder = tiny.config_folder(tmp_path / "config", "modernbert", classifier_pooling=pooling)
    make = {"head": "sequence-classification", "labels": ["a", "b", "c"], "init": "scratch"}
    assert models.from_pretrained(folder, **make).head.shape.pooling == pooling
    model = models.from_pretrained(folder, **make, pooling=other).eval()
    models.save_pretrained(model, tmp_path / "saved")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert oracle.config.classifier_pooling == other
    inputs = zoo.make_inputs("modernbert", "sequence-classification", oracle.config)
    with torch.no_grad():
        _, expected = zoo.run_oracle(oracle, "modernbert", "sequence-classification", inputs)
        torch.testing.assert_close(model(inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS[:2])
def test_new_classifiers_start_from_the_adapted_dense_layer(tmp_path, head):
    adapted = tiny.scratch(tmp_path / "config", "modernbert", "masked-lm")
    models.save_pretrained(adapted, tmp_path / "saved")
    model = models.from_pretrained(tmp_path / "saved", head=head, labels=["a", "b"])
    assert sorted(model.report.initialised) == ["head.classifier.bias", "head.classifier.weight"]
    assert torch.equal(model.head.dense.weight, adapted.head.dense.weight)
    assert torch.equal(model.head.norm.weight, adapted.head.norm.weight)


def test_spans_are_not_read_from_a_classifier(tmp_path):
    """The two outputs of both have one name in the file."""
    models.save_pretrained(tiny.scratch(tmp_path / "config", "modernbert", "sequence-classification"), tmp_path)
    with pytest.raises(ModelError, match=r"ForSequenceClassification's, no question-answering head; --model.head_init"):
        models.from_pretrained(tmp_path, head="question-answering")


def test_new_weights_are_truncated_and_scaled_as_published(tmp_path):
    fields = {"hidden_size": 96, "intermediate_size": 96, "initializer_range": 0.02, "initializer_cutoff_factor": 2.0}
    model = models.from_pretrained(tiny.config_folder(tmp_path, "modernbert", **fields), init="scratch").backbone
    first = model.layers[0]
    for weight, std in ((first.attention.qkv.weight, 0.02), (first.mlp.down.weight, 0.02 / 6**0.5)):
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.05)  # of a normal distribution cut at 2
    assert first.attention_norm is None
    assert all(bias is None for bias in (first.attention.qkv.bias, first.mlp.up.bias, first.mlp_norm.bias))


TEXTS = ["A  fine film.", "the [MASK] was good", "ünïcode 北京 \n x", "", " lead", "e\u0301 composed"]


def test_shipped_tokenizer_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = Path(locate("package:data/samples/movie_reviews/modernbert"))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.encode(text, "a pair").ids == theirs(text, "a pair")["input_ids"]
    vocabulary = models.read_config(folder)["vocab_size"]
    assert vocabulary == ours.get_vocab_size() == len(theirs)


@pytest.mark.parametrize("field", ["initializer_range", "initializer_cutoff_factor"])
def test_weights_may_start_at_zero(tmp_path, field):
    tiny.config_folder(tmp_path, "modernbert", **{field: 0.0})
    model = models.from_pretrained(tmp_path, init="scratch")
    assert not model.backbone.word_embeddings.weight.any()
