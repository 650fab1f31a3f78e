"""The last layer computes only what the head reads: loss, logits and every gradient are those of the whole layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import tiny_models as tiny
from support import zoo
from support.zoo import reads_pooled

import models
from models.heads import CausalLM, SequenceClassification, classification_loss
from models.inputs import IGNORE_INDEX
from models.ops.layers import mean_pool
from models.ops.packing import Selection

PAIRS = [(kind, head) for kind in zoo.KINDS for head in models.ARCHITECTURES[kind].heads if head]
CASES = [(kind, head, None) for kind, head in PAIRS if not reads_pooled(head)]
CASES += [(kind, head, pooling) for kind, head in PAIRS if reads_pooled(head) for pooling in zoo.poolings(kind)]
each_case = pytest.mark.parametrize(("kind", "head", "pooling"), CASES)
ALL_TOKENS = ("token-classification", "question-answering", "seq2seq-lm")
TWO_TOKENS = ("relation-classification", "distilled-image-classification")


def build(folder, kind, head, pooling=None, **options):
    model = tiny.scratch(folder, kind, head, pooling=pooling, **options).double().train()
    return model, tiny.inputs_of(model)


def results(model, inputs, skip, seed=0):
    """Return (loss, logits, {name: gradient}); skip: whether the last layer may skip tokens."""
    model.skips_unread_tokens = skip
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(inputs)
    out.loss_sum.backward()
    return out.loss_sum.detach(), out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    scale = max([1.0, *(g.abs().max().item() for g in expected[2].values() if g is not None)])
    for name, gradient in expected[2].items():
        close = {"rtol": 1e-12, "atol": 1e-12 * scale}
        torch.testing.assert_close(found[2][name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")


def rows_computed(model, inputs):
    """Return the number of tokens for which the MLP of the last layer is computed."""
    seen = []
    handle = model.backbone.layers[-1].mlp.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return seen[-1]


@each_case
def test_loss_logits_and_gradients_are_those_of_all_tokens(tmp_path, kind, head, pooling):
    model, inputs = build(tmp_path, kind, head, pooling)
    count = tiny.count_examples(inputs)
    inputs = tiny.select(inputs, head, [*range(count), 0])
    if inputs.markers is not None:
        inputs.markers[1] = inputs.markers[1, 0]  # both at one place
        inputs.markers[2] = inputs.markers[2].flip(0)
    for chosen in ([*range(count + 1)], [count - 1], []):
        batch = tiny.select(inputs, head, chosen)
        assert_same(results(model, batch, True), results(model, batch, False))
    without_targets = replace(inputs, labels=torch.full_like(inputs.labels, IGNORE_INDEX))
    assert_same(results(model, without_targets, True), results(model, without_targets, False))
    model.eval()
    assert_same(results(model, inputs, True), results(model, inputs, False))


@each_case
def test_tokens_that_no_head_reads_are_not_computed(tmp_path, kind, head, pooling):
    model, inputs = build(tmp_path, kind, head, pooling)
    model.skips_unread_tokens = False
    everything = rows_computed(model, inputs)
    model.skips_unread_tokens = True
    found = rows_computed(model, inputs)
    if pooling in ("mean", "cls_mean") or head in ALL_TOKENS:
        assert found == everything
    elif head in tiny.PER_TOKEN:
        assert found == (inputs.labels != IGNORE_INDEX).sum() < everything
        assert rows_computed(model, replace(inputs, labels=None)) == everything
    else:
        count = len(inputs.lengths) if head == "multiple-choice" else tiny.count_examples(inputs)
        assert found == count * (2 if head in TWO_TOKENS else 1) < everything


SETUPS = {
    "lora": lambda model: models.add_lora(model, 2, targets=["*.query", "*.value", "*.output", "*.qkv", "*.up"]),
    "checkpointing": models.checkpoint_activations,
    "frozen": lambda model: models.freeze(model, ["*.layers.0.*"]),
    "frozen-last-layer": lambda model: models.freeze(model, ["*.layers.1.*"]),
    "one-layer": None,
    "drop-path": None,
}
DROP_PATH = {"embedding": 0.0, "attention": 0.0, "hidden": 0.0, "drop_path": 0.5}
ONE_OF_EACH = (
    *(("bert", "sequence-classification"), ("bert", "masked-lm"), ("distilbert", "relation-classification")),
    *(("gpt2", "causal-lm"), ("gpt2", "sequence-classification"), ("t5", "relation-classification")),
    *(("vit", "image-classification"), ("deit", "distilled-image-classification")),
)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("kind", "head"), ONE_OF_EACH)
def test_the_rest_of_the_machinery_sees_no_difference(tmp_path, kind, head, setup):
    options = {"drop-path": {"dropout": DROP_PATH}, "one-layer": {"keep_layers": 1}}.get(setup, {})
    model, inputs = build(tmp_path, kind, head, **options)
    if SETUPS[setup] is not None:
        SETUPS[setup](model)
        model.double()
    for p in model.parameters():
        assert p.dtype == torch.float64
    assert rows_computed(model, inputs) < 40
    for seed in range(3):  # drop path draws the same for each sequence
        assert_same(results(model, inputs, True, seed), results(model, inputs, False, seed))


def test_windows_of_a_text_are_read_one_by_one(tmp_path):
    model, inputs = build(tmp_path, "bert", "sequence-classification")
    inputs = replace(inputs, sequences=(3, 1, 2, 1), labels=inputs.labels[:4])
    assert rows_computed(model, inputs) == 7
    assert_same(results(model, inputs, True), results(model, inputs, False))


@pytest.mark.parametrize(("kind", "head"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
def test_dropout_has_the_same_mean_and_spread(tmp_path, kind, head):
    """Its random numbers differ, its distribution does not."""
    model, inputs = build(tmp_path, kind, head, dropout=0.3)
    losses = {}
    for skip in (True, False):
        model.skips_unread_tokens = skip
        with torch.no_grad():
            losses[skip] = torch.stack([model(inputs).loss_sum for _ in range(100)])
    (mean, std), (other_mean, other_std) = ((x.mean(), x.std()) for x in losses.values())
    assert std > 0
    assert abs(mean - other_mean) < 5 * (std**2 / 50) ** 0.5
    assert 0.6 < std / other_std < 1.6


# Heads and architectures of one's own


class MeanOfAll(SequenceClassification):
    """A head that reads more than the one it is made from, and does not say so."""

    def forward(self, hidden, packing, inputs):
        logits = self.classifier(mean_pool(hidden, packing))
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


class LoudLM(CausalLM):
    """A language model with another scale."""

    def forward(self, hidden, packing, inputs):
        return super().forward(2 * hidden, packing, inputs)


class LastOfAll(SequenceClassification):
    """A head that reads another token; its forward is that of the head it is made from."""

    def reads(self, packing, inputs):
        return Selection.of_each_sequence(packing.cu_seqlens[1:, None].long() - 1, packing)


@pytest.mark.parametrize("head", [MeanOfAll, LoudLM, LastOfAll])
def test_own_head_gets_the_tokens_that_it_says_it_reads(tmp_path, head):
    model, inputs = build(tmp_path, "gpt2", "causal-lm" if head is LoudLM else "sequence-classification")
    shape = replace(model.head.shape, pooling="last" if head is LastOfAll else "cls")
    own = models.TaskModel(model.backbone, head(shape).double(), model.spec)
    own.head.load_state_dict(model.head.state_dict())
    assert own.skips_unread_tokens == (head is LastOfAll)
    assert_same(results(own, inputs, own.skips_unread_tokens), results(own, inputs, False))


def test_own_architecture_may_compute_all_tokens(tmp_path):
    """Its forward has no `reads`; the head then selects what it reads by itself."""
    for kind, head in ONE_OF_EACH:
        model, inputs = build(tmp_path / head, kind, head)
        model.backbone.forward = partial(all_tokens, model.backbone)
        own = models.TaskModel(model.backbone, model.head, model.spec)
        assert not own.skips_unread_tokens
        found = results(own, inputs, False)
        del model.backbone.forward
        assert_same(found, results(model, inputs, True))


def all_tokens(backbone, inputs):
    return type(backbone).forward(backbone, inputs)
