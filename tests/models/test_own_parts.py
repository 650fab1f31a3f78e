"""Heads and architectures of a researcher's own: they train, are saved under their own names, and are loaded again."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import PER_TOKEN, config_folder, count_examples, inputs_of, scratch, select
from support.zoo import ZOO, reads_pooled
from torch import Tensor, nn

import models
from models import ModelInputs
from models.architecture import Architecture, read_fields
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.heads import CausalLM, Head, HeadShape, classification_loss, find_supervised_positions
from models.ops.layers import NO_DROPOUT, DropoutRates, first_pool, init_normal
from models.ops.packing import Packing


class TwoLayers(Head):
    """First token -> a hidden layer -> classes."""

    has_labels = True
    supports_distillation = True

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.hidden = nn.Linear(shape.hidden_size, 7)
        self.output = nn.Linear(7, shape.num_labels)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        logits = self.output(self.hidden(first_pool(hidden, packing)).relu())
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


class OtherHead(TwoLayers):
    """Tensors of the same names and shapes, for another task."""


class OneNumber(Head):
    """A regression without names of classes and without parameters: the mean of the first token's vector."""

    problems = ("regression",)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        logits = first_pool(hidden, packing).mean(1, keepdim=True)
        return logits, classification_loss(logits, inputs.labels, self.shape, self.training)


class OwnStart(TwoLayers):
    """A head that decides how it starts: partly in __init__, partly in init_weights."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.scale = nn.Parameter(nn.init.normal_(torch.empty(shape.num_labels)))

    def init_weights(self, std: float, generator: torch.Generator, skip: Collection[Tensor] = ()) -> None:
        nn.init.eye_(self.output.weight)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        logits, _ = super().forward(hidden, packing, inputs)
        return logits * self.scale, classification_loss(logits * self.scale, inputs.labels, self.shape, self.training)


class ScaledLM(CausalLM):
    """A language model with a trained temperature."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        return super().forward(hidden * self.temperature, packing, inputs)


@pytest.fixture(autouse=True)
def own_heads(monkeypatch):
    for name, cls in {
        "two-layers": TwoLayers,
        "other": OtherHead,
        "one-number": OneNumber,
        "scaled-lm": ScaledLM,
        "own-start": OwnStart,
    }.items():
        monkeypatch.setitem(models.HEADS, name, cls)


def labelled(model: models.TaskModel) -> models.Inputs:
    inputs = inputs_of(model)
    return replace(inputs, labels=torch.arange(count_examples(inputs)) % 3)


def train_a_step(model: models.TaskModel, inputs: models.Inputs) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(inputs).loss_sum.backward()
    assert all(p.grad is not None for p in model.head.parameters())
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", ZOO)
def test_own_head_trains_and_is_loaded_again(tmp_path, kind):
    model = scratch(tmp_path / "start", kind, "two-layers")
    inputs = labelled(model)
    train_a_step(model, inputs)
    models.save_pretrained(model, tmp_path / "saved")
    again = models.from_pretrained(tmp_path / "saved", head="two-layers").eval()
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert again.labels == model.labels
    assert again.head_name == "two-layers"
    assert not again.report.initialised


class Centred(TwoLayers):
    """A head with buffers: a running mean, a count, and one that is computed anew."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.register_buffer("mean", torch.randn(shape.hidden_size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, hidden: Tensor, packing: Packing, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        if self.training:
            self.mean += 1.0
            self.count += 1
        return super().forward(hidden - self.mean, packing, inputs)


@pytest.mark.parametrize("lora", [False, True])
def test_buffers_of_an_own_head_are_saved(tmp_path, monkeypatch, lora):
    monkeypatch.setitem(models.HEADS, "centred", Centred)
    model = scratch(tmp_path / "start", "bert", "centred", seed=3)
    inputs = labelled(model)
    models.save_pretrained(model, tmp_path / "base")
    if lora:
        models.add_lora(model, 2)
    train_a_step(model, inputs)
    models.save_pretrained(model, tmp_path / "saved")
    again = models.from_pretrained(tmp_path / "saved", head="centred").eval()
    assert again.head.count == 1
    torch.testing.assert_close(again(inputs).logits, model(inputs).logits)
    assert again.report.parameters == sum(p.numel() for p in again.parameters())
    if lora:
        models.save_adapter(model, tmp_path / "adapter")
        adapted = models.from_pretrained(tmp_path / "base", head="centred", seed=9).eval()
        models.add_lora(adapted, 2)
        models.load_adapter(adapted, tmp_path / "adapter")
        assert torch.equal(adapted(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("kind", ZOO)
def test_own_head_is_saved_under_its_own_names(tmp_path, kind):
    model = scratch(tmp_path / "start", kind, "two-layers")
    models.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head"] == "two-layers"
    assert config["architectures"] == [models.ARCHITECTURES[kind].heads[None]]
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("head.")}
    assert names == {f"head.{name}" for name, _ in model.head.named_parameters()}


def test_own_head_can_be_read_by_transformers_as_the_backbone(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = scratch(tmp_path / "start", "bert", "two-layers").eval()
    models.save_pretrained(model, tmp_path)
    theirs = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    ids = torch.tensor([[3, 4, 5]])
    ours = models.from_pretrained(tmp_path).eval()(models.pack(ids.tolist())).logits
    torch.testing.assert_close(theirs(ids).last_hidden_state[0], ours)


def test_own_head_without_parameters_or_names(tmp_path):
    model = scratch(tmp_path / "start", "bert", "one-number").eval()
    inputs = inputs_of(model)
    inputs = replace(inputs, labels=torch.rand(count_examples(inputs), 1))
    assert model.head.shape.problem == "regression"
    models.save_pretrained(model, tmp_path)
    again = models.from_pretrained(tmp_path, head="one-number").eval()
    assert again(inputs).loss_sum == model(inputs).loss_sum > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_own_language_model(tmp_path, kind, tied):
    config_folder(tmp_path / "start", kind, tie_word_embeddings=tied)
    model = models.from_pretrained(tmp_path / "start", head="scaled-lm", init="scratch", seed=1)
    assert (model.head.decoder.weight is model.embedding.weight) == tied
    ids = [[3, 4, 5], [6, 7]]
    inputs = models.pack(ids, labels=torch.tensor([4, 5, -100, 7, -100]))
    train_a_step(model, inputs)
    models.save_pretrained(model, tmp_path / "saved")
    again = models.from_pretrained(tmp_path / "saved", head="scaled-lm").eval()
    assert (again.head.decoder.weight is again.embedding.weight) == tied
    assert torch.equal(again(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("init", ["pretrained", "scratch"])
def test_own_head_starts_as_it_says_and_from_the_seed(tmp_path, init):
    models.save_pretrained(scratch(tmp_path, "bert", None), tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (
        models.from_pretrained(tmp_path, head="own-start", labels=["a", "b"], init=init, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.output.weight, torch.eye(2, 7))
    assert torch.equal(one.head.scale, same.head.scale)
    assert not torch.equal(one.head.scale, other.head.scale)
    two_layers = models.from_pretrained(tmp_path, head="two-layers", labels=["a", "b"], init=init)
    assert not two_layers.head.output.bias.any()  # Normal(0, initializer_range) and 0, like every new head
    assert two_layers.head.output.weight.std() < 0.7


def test_readme_example_trains_on_a_batch_and_on_an_empty_one(tmp_path, monkeypatch):
    readme = (Path(models.__file__).parent / "README.md").read_text(encoding="utf-8")
    scope = dict(globals())
    exec(readme[readme.index("class TwoLayers") : readme.index("\n\nHEADS =")], scope)
    monkeypatch.setitem(models.HEADS, "of-readme", scope["TwoLayers"])
    model = scratch(tmp_path, "bert", "of-readme")
    inputs = labelled(model)
    train_a_step(model, inputs)
    empty = select(inputs, "of-readme", [])
    model.zero_grad()
    loss = model.train()(empty).loss_sum
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.head.parameters())


def test_another_own_head_is_refused(tmp_path):
    models.save_pretrained(scratch(tmp_path / "start", "bert", "two-layers"), tmp_path)
    with pytest.raises(models.ModelError, match=r"'two-layers', no other head; --model.head_init reset"):
        models.from_pretrained(tmp_path, head="other")
    new = models.from_pretrained(tmp_path, head="other", head_init="reset")
    assert {name for name in new.report.initialised if name.startswith("head.")} == set(new.report.initialised)
    assert new.report.initialised


def test_built_in_head_on_the_file_of_an_own_one_starts_anew(tmp_path):
    models.save_pretrained(scratch(tmp_path / "start", "bert", "two-layers"), tmp_path)
    model = models.from_pretrained(tmp_path, head="sequence-classification", labels=["a", "b"])
    assert "head.classifier.weight" in model.report.initialised
    assert sorted(model.report.ignored) == [
        "head.hidden.bias",
        "head.hidden.weight",
        "head.output.bias",
        "head.output.weight",
    ]
    models.save_pretrained(model, tmp_path / "again")
    assert "head" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_own_head_on_the_file_of_a_built_in_one_starts_anew(tmp_path):
    models.save_pretrained(scratch(tmp_path / "start", "bert", "sequence-classification"), tmp_path)
    model = models.from_pretrained(tmp_path, head="two-layers", labels=["a", "b"])
    assert {name for name, _ in model.named_parameters() if name.startswith("head.")} == set(model.report.initialised)


@pytest.mark.parametrize("change", ["missing", "additional", "all missing"])
def test_own_head_half_in_the_file_is_refused(tmp_path, change):
    model = scratch(tmp_path / "start", "bert", "two-layers")
    if change == "additional":
        model.head.third = nn.Linear(2, 2)
    models.save_pretrained(model, tmp_path)
    if change != "additional":
        lost = "head.output.bias" if change == "missing" else "head."
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
        models.pretrained.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(models.ModelError, match="head is missing" if change != "additional" else "head.third"):
        models.from_pretrained(tmp_path, head="two-layers")


def test_tensors_named_head_are_unknown_without_an_own_head(tmp_path):
    models.save_pretrained(scratch(tmp_path / "start", "bert", "two-layers"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(models.ModelError, match=r"unknown to bert: head\."):
        models.from_pretrained(tmp_path)


def test_built_in_head_of_another_architecture_is_refused(tmp_path):
    config_folder(tmp_path, "gpt2")
    with pytest.raises(models.ModelError, match=r"takes no head 'masked-lm'; choose from .*causal-lm.*two-layers"):
        models.from_pretrained(tmp_path, head="masked-lm", init="scratch")
    with pytest.raises(models.ModelError, match=r"head 'mine'; .* is added first: models.HEADS\['mine'\] = its class"):
        models.from_pretrained(tmp_path, head="mine", init="scratch")


def test_own_head_with_lora_adapter(tmp_path):
    model = scratch(tmp_path / "start", "bert", "two-layers")
    inputs = labelled(model)
    models.save_pretrained(model, tmp_path / "base")
    models.add_lora(model, 2)
    train_a_step(model, inputs)
    models.save_adapter(model, tmp_path / "adapter")
    again = models.from_pretrained(tmp_path / "base", head="two-layers")
    models.add_lora(again, 2)
    models.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(inputs).logits, model(inputs).logits)


@dataclass(frozen=True)
class BagConfig:
    vocab_size: int = 31
    hidden_size: int = 6
    num_hidden_layers: int = 3
    initializer_range: float = 0.5
    rates: DropoutRates = NO_DROPOUT


class BagModel(nn.Module):
    """Word vectors and some layers that mix nothing between tokens."""

    max_length = 50

    def __init__(self, config: BagConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        size = config.hidden_size
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(config.num_hidden_layers))

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Packing]:
        x = self.embedding(inputs.input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x, Packing(inputs.lengths, inputs.cu_seqlens)

    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        for module in modules or [self]:
            init_normal(module, self.config.initializer_range, generator)


BAG = Architecture(
    read_config=lambda raw: read_fields(BagConfig, raw),
    build=lambda config, head: BagModel(config),
    head_shape=lambda config, name, head, pooling: HeadShape(config.hidden_size),
    weights=WeightTable("bag"),
    heads={None: "BagModel", "sequence-classification": "BagForSequenceClassification"},
    depth=("num_hidden_layers",),
    pooling="mean",
)


@pytest.fixture
def bag(tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "bag", BAG)
    folder = tmp_path / "bag"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bag", "num_hidden_layers": 3}')
    return folder


BAG_INPUTS = models.pack([[3, 4, 5], [6, 7]], labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("head", ["sequence-classification", "two-layers"])
def test_own_architecture_trains_and_is_loaded_again(bag, tmp_path, head):
    model = models.from_pretrained(bag, head=head, labels=["a", "b"], init="scratch")
    train_a_step(model, BAG_INPUTS)
    models.save_pretrained(model, tmp_path / "saved")
    again = models.from_pretrained(tmp_path / "saved", head=head, labels=["b", "a"]).eval()
    assert again.labels == ("a", "b")
    assert torch.equal(again(BAG_INPUTS).logits, model(BAG_INPUTS).logits)
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert names == {name for name, _ in model.named_parameters()}


def test_own_architecture_without_a_head_and_shallower(bag, tmp_path):
    model = models.from_pretrained(bag, init="scratch").eval()
    models.save_pretrained(model, tmp_path / "saved")
    one = models.from_pretrained(tmp_path / "saved", keep_layers=1).eval()
    assert len(one.backbone.layers) == 1
    assert len(one.report.ignored) == 4
    x = model.embedding(BAG_INPUTS.input_ids)
    torch.testing.assert_close(one(BAG_INPUTS).logits, x + model.backbone.layers[0](x).tanh())
    again = models.from_pretrained(tmp_path / "saved", reinit_layers=1)
    assert again.report.initialised == ["backbone.layers.2.weight", "backbone.layers.2.bias"]


def test_backbone_that_initialises_only_a_part_is_refused(bag, monkeypatch):
    monkeypatch.setattr(BagModel, "init_weights", lambda self, generator, modules=(): None)
    with pytest.raises(models.ModelError, match=r"init_weights leaves 7 parameters .*backbone.embedding.weight"):
        models.from_pretrained(bag, init="scratch")


def test_own_architecture_takes_no_unlisted_built_in_head(bag):
    with pytest.raises(models.ModelError, match="takes no head 'causal-lm'"):
        models.from_pretrained(bag, head="causal-lm", init="scratch")


def test_weight_table_without_a_tensor_is_an_error_at_once(bag, monkeypatch):
    """Not at the first save, after hours of training."""
    rows = (
        WeightRow("backbone.embedding.weight", "embedding.weight"),
        *linear_rows("backbone.layers.{i}", "layers.{i}"),
    )
    table = replace(BAG, weights=WeightTable("bag", rows=rows))
    monkeypatch.setitem(models.ARCHITECTURES, "bag", table)
    models.from_pretrained(bag, init="scratch")
    monkeypatch.setitem(models.ARCHITECTURES, "bag", replace(table, weights=WeightTable("bag", rows=rows[:2])))
    with pytest.raises(models.ModelError, match=r"backbone\.layers\.0\.bias has no row in the WeightTable of bag"):
        models.from_pretrained(bag, init="scratch")


@pytest.mark.parametrize("head", models.HEADS)
def test_what_heads_say_of_themselves_agrees(head):
    cls = models.HEADS[head]
    assert not (cls.generates_text and not cls.is_language_model)
    assert not (cls.needs_decoder and not cls.is_language_model)
    assert not (reads_pooled(head) and not cls.has_labels) or head == "sentence-embedding"  # a vector, no classes
    assert not (cls.supports_distillation and head in PER_TOKEN)
    assert "single-label" in cls.problems
    assert find_supervised_positions(torch.tensor([1, -100]), None).tolist() == [0]
