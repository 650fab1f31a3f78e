"""Disentangled attention: its buckets, and its ways on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models as tiny
from support import zoo

import models
from models.ops import disentangled
from models.ops.disentangled import Distances, bucket_index
from models.ops.packing import Packing

CPU = torch.device("cpu")


@pytest.mark.parametrize(("buckets", "longest"), [(256, 512), (-1, 40), (32, 128), (7, 30), (2, 9)])
def test_buckets_are_those_of_transformers(buckets, longest):
    theirs = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    for length in (1, 3, 40, 700):
        texts = torch.zeros(1, length, 1)
        expected = theirs.build_relative_position(texts, texts, buckets, longest)[0]
        size = buckets if buckets > 0 else longest
        index, first, last = bucket_index(Distances(size, longest, buckets > 0), length, CPU)
        assert torch.equal(index + first, (expected + size).clamp(0, 2 * size - 1))
        assert (index.min(), index.max() + 1) == (0, last - first)


def test_buckets_of_prediction_serve_training_too():
    bucket_index.cache_clear()
    with torch.inference_mode():
        index, _, _ = bucket_index(Distances(4, 9, True), 5, CPU)
    assert not index.is_inference()


@pytest.mark.parametrize("kinds", [("c2p",), ("p2c",), ("c2p", "p2c")])
def test_attention_is_the_formula(kinds):
    torch.manual_seed(0)
    packing = Packing.from_lengths([3, 1, 4, 4, 2])
    distances = Distances(3, 9, False)
    q, k, v = torch.randn(3, 14, 2, 5, dtype=torch.float64)
    positions = dict(zip(("c2p", "p2c"), torch.randn(2, 6, 2, 5, dtype=torch.float64), strict=True))
    pk, pq = (positions[kind] if kind in kinds else None for kind in ("c2p", "p2c"))
    index, first, last = bucket_index(distances, 4, CPU)
    cut = [None if x is None else x[first:last] for x in (pk, pq)]
    found = disentangled.disentangled_attention(q, k, v, packing, *cut, index, 0.3, 0.0)
    start = 0
    for length in packing.lengths:
        for head in range(2):
            for i in range(length):
                scores = []
                for j in range(length):
                    bucket = min(max(i - j + 3, 0), 5)
                    score = q[start + i, head] @ k[start + j, head]
                    score += 0 if pk is None else q[start + i, head] @ pk[bucket, head]
                    scores.append(score + (0 if pq is None else k[start + j, head] @ pq[bucket, head]))
                expected = (torch.stack(scores) * 0.3).softmax(0) @ v[start : start + length, head]
                torch.testing.assert_close(found[start + i, 5 * head : 5 * head + 5], expected)
        start += length


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm"])
def test_padded_as_on_a_gpu_it_is_the_same(tmp_path, monkeypatch, head):
    model = tiny.scratch(tmp_path, "deberta-v2", head).double().train()
    inputs = tiny.inputs_of(model)
    found = []
    for by_runs in (True, False):
        monkeypatch.setattr(disentangled, "takes_runs", lambda query, packing, by_runs=by_runs: by_runs)
        model.zero_grad()
        loss = model(inputs).loss_sum
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
@pytest.mark.parametrize("by_runs", [True, False])
def test_autocast_computes_nearly_the_same(tmp_path, monkeypatch, dtype, tolerance, by_runs):
    monkeypatch.setattr(disentangled, "takes_runs", lambda query, packing: by_runs)
    tiny.config_folder(tmp_path, "deberta-v2", initializer_range=0.1, conv_kernel_size=3)
    model = models.from_pretrained(tmp_path, init="scratch", dropout=0.0).train()
    inputs = zoo.make_inputs("deberta-v2", None, model.backbone.config)
    expected = model.double()(inputs).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model.float()(inputs).logits
    out.square().sum().backward()
    assert (out - expected).abs().max() < tolerance * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_batch_without_sequences_reaches_every_parameter(tmp_path):
    tiny.config_folder(tmp_path, "deberta-v2", conv_kernel_size=3, share_att_key=False)
    head = "sequence-classification"
    model = models.from_pretrained(tmp_path, head=head, labels=["a", "b"], init="scratch").train()
    model(tiny.select(tiny.inputs_of(model), head, [])).loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []
