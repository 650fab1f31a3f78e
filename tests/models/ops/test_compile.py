"""Compiled layers have the loss, gradients and names of the layers, in few graphs for all lengths."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from support import tiny_models as tiny
from support import zoo
from support.zoo import has_labels
from torch._dynamo.utils import counters

import models
from models.ops import compile as compiled

# Before and after attention. In T5 an encoder's 2 and a decoder's 3, of which the first is both's on torch 2.14. Up to
# 2.11 a part without operations, as before the attention of BERT, is no graph.
MAX_GRAPHS = {"t5": 5, "mt5": 5, "modernbert": 3}
SAMPLE = ("bert", "modernbert", "deberta-v2", "gpt2", "t5", "vit")  # the others are slow: their layers are alike
BATCHES = ([0, 1, 2, 3, 4], [0, 3], [4, 4, 4, 2, 2, 1, 0], [2])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def head_of(kind):
    if kind in ("t5", "mt5"):
        return "seq2seq-lm"
    return next(head for head in models.ARCHITECTURES[kind].heads if head and head.endswith(("classification", "-lm")))


def scratch(folder, kind, rate=0.0, path=0.0):
    sites = {"embedding": rate, "attention": rate, "hidden": rate, "drop_path": path}
    if not head_of(kind).endswith("-lm"):
        sites["head"] = rate
    return tiny.scratch(folder, kind, head_of(kind), dropout=sites).train()


def pair(folder, kind):
    """The same model as it is and compiled, in fp64."""
    plain = scratch(folder, kind).double()
    other = copy.deepcopy(plain)
    models.compile_layers(other, "aot_eager")
    return plain, other


def graphs():
    return counters["stats"]["unique_graphs"]


def assert_few_graphs(kind):
    assert 1 <= graphs() <= MAX_GRAPHS.get(kind, 2)


def loss_and_gradients(model, batch, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(batch).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rel=1e-9):
    torch.testing.assert_close(found[0], expected[0], rtol=rel, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= rel * max(gradient.norm(), 0.001 * largest), name


def equal(found, expected):
    return found[1].keys() == expected[1].keys() and all(torch.equal(found[1][n], g) for n, g in expected[1].items())


@pytest.mark.parametrize("kind", [k if k in SAMPLE else pytest.param(k, marks=pytest.mark.slow) for k in zoo.KINDS])
def test_all_lengths_have_the_plain_loss_in_few_graphs(tmp_path, kind):
    plain, other = pair(tmp_path, kind)
    inputs = tiny.inputs_of(plain)
    for chosen in BATCHES:
        batch = tiny.select(inputs, head_of(kind), chosen)
        assert_same(loss_and_gradients(other, batch), loss_and_gradients(plain, batch))
        assert_few_graphs(kind)
    made = graphs()
    draw, examples = random.Random(0), range(tiny.count_examples(inputs))
    for _ in range(20):  # other numbers of tokens and sequences, and other lengths
        batch = tiny.select(inputs, head_of(kind), draw.choices(examples, k=draw.randint(1, 9)))
        assert_same(loss_and_gradients(other, batch), loss_and_gradients(plain, batch))
    assert graphs() == made


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_more_layers_are_no_more_graphs(tmp_path, kind):
    depth = dict.fromkeys(models.ARCHITECTURES[kind].depth, 5)
    folder = tiny.config_folder(tmp_path, kind, **depth)
    labels = ["a", "b", "c"] if has_labels(head_of(kind)) else None
    model = models.from_pretrained(folder, head=head_of(kind), labels=labels, init="scratch", dropout=0.0).train()
    assert len(model.backbone.layers) >= 5
    models.compile_layers(model, "aot_eager")
    loss_and_gradients(model, tiny.inputs_of(model))
    assert_few_graphs(kind)


@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "vit", "t5"])
def test_compiled_dropout_repeats_for_activation_checkpointing(tmp_path, kind):
    model = scratch(tmp_path, kind, rate=0.3)
    models.compile_layers(model, "aot_eager")
    inputs = tiny.inputs_of(model)
    first, again, other = (loss_and_gradients(model, inputs, seed) for seed in (1, 1, 2))
    assert equal(first, again)
    assert first[0] == again[0] != other[0]
    assert not equal(first, other)
    models.checkpoint_activations(model)
    checkpointed = loss_and_gradients(model, inputs, 1)
    assert checkpointed[0] == first[0]
    assert equal(checkpointed, first)
    assert_few_graphs(kind)


def test_drop_path_needs_no_graph_per_number_of_sequences(tmp_path):
    model = scratch(tmp_path, "vit", path=0.5)
    models.compile_layers(model, "aot_eager")
    inputs = tiny.inputs_of(model)
    found = []
    for count in (4, 2, 3, 5):
        batch = tiny.select(inputs, head_of("vit"), range(count))
        found.append([loss_and_gradients(model, batch, seed)[0] for seed in (1, 1, 2)])
    assert all(first == again for first, again, _ in found)
    assert any(first != other for first, _, other in found)
    assert_few_graphs("vit")  # of the first layer, which never drops


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_without_gradients_it_is_the_plain_model_to_the_bit(tmp_path, kind):
    plain, other = pair(tmp_path, kind)
    inputs = tiny.inputs_of(plain)
    assert list(other.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, expected = other.eval()(inputs), plain.eval()(inputs)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss_sum, expected.loss_sum)
    assert graphs() == 0


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_empty_batch_and_one_token_reach_every_parameter(tmp_path, kind):
    plain, other = pair(tmp_path, kind)
    inputs = tiny.inputs_of(plain)
    for chosen in ([], [1]):
        batch = tiny.select(inputs, head_of(kind), chosen)
        found = loss_and_gradients(other, batch)
        assert_same(found, loss_and_gradients(plain, batch))
        assert len(found[1]) == len(list(plain.parameters()))
    assert graphs() <= MAX_GRAPHS.get(kind, 2)


def test_a_copy_is_a_model_of_its_own(tmp_path):
    plain, other = pair(tmp_path, "bert")
    twin = copy.deepcopy(other)
    inputs = tiny.inputs_of(plain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(loss_and_gradients(twin, inputs), loss_and_gradients(plain, inputs))
    assert all(p.grad is None for p in other.parameters())
    layer = twin.backbone.layers[0]
    assert layer.forward.__self__ is layer
    assert layer.attention.forward.__self__ is layer.attention


def test_lora_and_layers_that_begin_to_be_trained_later(tmp_path):
    plain = scratch(tmp_path, "bert").double()
    models.add_lora(plain, 2, targets=["*.query", "*.up"])
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_b" in name:
                p.fill_(0.1)  # at zero A would have no gradient
    other = copy.deepcopy(plain)
    models.compile_layers(other, "aot_eager")
    inputs = tiny.inputs_of(plain)
    for trained in ("head.", "backbone.layers.1.", "backbone.layers.0."):
        for model in (plain, other):
            for name, p in model.named_parameters():
                p.requires_grad_(p.requires_grad or name.startswith(trained))
        models.drop_graphs()  # without it, torch 2.6 to 2.11 give layers.0 no gradient
        found = loss_and_gradients(other, inputs)
        assert any(name.startswith(trained) for name in found[1])
        assert_same(found, loss_and_gradients(plain, inputs))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_under_autocast_it_is_as_near_to_fp32_as_the_plain_model(tmp_path, kind):
    plain, other = (model.float() for model in pair(tmp_path, kind))
    inputs = tiny.inputs_of(plain)
    exact = loss_and_gradients(plain, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = loss_and_gradients(other, inputs), loss_and_gradients(plain, inputs)
    assert found[0] != exact[0]
    assert_same(found, expected, rel=0.02)
    assert_few_graphs(kind)


def test_the_order_of_compiling_and_checkpointing(tmp_path):
    model = scratch(tmp_path, "bert")
    models.checkpoint_activations(model)
    with pytest.raises(models.ModelError, match="before checkpoint_activations"):
        models.compile_layers(model, "aot_eager")


def test_a_machine_without_a_compiler_is_told_so(tmp_path, monkeypatch):
    model = scratch(tmp_path, "bert")
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(models.ModelError, match=r"needs a C\+\+ compiler.*install g\+\+.*train.compile = false"),
    ):
        models.compile_layers(model)
    assert "forward" not in vars(model.backbone.layers[0])
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(models.ModelError, match=r"needs triton.*train.compile = false"):
        compiled._check_compiler(torch.device("cuda"))


def inductor_is_the_plain_model(folder, device):
    plain = scratch(folder, "bert").to(device)
    other = copy.deepcopy(plain)
    models.compile_layers(other)
    inputs = tiny.inputs_of(plain)
    for chosen in BATCHES:
        batch = tiny.select(inputs, head_of("bert"), chosen).to(device)
        assert_same(loss_and_gradients(other, batch), loss_and_gradients(plain, batch), rel=1e-4)
    assert_few_graphs("bert")
    dropping = scratch(folder, "bert", rate=0.3).to(device)
    models.compile_layers(dropping)
    batch = inputs.to(device)
    first, again, other = (loss_and_gradients(dropping, batch, seed) for seed in (1, 1, 2))
    assert first[0] == again[0] != other[0]
    models.checkpoint_activations(dropping)
    # A GPU adds some gradients in any order.
    assert_same(loss_and_gradients(dropping, batch, 1), first, rel=1e-6 if device == "cpu" else 1e-4)


@pytest.mark.slow
def test_inductor_computes_the_plain_model(tmp_path):
    inductor_is_the_plain_model(tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inductor_computes_the_plain_model_on_a_gpu(tmp_path):
    inductor_is_the_plain_model(tmp_path, "cuda")
