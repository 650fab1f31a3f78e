"""LoRA: what is trained, that it starts as the base, that merging is exact, and that peft reads the adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import zoo

import models
from models import ModelError
from models.frozen_linear import FrozenLinear
from models.lora import LoraLinear, lora_layers

HEAD = "sequence-classification"


def base(folder, model_type="bert", head=HEAD, **options):
    """(native model, oracle, inputs) from one file of transformers."""
    oracle = zoo.save_oracle(folder, model_type, head)
    inputs = zoo.make_inputs(model_type, head, oracle.config)
    return models.from_pretrained(folder, head=head, **options), oracle, inputs


def disturb(model):
    """An adapter as training would leave it: B away from zero."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_b.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
            if layer.lora_magnitude is not None:
                layer.lora_magnitude *= 1.3


@pytest.mark.parametrize(("model_type", "head"), zoo.cases())
def test_new_adapter_is_the_identity_and_trains_with_the_head(tmp_path, model_type, head):
    model, _, inputs = base(tmp_path, model_type, head)
    model.eval()
    with torch.no_grad():
        before = model(inputs).logits
    changed = models.add_lora(model, 3, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, before, rtol=0, atol=0)
    assert changed
    model.train()(inputs).loss_sum.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    language_model = bool(model.head.shape.vocab_size)
    for name in trained:
        assert name.endswith((".lora_a", ".lora_b")) or (name.startswith("head.") and not language_model), name
    assert {n for n in trained if "lora" in n} == {f"{n}.{part}" for n in changed for part in ("lora_a", "lora_b")}


@pytest.mark.parametrize(("model_type", "head"), zoo.cases())
def test_a_merged_export_computes_what_the_adapter_does(tmp_path, model_type, head):
    model, _, inputs = base(tmp_path / "base", model_type, head)
    models.add_lora(model, 4, alpha=3.0)
    disturb(model)
    models.save_pretrained(model, tmp_path / "merged")
    merged = models.from_pretrained(tmp_path / "merged", head=head)
    assert not merged.report.initialised
    with torch.no_grad():
        ours, theirs = model.double().eval()(inputs).logits, merged.double().eval()(inputs).logits
        plain = models.from_pretrained(tmp_path / "base", head=head).double().eval()(inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # W + BA was rounded to fp32 once
    assert (ours - plain).abs().max() > 1e-2


def test_the_layer_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(6, 5).double(), 2, 8.0, 0.0, generator)
    with torch.no_grad():
        layer.lora_b.normal_(generator=generator)
        x = torch.randn(7, 6, dtype=torch.float64)
        expected = x @ layer.weight.T + layer.bias + (8.0 / 2) * x @ layer.lora_a.T @ layer.lora_b.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x @ layer.merged_weight().T + layer.bias, expected, rtol=1e-12, atol=1e-12)
    assert layer.lora_a.abs().max() <= 6**-0.5


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_the_formula(rate, bias):
    """Outputs, and gradients where the norm of the sum is a constant; with dropout as peft's own layer computes it."""
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(6, 5, bias=bias).double(), 2, 8.0, rate, generator, dora=True)
    start = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        plain = start @ layer.weight.T + (layer.bias if bias else 0)
        torch.testing.assert_close(layer.eval()(start), plain, rtol=1e-12, atol=1e-12)  # it starts as the base
        layer.lora_b.normal_(generator=generator)
        layer.lora_magnitude.uniform_(0.5, 2, generator=generator)
    x = start.clone().requires_grad_()
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, rate)
    total = layer.weight + (8.0 / 2) * layer.lora_b @ layer.lora_a
    factor = layer.lora_magnitude / total.detach().norm(dim=1)
    expected = x @ layer.weight.T + (layer.bias if bias else 0)
    expected = expected + dropped @ (factor[:, None] * total - layer.weight).T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    trained = [x, layer.lora_a, layer.lora_b, layer.lora_magnitude]
    up = torch.randn(7, 5, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, trained, up), torch.autograd.grad(expected, trained, up), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        merged = x @ layer.merged_weight().T + (layer.bias if bias else 0)
        torch.testing.assert_close(layer.eval()(x), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("storage", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stored_product_has_the_gradients_of_its_weight(storage, precision):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base_layer = torch.nn.Linear(30, 7)  # an odd number of values, in blocks that are not full
    layer = FrozenLinear(base_layer)
    layer.store_as(storage)
    plain = torch.nn.Linear(30, 7)
    plain.weight.data, plain.bias = layer.whole_weight().data, base_layer.bias
    inputs = [torch.randn(4, 30, requires_grad=True) for _ in range(2)]
    inputs[1].data = inputs[0].data
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        outputs = [layer(inputs[0]), plain(inputs[1])]
    tolerance = 0.0 if precision == "fp32" else 1e-2  # the bias is added in bf16
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    for out in outputs:
        out.float().square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=tolerance, atol=5 * tolerance)
    assert layer.weight.grad is None


def test_the_seed_decides_the_adapter(tmp_path):
    adapters = []
    for seed in (1, 1, 2):
        model, _, _ = base(tmp_path)
        models.add_lora(model, 2, seed=seed)
        adapters.append(torch.cat([layer.lora_a.detach().flatten() for layer in lora_layers(model).values()]))
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


def test_an_adapter_is_small_and_comes_back_bit_for_bit(tmp_path):
    model, _, _ = base(tmp_path / "base")
    models.add_lora(model, 2, dropout=0.1)
    disturb(model)
    models.save_adapter(model, tmp_path / "adapter")
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < whole / 2
    back, _, _ = base(tmp_path / "base")
    models.add_lora(back, 2, seed=99)
    models.load_adapter(back, tmp_path / "adapter")
    for (name, found), expected in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    narrow, _, _ = base(tmp_path / "base")
    models.add_lora(narrow, 2, targets=["*.query"])
    with pytest.raises(ModelError, match="not those of this model's adapter"):
        models.load_adapter(narrow, tmp_path / "adapter")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "not the config of a LoRA adapter"),
        ({"r": 3}, r"r = 3, but this model has model\.lora\.rank = 2"),
        ({"lora_alpha": 32}, r"lora_alpha = 32, but this model has model\.lora\.alpha = 1$"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"use_rslora": True}, "'use_rslora' = True is not supported"),
        ({"use_dora": True}, r"use_dora = True, but this model has model\.lora\.dora = false"),
        ({"bias": "lora_only"}, "'bias' = 'lora_only'"),
        ({"rank_pattern": {"query": 4}}, "'rank_pattern'"),
        ({"alpha_pattern": {"query": 4}}, "'alpha_pattern'"),
        ({"layers_to_transform": [0]}, "'layers_to_transform'"),
        ({"a_field_of_tomorrow": 1}, "'a_field_of_tomorrow' = 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"modules_to_save": "classifier"}, "modules_to_save = 'classifier' is not a list"),
    ],
)
def test_an_adapter_of_other_mathematics_is_refused_by_name(tmp_path, changes, message):
    model, _, _ = base(tmp_path)
    models.add_lora(model, 2, alpha=1.0)
    models.save_adapter(model, tmp_path / "adapter")
    models.load_adapter(model, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=message):
        models.load_adapter(model, tmp_path / "adapter")


def test_adapter_needs_config_tensors_and_a_prepared_model(tmp_path):
    model, _, _ = base(tmp_path)
    models.add_lora(model, 2)
    models.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="no LoRA layers to load an adapter into"):
        models.load_adapter(base(tmp_path)[0], tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    pooler = {name: tensor for name, tensor in tensors.items() if "pooler" in name}
    save_file({n: t for n, t in tensors.items() if n not in pooler}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert pooler
    with pytest.raises(ModelError, match=r"differing: .*pooler"):  # modules_to_save says that it was trained
        models.load_adapter(model, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", modules_to_save=["classifier"])
    models.load_adapter(model, tmp_path / "adapter")  # so it is the base's
    model.report.initialised += [f"head.{name}" for name, _ in model.head.named_parameters()]
    with pytest.raises(ModelError, match=r"differing: .*pooler"):  # and there is none in the base
        models.load_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        models.load_adapter(model, tmp_path / "adapter")


@pytest.mark.oracle
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("model_type", "head", "task", "targets"),
    [
        ("bert", HEAD, "SEQ_CLS", ["query", "value"]),
        ("bert", HEAD, "SEQ_CLS", r".*\.(query|value)"),
        ("gpt2", "causal-lm", "CAUSAL_LM", ["c_attn"]),
    ],
)
def test_an_adapter_that_peft_made_loads(tmp_path, model_type, head, task, targets, dora):
    peft = pytest.importorskip("peft")
    model, oracle, inputs = base(tmp_path / "base", model_type, head)
    theirs = peft.get_peft_model(
        oracle,
        peft.LoraConfig(
            task_type=task,
            r=3,
            lora_alpha=5,
            target_modules=targets,
            fan_in_fan_out=model_type == "gpt2",
            use_dora=dora,
        ),
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.save_pretrained(tmp_path / "adapter")
    models.add_lora(model, 3, alpha=5.0, dora=dora)
    with torch.no_grad():
        before = model.eval()(replace(inputs, labels=None)).logits
    models.load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        _, expected = zoo.run_oracle(theirs, model_type, head, replace(inputs))
        found = model(replace(inputs, labels=None)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


def test_a_model_takes_lora_once(tmp_path):
    model, _, _ = base(tmp_path)
    models.add_lora(model, 2)
    disturb(model)
    with pytest.raises(ModelError, match="has LoRA layers already"):
        models.add_lora(model, 2, targets=["*.key"])


def test_a_bf16_model_is_merged_in_fp32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(64, 64), 8, 3.0, 0.0, generator).bfloat16()
    with torch.no_grad():
        layer.lora_b.normal_(generator=generator)
        merged = layer.merged_weight()
    exact = layer.weight.double() + 3 / 8 * layer.lora_b.double() @ layer.lora_a.double()
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, exact.bfloat16(), rtol=0, atol=0)


def by_file_names():
    """peft finds modules by their live names, and transformers 5 gives ViT's others than their files have."""
    for model_type, head in zoo.cases():
        image = zoo.ZOO[model_type].modality == "image"
        yield pytest.param(model_type, head, marks=[pytest.mark.xfail(strict=True)] if image else [])


@pytest.mark.oracle
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("model_type", "head"), by_file_names())
def test_peft_reads_the_adapter(tmp_path, model_type, head, dora):
    peft = pytest.importorskip("peft")
    model, oracle, inputs = base(tmp_path / "base", model_type, head)
    models.add_lora(model, 3, alpha=5.0, dora=dora)
    disturb(model)
    models.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(oracle, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        _, expected = zoo.run_oracle(theirs, model_type, head, replace(inputs))
        found = model.eval()(replace(inputs, labels=None)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["bert", "albert", "gpt2", "t5"])
def test_peft_needs_the_rounded_weights_for_their_adapter(tmp_path, model_type):
    """Over the frozen weights as they were rounded it is our model, over the original ones it is another."""
    peft = pytest.importorskip("peft")
    head = {"t5": "seq2seq-lm", "gpt2": "causal-lm"}.get(model_type, HEAD)
    model, oracle, inputs = base(tmp_path / "base", model_type, head)
    models.add_lora(model, 3, alpha=5.0)
    assert "on the original weights it gives other values" in models.store_frozen_weights(model, "int8")
    rounded = dict(models.lora.base_tensors(model))
    disturb(model)
    models.save_adapter(model, tmp_path / "adapter")
    plain = models.from_pretrained(tmp_path / "base", head=head)
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(rounded[name])
    models.save_pretrained(plain, tmp_path / "rounded")
    with torch.no_grad():
        found = model.eval()(replace(inputs, labels=None)).logits
        over_rounded, over_original = (
            zoo.run_oracle(
                peft.PeftModel.from_pretrained(base_model, str(tmp_path / "adapter")).eval(),
                model_type,
                head,
                replace(inputs),
            )[1]
            for base_model in (type(oracle).from_pretrained(tmp_path / "rounded"), oracle)
        )
    torch.testing.assert_close(found, over_rounded, rtol=1e-4, atol=1e-5)
    assert (found - over_original).abs().max() > 1e-4


def test_target_pattern_without_a_match_is_named(tmp_path):
    model, _, _ = base(tmp_path)
    assert models.add_lora(model, 2, targets=["*layers.1.mlp.*"]) == [
        "backbone.layers.1.mlp.up",
        "backbone.layers.1.mlp.down",
    ]
    model, _, _ = base(tmp_path)
    with pytest.raises(ModelError, match=r"model.lora.target_modules = 'q_proj' matches no linear layer.*\*\.query"):
        models.add_lora(model, 2, targets=["q_proj"])
    with pytest.raises(ModelError, match="at least 1"):
        models.add_lora(model, 0)


def test_a_model_without_lora_has_no_adapter_to_save(tmp_path):
    model, _, _ = base(tmp_path)
    with pytest.raises(ModelError, match="no LoRA layers"):
        models.save_adapter(model, tmp_path / "adapter")


def test_a_damaged_adapter_is_one_sentence(tmp_path):
    model, _, _ = base(tmp_path)
    models.add_lora(model, 2)
    models.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        models.load_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
