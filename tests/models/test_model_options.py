"""What a fine-tuning run may change about a checkpoint: dropout by site, depth, fresh layers, frozen parameters."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny_models as tiny
from support import zoo
from support.zoo import has_labels
from torch import nn

import models
from models import ModelError
from models.ops.layers import drop_path
from models.ops.packing import Packing

HEADS = {"text": "token-classification", "image": "image-classification", "seq2seq": "seq2seq-lm"}
KINDS = [(kind, HEADS[spec.modality]) for kind, spec in zoo.ZOO.items()]
UNSHARED = [(kind, head) for kind, head in KINDS if kind != "albert"]  # each layer has weights of its own
each_kind = pytest.mark.parametrize(("kind", "head"), KINDS)
SITES = {"embedding": 0.11, "attention": 0.22, "hidden": 0.33, "head": 0.44}


def sites_of(head):
    """SITES without those that a language model does not have."""
    return {site: rate for site, rate in SITES.items() if site != "head" or not head.endswith("-lm")}


def saved(folder, kind, head):
    """(model, its files)"""
    model = tiny.scratch(folder / "config", kind, head)
    models.save_pretrained(model, folder / "saved")
    return model, folder / "saved"


def stacks(model):
    """The lists of layers of a backbone, from the input to the output."""
    found = [module for module in model.backbone.modules() if isinstance(module, nn.ModuleList)]
    assert found
    return found


def rates(model):
    """{name: rate} of everything in a model that drops."""
    modules = dict(model.named_modules())
    found = {name: module.p for name, module in modules.items() if isinstance(module, nn.Dropout)}
    return found | {name: m.dropout for name, m in modules.items() if isinstance(getattr(m, "dropout", None), float)}


def site_of(name):
    if name.startswith("head."):
        return "head"
    if "attention" in name and "position" not in name:
        return "attention"
    # Not in a layer: BERT's own, and T5's after a stack.
    return "embedding" if "embedding" in name or name == "backbone.dropout" else "hidden"


# dropout


@each_kind
def test_each_site_gets_its_own_rate(tmp_path, kind, head):
    model = tiny.scratch(tmp_path, kind, head, dropout=sites_of(head))
    found = rates(model)
    assert {site_of(name) for name in found} == set(sites_of(head))
    assert {name: rate for name, rate in found.items() if rate != SITES[site_of(name)]} == {}


@each_kind
def test_one_rate_is_for_every_site_but_drop_path(tmp_path, kind, head):
    model = tiny.scratch(tmp_path, kind, head, dropout=0.25)
    assert set(rates(model).values()) == {0.25}
    assert model.backbone.config.rates.drop_path == 0


@each_kind
def test_a_site_that_is_not_named_keeps_the_checkpoints_rate(tmp_path, kind, head):
    before = rates(tiny.scratch(tmp_path, kind, head, dropout=None))
    after = rates(tiny.scratch(tmp_path, kind, head, dropout={"hidden": 0.6}))
    assert {name: rate for name, rate in after.items() if site_of(name) != "hidden"} == {
        name: rate for name, rate in before.items() if site_of(name) != "hidden"
    }


@each_kind
@pytest.mark.parametrize("site", [*SITES, "drop_path"])
def test_each_site_drops_in_training_and_never_in_evaluation(tmp_path, kind, head, site):
    if site not in (*sites_of(head), "drop_path"):
        pytest.skip("a language model has no dropout before its output")
    model = tiny.scratch(tmp_path, kind, head, dropout=dict.fromkeys(sites_of(head), 0.0) | {site: 0.5})
    inputs = tiny.inputs_of(model)
    plain = tiny.scratch(tmp_path, kind, head)
    expected = plain.eval()(inputs).logits

    def logits(seed):
        torch.manual_seed(seed)
        return model(inputs).logits

    assert torch.equal(model.eval()(inputs).logits, expected)
    model.train()
    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    assert not torch.equal(logits(0), expected)


@pytest.mark.parametrize(("kind", "head"), UNSHARED)
def test_drop_path_rises_linearly_to_its_rate(tmp_path, kind, head):
    """In DINOv2 it is one rate, as published."""
    model = tiny.scratch(tmp_path, kind, head, dropout={"drop_path": 0.4})
    for layers in stacks(model):
        count = len(layers)
        shares = [1.0 if kind.startswith("dinov2") else i / max(1, count - 1) for i in range(count)]
        assert [layer.drop_path_rate for layer in layers] == pytest.approx([0.4 * share for share in shares])


def test_drop_path_takes_whole_texts_and_keeps_the_mean():
    packing = Packing.from_lengths([3, 1, 2] * 4000)
    torch.manual_seed(0)
    out = drop_path(torch.ones(sum(packing.lengths), 5), packing, 0.3)
    texts = [text.unique().tolist() for text in out.split(packing.lengths)]
    assert all(len(values) == 1 for values in texts)  # a text is dropped as a whole or not at all
    kept = torch.tensor([values[0] for values in texts])
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("dropout", [1.0, -0.1, {"hidden": 1}, {"heads": 0.1}, {"drop_path": -1}])
def test_a_rate_or_site_that_cannot_be_is_refused(tmp_path, dropout):
    with pytest.raises(ModelError, match="rates from 0 to below 1"):
        tiny.scratch(tmp_path, "bert", "token-classification", dropout=dropout)


# depth


def truncated(model, keep):
    """{name: tensor} of the layers before `keep`, and of all that is in no layer."""

    def kept(name):
        parts = name.split(".layers.")
        return len(parts) == 1 or int(parts[1].split(".")[0]) < keep

    return {name: p for name, p in model.named_parameters() if kept(name)}


@each_kind
@pytest.mark.parametrize("keep", [1, 2])
def test_keeping_the_first_layers(tmp_path, kind, head, keep):
    whole, folder = saved(tmp_path, kind, head)
    model = models.from_pretrained(folder, head=head, keep_layers=keep)
    assert all(len(layers) == (1 if kind == "albert" else keep) for layers in stacks(model))  # ALBERT's are shared
    expected = truncated(whole, keep)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert model.report.initialised == []
    models.save_pretrained(model, tmp_path / "shallow")
    raw = json.loads((tmp_path / "shallow" / "config.json").read_text())
    depth = models.ARCHITECTURES[kind].depth
    assert [raw[name] for name in depth if name in raw] == [keep] * len([name for name in depth if name in raw])
    back = models.from_pretrained(tmp_path / "shallow", head=head)
    inputs = tiny.inputs_of(model)
    assert torch.equal(back.eval()(inputs).logits, model.eval()(inputs).logits)


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, head in KINDS if has_labels(head)])
def test_a_truncated_model_is_that_of_transformers(tmp_path, kind, head):
    transformers = pytest.importorskip("transformers")
    oracle = zoo.save_oracle(tmp_path, kind, head, num_labels=3)
    name = models.ARCHITECTURES[kind].depth[0]
    config = type(oracle.config).from_pretrained(tmp_path, **{name: 1})
    reader = getattr(transformers, models.ARCHITECTURES[kind].heads[head])
    oracle = reader.from_pretrained(tmp_path, config=config, attn_implementation="eager").eval()
    model = models.from_pretrained(tmp_path, head=head, keep_layers=1).eval()
    inputs = zoo.make_inputs(kind, head, oracle.config)
    with torch.no_grad():
        expected, _ = zoo.run_oracle(oracle, kind, head, inputs)
        found = model(inputs).loss_sum / zoo.num_targets(head, inputs.labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("keep", [9, -1])
def test_more_layers_than_there_are_are_refused(tmp_path, kind, head, keep):
    _, folder = saved(tmp_path, kind, head)
    with pytest.raises(ModelError, match=rf"model.keep_layers = {keep}: the checkpoint has \d layers"):
        models.from_pretrained(folder, head=head, keep_layers=keep)


# fresh layers


@each_kind
def test_the_last_layers_start_anew_and_nothing_else(tmp_path, kind, head):
    whole, folder = saved(tmp_path, kind, head)

    def load(seed):
        return models.from_pretrained(folder, head=head, reinit_layers=1, seed=seed)

    model, again, other = load(0), load(0), load(1)
    last = list(model.backbone.layers)[-1]
    fresh = {name for name, p in model.named_parameters() if any(p is q for q in last.parameters())}
    assert fresh
    before, second, third = (dict(m.named_parameters()) for m in (whole, again, other))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in fresh), name
        assert torch.equal(parameter, second[name]), name
        constant = parameter.ndim == 1 or name.endswith("relative_positions.table.weight")  # BEiT's are 0
        assert torch.equal(parameter, third[name]) == (name not in fresh or constant), name
    report, whole_report = model.report, models.from_pretrained(folder, head=head).report
    assert set(report.initialised) == fresh
    assert len(report.loaded) == len(whole_report.loaded) - len(fresh)  # what was read over is not counted as loaded
    assert set(report.loaded) | set(report.ignored) == set(whole_report.loaded)
    assert whole_report.parameters - report.parameters == sum(p.numel() for p in last.parameters())


@each_kind
def test_all_layers_may_start_anew_and_no_more(tmp_path, kind, head):
    _, folder = saved(tmp_path, kind, head)
    depth = len(list(models.from_pretrained(folder, head=head).backbone.layers))
    report = models.from_pretrained(folder, head=head, reinit_layers=depth).report
    assert all(".layers." in name for name in report.initialised)
    with pytest.raises(ModelError, match=f"model.reinit_layers = {depth + 1}: the model has {depth} layers"):
        models.from_pretrained(folder, head=head, reinit_layers=depth + 1)


def test_depth_and_fresh_layers_together(tmp_path):
    _, folder = saved(tmp_path, "bert", "token-classification")
    model = models.from_pretrained(folder, head="token-classification", keep_layers=1, reinit_layers=1)
    assert model.report.initialised
    assert all(".layers.0." in name for name in model.report.initialised)


# freezing


@each_kind
def test_frozen_parameters_have_no_gradient(tmp_path, kind, head):
    model = tiny.scratch(tmp_path, kind, head)
    inputs = tiny.inputs_of(model)
    model(inputs).loss_sum.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    frozen = models.freeze(model, ["*.layers.0.*", "*embedding*"])
    assert frozen
    assert sorted(frozen) == sorted(name for name in expected if ".layers.0." in name or "embedding" in name)
    model(inputs).loss_sum.backward()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, head in UNSHARED if head == "token-classification"])
def test_the_backward_stops_above_the_frozen_layers(tmp_path, kind):
    """Nothing below the last trained layer is differentiated: what it hands up has no graph behind it."""
    model = tiny.scratch(tmp_path, kind, "token-classification", dropout=0.1).train()
    seen = {}
    for i, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
    models.freeze(model, ["backbone.*embedding*", "backbone.layers.0.*"])
    model(tiny.inputs_of(model)).loss_sum.backward()
    assert not seen[0].requires_grad
    assert seen[0].grad_fn is None
    assert seen[1].grad_fn is not None


def test_pattern_without_a_match_is_named_with_the_nearest(tmp_path):
    model = tiny.scratch(tmp_path, "bert", "token-classification")
    with pytest.raises(ModelError, match=r"'backbone.layer.0' matches no parameter; one is called 'backbone\.layers"):
        models.freeze(model, ["backbone.embedding*", "backbone.layer.0"])


@pytest.mark.parametrize(("kind", "head"), [("bert", "masked-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq-lm")])
def test_freezing_a_tied_matrix_by_its_second_name_is_refused(tmp_path, kind, head):
    """It is one tensor with the embedding, which would still be trained."""
    model = tiny.scratch(tmp_path, kind, head)
    with pytest.raises(ModelError, match=r"head.decoder.weight is tied to 'backbone.word_embeddings.weight'"):
        models.freeze(model, ["head.*"])
    assert all(p.requires_grad for p in model.parameters())
    frozen = models.freeze(model, ["head.*", "*.word_embeddings.*"])
    assert not model.head.decoder.weight.requires_grad
    assert "backbone.word_embeddings.weight" in frozen


@each_kind
def test_the_callers_default_device_changes_nothing(tmp_path, kind, head):
    expected, folder = saved(tmp_path, kind, head)
    with torch.device("meta"):
        models_ = [
            models.from_pretrained(folder, head=head),
            models.from_pretrained(folder, head=head, init="scratch"),
            models.from_pretrained(folder, head=head, reinit_layers=1),
        ]
    assert {p.device.type for model in models_ for p in model.parameters()} == {"cpu"}
    for found, wanted in zip(models_[0].parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_freezing_everything_is_refused(tmp_path):
    model = tiny.scratch(tmp_path, "bert", "token-classification")
    with pytest.raises(ModelError, match="leaves nothing to train"):
        models.freeze(model, ["backbone.*", "head.*"])
    assert models.freeze(tiny.scratch(tmp_path, "bert", "token-classification"), []) == []


# positions


def test_sinusoidal_positions_start_as_sines_and_are_trained(tmp_path):
    """transformers fills DistilBERT's position embeddings with sines where it initialises them, and trains them."""
    pytest.importorskip("transformers")
    oracle = zoo.save_oracle(tmp_path / "oracle", "distilbert", None, sinusoidal_pos_embds=True)
    theirs = oracle.embeddings.position_embeddings.weight
    assert theirs.requires_grad
    loaded = models.from_pretrained(tmp_path / "oracle").backbone.position_embeddings.weight
    assert loaded.requires_grad
    assert torch.equal(loaded, theirs)
    fresh = models.from_pretrained(tmp_path / "oracle", init="scratch").backbone.position_embeddings.weight
    torch.testing.assert_close(fresh, theirs, rtol=0, atol=1e-6)
