"""Graphs with the padded interface: the logits of every architecture and head are those of the packed model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import tiny_models as tiny
from support import zoo

import models
from models.heads import Head, MultipleChoice, classification_loss
from models.ops.layers import mean_pool
from models.padded import GraphModel, check_graph, graphs_of, pad_batch

PAIRS = [(kind, head) for kind in zoo.CODES for head in models.ARCHITECTURES[kind].heads if head]
CASES = [
    (kind, head, pooling)
    for kind, head in PAIRS
    for pooling in (zoo.poolings(kind) if zoo.reads_pooled(head) else (None,))
]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def model_of(folder, kind, head, pooling):
    options = {"pooling": pooling} if pooling else {}
    return tiny.scratch(folder, kind, head, **options).double().eval()


def run_eagerly(graph):
    """The runner of a graph that was not exported: its module itself."""

    def run(inputs):
        outputs = graph.module(*(inputs[name] for name in graph.inputs))
        return [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]

    return run


@pytest.mark.parametrize(("kind", "head", "pooling"), CASES)
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_packed_model(tmp_path, kind, head, pooling):
    model = model_of(tmp_path, kind, head, pooling)
    inputs = tiny.inputs_of(model)
    graphs = graphs_of(model, (8, 8))
    exported = GraphModel(model, graphs, [run_eagerly(graph) for graph in graphs])
    unlabelled = replace(inputs, labels=None)
    torch.testing.assert_close(exported(unlabelled).logits, model(unlabelled).logits.double(), **TOLERANCE)
    expected, found = model(inputs), exported(inputs)
    if not found.loss_sum.isnan():  # of a head whose loss is no cross entropy of classes or tokens
        torch.testing.assert_close(found, expected, **TOLERANCE)


class MeanOfTokens(Head):
    """A user's own head of a text, which does not state what it reads."""

    has_labels = True

    def __init__(self, shape):
        super().__init__(shape)
        self.classifier = torch.nn.Linear(shape.hidden_size, shape.num_labels)

    def forward(self, hidden, packing, inputs):
        logits = self.classifier(mean_pool(hidden, packing))
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


@torch.no_grad()
def test_a_head_of_ones_own_is_exported_by_text_or_by_token(tmp_path, monkeypatch):
    class EachToken(MeanOfTokens):
        def forward(self, hidden, packing, inputs):
            return self.classifier(hidden), hidden.new_zeros(())

    for head in (MeanOfTokens, EachToken):
        monkeypatch.setitem(models.HEADS, head.__name__, head)
        model = tiny.scratch(tmp_path / head.__name__, "bert", head.__name__).double().eval()
        inputs = replace(tiny.inputs_of(model), labels=None)
        (graph,) = graphs_of(model)
        check_graph(graph)
        found = GraphModel(model, [graph], [run_eagerly(graph)])(inputs).logits
        torch.testing.assert_close(found, model(inputs).logits, **TOLERANCE)


LEFT = [(kind, head, pooling) for kind, head, pooling in CASES if zoo.ZOO[kind].modality == "text"]


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _, _ in LEFT))
@torch.no_grad()
def test_padding_on_the_left_and_its_ids_change_nothing(tmp_path, kind):
    heads = ["causal-lm"] if kind == "gpt2" else ["sequence-classification", "token-classification"]
    for head in heads:
        model = model_of(tmp_path / head, kind, head, None)
        (graph,) = graphs_of(model)
        inputs = replace(tiny.inputs_of(model), labels=None)
        right = pad_batch(inputs, tuple(graph.inputs), isinstance(model.head, MultipleChoice))
        longest = max(inputs.lengths)
        shifts = [longest - n for n in inputs.lengths]
        left = {
            name: torch.stack([x.roll(s) for x, s in zip(rows, shifts, strict=True)]) for name, rows in right.items()
        }
        left["input_ids"] = left["input_ids"].where(left["attention_mask"].bool(), 3)
        expected, found = graph.module(*right.values()), graph.module(*left.values())
        if head != "sequence-classification":
            rows = zip(expected, found, shifts, strict=True)
            pairs = [(a[: longest - s], b[s:]) for a, b, s in rows]
            expected, found = (torch.cat(list(part)) for part in zip(*pairs, strict=True))
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_text_without_tokens_gives_no_nan(tmp_path):
    (graph,) = graphs_of(tiny.scratch(tmp_path, "bert", "token-classification").eval())
    inputs = {name: x.clone() for name, x in graph.inputs.items()}
    inputs["attention_mask"][0] = 0
    assert graph.module(*inputs.values()).isfinite().all()


class NoPacking(torch.nn.Module):
    """A backbone that is not made for graphs."""

    def forward(self, inputs):
        return inputs.input_ids.split(list(inputs.lengths))[0], None


def test_a_head_that_reads_lengths_is_told_what_a_graph_has(tmp_path, monkeypatch):
    class ReadsRows(MeanOfTokens):
        def forward(self, hidden, packing, inputs):
            sums = hidden.new_zeros(len(packing.lengths), hidden.shape[1]).index_add(0, packing.rows, hidden)
            return self.classifier(sums), hidden.new_zeros(())

    monkeypatch.setitem(models.HEADS, "own", ReadsRows)
    (graph,) = graphs_of(tiny.scratch(tmp_path, "bert", "own"))
    with pytest.raises(models.ModelError, match=r"a head asks its packing .* reads no lengths and rows"):
        check_graph(graph)


def test_a_backbone_that_takes_no_padded_inputs_is_refused(tmp_path):
    model = tiny.scratch(tmp_path, "bert", "token-classification")
    (graph,) = graphs_of(model)
    model.backbone = NoPacking()
    with pytest.raises(models.ModelError, match=r"takes no padded inputs .*packing_of"):
        check_graph(graph)
