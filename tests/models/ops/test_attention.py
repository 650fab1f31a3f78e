"""Attention over packed sequences: each way of computing it is the formula, in value and in every gradient.

Those of a GPU are computed on a CPU, with the flash kernel replaced by its definition. Which of them a GPU gets is seen
on a simulated one (support/fake_gpu).
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import tiny_models as tiny
from support import zoo
from support.fake_gpu.rehearsal import missing_names
from torch import nn

import models
from models import beit
from models.lora import LoraLinear
from models.ops import attention, dropped_attention, joint_linear, linear_cross_entropy
from models.ops.attention import flash_attention, has_flash, packed_attention, pad_bias, padded_attention
from models.ops.packing import Packing
from models.ops.relative_bias import RelativeBias


def by_formula(query, key, value, packing, key_packing, causal, bias, scale):
    """One sequence after another, by the formula."""
    parts = []
    for q, k, v in zip(
        query.split(packing.lengths), *(x.split(key_packing.lengths) for x in (key, value)), strict=True
    ):
        scores = torch.einsum("lhk,shk->hls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias(len(q), len(k))
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
        parts.append(torch.einsum("hls,shk->lhk", scores.softmax(-1), v).flatten(1))
    return torch.cat(parts)


# Lengths of keys: the queries' own, those of another text, and those of texts of which few tokens are queries.
CROSS = {False: ([2, 5, 5, 1, 7], None), True: ([2, 5, 5, 1, 7], [3, 4, 4, 6, 1])}
CROSS |= {"first tokens": ([1] * 5, [2, 5, 5, 1, 7]), "some tokens": ([2, 0, 0, 1, 3], [2, 5, 5, 1, 7])}
CROSS |= {"of one length": ([2] * 4, [5] * 4)}
FORMS = [(False, False, None), (True, False, 0.3), *((False, cross, 1.0) for cross in CROSS)]  # causal, cross, scale


def assert_the_formula(attention, causal, cross, scale, biased):
    """In value and in every gradient."""
    torch.manual_seed(0)
    lengths, of_keys = CROSS[cross]
    packing = Packing.from_lengths(lengths)
    keys = Packing.from_lengths(of_keys) if of_keys else packing
    q = torch.randn(sum(lengths), 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(keys.lengths), 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = torch.randn(2, 7, 7, dtype=torch.float64, requires_grad=True)
    bias = (lambda length, source: table[:, :length, :source]) if biased else None
    wanted = (q, k, v, table) if biased else (q, k, v)
    found = attention(q, k, v, packing, keys, bias)
    expected = by_formula(q, k, v, packing, keys, causal, bias, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, wanted, g) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[dropped_attention.BLOCK, 60, 1], ids=["one block", "blocks", "a block a sequence"])
def blocks(request, monkeypatch):
    """Weights that are worked on together."""
    monkeypatch.setattr(dropped_attention, "BLOCK", request.param)
    for remembered in (dropped_attention._make_chunks, dropped_attention._make_blocks):
        remembered.cache_clear()
    yield
    for remembered in (dropped_attention._make_chunks, dropped_attention._make_blocks):
        remembered.cache_clear()


@pytest.mark.parametrize("dropout", [0.0, 1e-300])  # the second takes the path of dropout and drops no element
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("causal", "cross", "scale"), FORMS)
@pytest.mark.usefixtures("blocks")
def test_attention_with_dropout_and_without_is_the_formula(causal, cross, scale, biased, dropout):
    def attention(q, k, v, packing, keys, bias):
        options = {"causal": causal, "scale": scale, "dropout": dropout}
        return packed_attention(q, k, v, packing, key_packing=keys, bias=bias, **options)

    assert_the_formula(attention, causal, cross, scale, biased)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("causal", "cross"), [(False, False), (True, False), (False, True)])
@pytest.mark.usefixtures("blocks")
def test_gradcheck_of_attention_with_dropout(causal, cross, biased):
    packing = Packing.from_lengths([3, 3, 4])
    keys = Packing.from_lengths([2, 2, 5]) if cross else packing
    lengths = [10, sum(keys.lengths), sum(keys.lengths)]
    tensors = [torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in lengths]
    table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=biased)

    def seeded(q, k, v, table, dropout=0.4):
        bias = (lambda length, source: table[:, :length, :source]) if biased else None
        torch.manual_seed(0)
        return packed_attention(q, k, v, packing, key_packing=keys, causal=causal, bias=bias, dropout=dropout)

    assert not torch.allclose(seeded(*tensors, table), seeded(*tensors, table, dropout=0.0))
    assert torch.autograd.gradcheck(seeded, (*tensors, table))


def test_dropout_masks_do_not_depend_on_the_chunk_of_sequences(monkeypatch):
    packing, found = Packing.from_lengths([30, 30, 30, 41, 50, 50]), []
    tensors = [torch.randn(231, 2, 3, dtype=torch.float64) for _ in range(3)]
    for block in (2**20, 5_000, 1):
        monkeypatch.setattr(dropped_attention, "BLOCK", block)
        dropped_attention._make_chunks.cache_clear()
        dropped_attention._make_blocks.cache_clear()
        torch.manual_seed(0)
        found.append(packed_attention(*tensors, packing, dropout=0.4))
        blocks = dropped_attention._make_blocks(((3, 30, 30), (1, 41, 41), (2, 50, 50)), 2)
        assert len(blocks) == {2**20: 1, 5_000: 5, 1: 6}[block]
    dropped_attention._make_chunks.cache_clear()
    dropped_attention._make_blocks.cache_clear()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_dropped_attention_allows_two_backwards_of_one_graph():
    packing = Packing.from_lengths([3, 3, 4])
    q, k, v = (torch.randn(10, 2, 3, requires_grad=True) for _ in range(3))
    out = packed_attention(q, k, v, packing, dropout=0.4)
    first, second = (torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_mean_of_attention_with_dropout_is_that_without():
    torch.manual_seed(0)
    packing = Packing.from_lengths([40] * 2_000)
    q, k, v = (torch.randn(40, 1, 4).repeat(2_000, 1, 1) for _ in range(3))
    dropped = packed_attention(q, k, v, packing, dropout=0.2).unflatten(0, (2_000, 40))
    exact = packed_attention(q, k, v, packing).unflatten(0, (2_000, 40))[0]
    error = (dropped.mean(0) - exact) / (dropped.std(0) / math.sqrt(2_000))
    assert dropped.std(0).min() > 0
    assert error.square().mean() == pytest.approx(1, abs=0.5)


# The ways of a GPU


def flash_by_definition(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None):
    """The flash kernel for packed sequences: its arguments and its first result, one sequence after another."""
    assert (cu_q.dtype, cu_k.dtype, debug, dropout) == (torch.int32, torch.int32, False, 0.0)
    lengths, key_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths), max(key_lengths))
    outputs = []
    for parts in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True):
        q_, k_, v_ = (x.transpose(0, 1) for x in parts)
        outputs.append(F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, scale=scale).transpose(0, 1))
    return torch.cat(outputs), None, None, None, None


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_by_definition)


@pytest.mark.parametrize(("causal", "cross", "scale"), FORMS)
@pytest.mark.usefixtures("flash")
def test_flash_attention_is_the_formula(causal, cross, scale):
    def attention(q, k, v, packing, keys, bias):
        return flash_attention(q, k, v, packing, keys, causal, scale, 0.0)

    assert_the_formula(attention, causal, cross, scale, biased=False)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("causal", "cross", "scale"), FORMS)
def test_attention_padded_for_a_gpu_is_the_formula_too(causal, cross, scale, biased):
    def attention(q, k, v, packing, keys, bias):
        return padded_attention(q, k, v, packing, keys, causal, bias, scale, 0.0)

    assert_the_formula(attention, causal, cross, scale, biased)


@pytest.mark.parametrize("columns", [7, 16])
@pytest.mark.parametrize("cross", [False, True, "some tokens"])
def test_bias_that_is_padded_once_is_the_formula_too(cross, columns):
    def attention(q, k, v, packing, keys, bias):
        table = F.pad(bias(packing.max_length, keys.max_length), (0, columns - keys.max_length))
        padded = pad_bias(table, keys.max_length, keys, torch.float64)
        assert padded.shape == (5, 2, packing.max_length, keys.max_length)
        assert all(stride % 8 == 0 for stride in padded.stride()[:-1])  # or the kernel would copy it in each layer
        return packed_attention(q, k, v, packing, key_packing=keys, bias=padded, scale=1.0)

    assert_the_formula(attention, False, cross, 1.0, biased=True)


def test_padding_is_no_copy_where_lengths_are_equal():
    packing, x = Packing.from_lengths([3, 3]), torch.randn(6, 2, 4)
    assert attention.to_padded(x, packing).data_ptr() == x.data_ptr()
    assert attention.to_packed(x, packing) is x


@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("bias", [None, lambda length, keys: torch.ones(2, 1, 1, requires_grad=True)])
def test_no_query_still_has_gradients(lengths, bias):
    packing, keys = Packing.from_lengths(lengths), Packing.from_lengths([2] * len(lengths))
    q, k, v = (torch.randn(n, 2, 4, requires_grad=True) for n in (0, sum(keys.lengths), sum(keys.lengths)))
    out = packed_attention(q, k, v, packing, key_packing=keys, bias=bias, dropout=0.5)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


def test_causal_attention_to_other_tokens_is_refused():
    packing, keys = Packing.from_lengths([2]), Packing.from_lengths([3])
    with pytest.raises(ValueError, match="same tokens"):
        packed_attention(torch.ones(2, 1, 8), *torch.ones(2, 3, 1, 8), packing, key_packing=keys, causal=True)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("way", ["flash", "padded"])
@pytest.mark.parametrize("kind", [kind for kind in zoo.KINDS if kind != "deberta-v2"])  # see test_disentangled.py
@pytest.mark.usefixtures("flash")
def test_whole_models_as_on_a_gpu(tmp_path, monkeypatch, kind, way, ragged):
    """Losses and gradients in fp64: attention, T5's bias and the projections as on a GPU, and as on a CPU."""
    head = "seq2seq-lm" if kind in ("t5", "mt5") else next(filter(None, models.ARCHITECTURES[kind].heads))
    model = tiny.scratch(tmp_path, kind, head).double().train()
    inputs = tiny.select(tiny.inputs_of(model), head, range(5) if ragged else [2, 3])
    if inputs.pixel_values is not None:
        inputs = models.pack_images(inputs.pixel_values.double(), labels=inputs.labels)
    calls = Counter()

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    def by_flash(q, k, v, packing, keys, causal, bias, scale, dropout):
        if bias is not None:
            return padded_attention(q, k, v, packing, keys, causal, bias, scale, dropout)
        return flash_attention(q, k, v, packing, keys, causal, scale, dropout)

    found = []
    for on_gpu in (False, True):
        if on_gpu:
            ways = {"flash": by_flash, "padded": padded_attention}
            monkeypatch.setattr(attention, "attention_by_runs", counted("attention", ways[way]))
            monkeypatch.setattr(RelativeBias, "for_packing", RelativeBias.padded)
            monkeypatch.setattr(beit, "_on_device", lambda x, packing: pad_bias(x, x.shape[-1], None, x.dtype))
            monkeypatch.setattr(joint_linear, "_can_join", counted("joint", lambda x, layers: len(layers) > 1))
        model.zero_grad()
        loss = model(inputs).loss_sum
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert calls["joint"] or kind in ("gpt2", "modernbert")
    assert bool(calls["attention"]) == (ragged and zoo.ZOO[kind].modality != "image")
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


# Which way a GPU takes


MISSING = missing_names()
needs_fake_gpu = pytest.mark.skipif(bool(MISSING), reason=f"torch {torch.__version__} has no {', '.join(MISSING)}")
ROOT = Path(models.__file__).parent.parent
FLASH, DENSE = "_flash_attention_forward", "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
RAGGED = [5, 3, 3]


@pytest.fixture
def fake_gpu():
    from support.fake_gpu.device import FakeGpu

    has_flash.cache_clear()
    gpu = FakeGpu(ROOT)
    with gpu, gpu.during("forward"):
        yield gpu
    has_flash.cache_clear()


@needs_fake_gpu
@pytest.mark.parametrize(
    ("lengths", "dtype", "width", "changes", "expected"),
    [
        (RAGGED, torch.bfloat16, 64, {}, FLASH),
        (RAGGED, torch.float16, 80, {"causal": True, "dropout": 0.1}, FLASH),
        (RAGGED, torch.bfloat16, 64, {"key_lengths": [7, 7, 7]}, FLASH),
        ([1, 1, 1], torch.bfloat16, 64, {"key_lengths": RAGGED}, FLASH),
        ([4, 4, 4], torch.bfloat16, 64, {}, DENSE),
        ([1, 1, 1], torch.bfloat16, 64, {"key_lengths": [4, 4, 4]}, DENSE),
        (RAGGED, torch.float32, 64, {}, EFFICIENT),
        (RAGGED, torch.bfloat16, 12, {}, EFFICIENT),
        (RAGGED, torch.bfloat16, 256, {}, EFFICIENT),
        (RAGGED, torch.bfloat16, 64, {"bias": lambda n, s: torch.zeros(2, n, s, device="cuda")}, EFFICIENT),
        (RAGGED, torch.bfloat16, 64, {"capability": (7, 5)}, EFFICIENT),
        (RAGGED, torch.bfloat16, 64, {"first_argument": "q"}, EFFICIENT),
        (RAGGED, torch.bfloat16, 64, {"borders": torch.int64}, EFFICIENT),
        (RAGGED, torch.bfloat16, 64, {"strided": True}, EFFICIENT),
    ],
)
def test_kernel_that_a_gpu_gets(fake_gpu, monkeypatch, lengths, dtype, width, changes, expected):
    options = dict(changes)
    capability = options.pop("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if "first_argument" in options:
        arguments = (options.pop("first_argument"), *attention.FLASH_ARGUMENTS[1:])
        monkeypatch.setattr(attention, "FLASH_ARGUMENTS", arguments)
    key_lengths, borders = options.pop("key_lengths", lengths), options.pop("borders", torch.int32)

    def packed(lengths):
        return Packing(tuple(lengths), Packing.from_lengths(lengths).cu_seqlens.to("cuda", borders))

    fake_gpu.is_loading = True  # of numbers that the host does not know
    q, k, v = (torch.empty(sum(n), 2, width, dtype=dtype).to("cuda") for n in (lengths, key_lengths, key_lengths))
    fake_gpu.is_loading = False
    q = q.transpose(1, 2).contiguous().transpose(1, 2) if options.pop("strided", False) else q
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        packed_attention(q, k, v, packed(lengths), key_packing=packed(key_lengths), **options)
    kernels = {name for name in fake_gpu.report.ops["forward"] if "attention" in name}
    assert kernels == {expected}
    copies = {"cat", "split", "split_with_sizes", "index_put", "index_put_", "index"}
    assert not copies & fake_gpu.report.ops["forward"].keys()


@needs_fake_gpu
@pytest.mark.parametrize(
    ("change", "products"),
    [("", 1), ("no bias", 1), ("lora", 3), ("hook", 3), ("forward", 3), ("one bias missing", 1), ("no grad", 3)],
)
def test_projections_that_are_joined(fake_gpu, change, products):
    layers = nn.ModuleList(nn.Linear(8, 4 * n, bias=change != "no bias") for n in (1, 2, 2))
    if change == "lora":
        layers[0] = LoraLinear(layers[0], 2, 4.0, 0.0, torch.Generator())
    if change == "hook":
        layers[1].register_forward_hook(lambda *args: None)
    if change == "forward":
        layers[1].forward = lambda x: x
    if change == "one bias missing":
        layers[1].bias = None
    with torch.set_grad_enabled(change != "no grad"):
        layers.to("cuda")
        outputs = joint_linear.joint_linear(torch.empty(5, 8).to("cuda"), layers)
    assert [x.shape[1] for x in outputs] == [4, 8, 8]
    found = sum(fake_gpu.report.ops["forward"][name] for name in ("addmm", "mm"))
    assert found == products + 2 * (change == "lora") - (change == "forward")


@needs_fake_gpu
@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 128), (torch.float32, 100)])
def test_vocabulary_is_padded_where_it_is_copied_anyway(fake_gpu, dtype, rows):
    weight = torch.empty(100, 8).to("cuda")
    assert linear_cross_entropy._padded_vocabulary(weight, dtype) == rows
    assert linear_cross_entropy._padded_vocabulary(torch.empty(100, 8), dtype) == 100
