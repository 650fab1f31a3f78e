"""ViT and DeiT beyond conformance: other image sizes, empty batches, the two classifiers, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support import zoo

import models
from models import ModelError
from models.ops.layers import DropoutRates
from models.ops.packing import Packing

HEADS = [("vit", "image-classification"), ("deit", "image-classification"), ("deit", "distilled-image-classification")]
LABELS = ["cat", "dog", "owl"]


def scratch(folder, kind="vit", head=None, config=None, **options):
    tiny.config_folder(folder, kind, **(config or {}))
    labels = LABELS if head else None
    return models.from_pretrained(folder, head=head, labels=labels, init="scratch", **options)


def pixels(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# positions


def cubic_matrix(new, old):
    """(new, old): along one axis, Keys' kernel (1981, eq. 4) with a = -0.75, centres aligned, the border repeated."""
    a, matrix = -0.75, torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - tap)
            inner, outer = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[row, min(max(tap, 0), old - 1)] += inner if t <= 1 else outer
    return matrix


@pytest.mark.parametrize("grid", [(8, 9), (2, 3), (4, 7), (1, 1)])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_positions_of_another_grid_are_interpolated_bicubically(tmp_path, kind, grid):
    """From the formula, also for rectangular grids and patches, for which there is no oracle."""
    model = scratch(tmp_path, kind, config={"image_size": [16, 48], "patch_size": [4, 8]}).double().backbone
    assert model.config.grid == (4, 6)
    assert model.positions(4, 6) is model.position_embeddings
    special, found = model.num_special, model.positions(*grid)
    assert torch.equal(found[:, :special], model.position_embeddings[:, :special])
    learned = model.position_embeddings[0, special:].unflatten(0, (4, 6))
    rows, columns = cubic_matrix(grid[0], 4), cubic_matrix(grid[1], 6)
    expected = torch.einsum("yp,xq,pqd->yxd", rows, columns, learned)
    torch.testing.assert_close(found[0, special:].unflatten(0, grid), expected, rtol=1e-10, atol=1e-10)


def test_as_many_patches_in_another_shape_are_another_grid(tmp_path):
    model = scratch(tmp_path, config={"image_size": [8, 32], "patch_size": 4}).backbone
    assert not torch.equal(model.positions(8, 2), model.positions(2, 8))
    assert model(models.pack_images(pixels(2, 3, 32, 8)))[0].shape == (2 * 17, 24)


def test_positions_learn_from_images_of_other_sizes(tmp_path):
    model = scratch(tmp_path, "deit", "image-classification")
    model(models.pack_images(pixels(2, 3, 12, 20), labels=torch.tensor([0, 2]))).loss_sum.backward()
    assert (model.backbone.position_embeddings.grad.abs().sum(-1) > 0).all()


# batches


@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_a_batch_of_no_images_has_gradients_of_zero(tmp_path, kind, head, size):
    model = scratch(tmp_path, kind, head).train()
    out = model(models.pack_images(torch.zeros(0, 3, *size), labels=torch.zeros(0, dtype=torch.int64)))
    assert out.logits.shape == (0, 3)
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_an_image_does_not_depend_on_its_company(tmp_path, kind, head):
    model = scratch(tmp_path, kind, head).double().eval()
    batch = pixels(5, 3, 12, 8).double()
    with torch.no_grad():
        together = model(models.pack_images(batch)).logits
        alone = torch.cat([model(models.pack_images(image[None])).logits for image in batch])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["vit", "deit"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_class_token_or_the_mean_of_the_patches_is_read(tmp_path, kind, pooling):
    model = scratch(tmp_path, kind, "image-classification", pooling=pooling).eval()
    special = 2 if kind == "deit" else 1
    length = special + 4
    batch = models.pack_images(pixels(3, 3, 8, 8))
    with torch.no_grad():
        hidden, packing = model.backbone(batch)
        assert packing.lengths == (length,) * 3
        assert packing.cu_seqlens.tolist() == [0, length, 2 * length, 3 * length]
        pooled = {"cls": lambda x: x[:, 0], "mean": lambda x: x[:, special:].mean(1)}[pooling]
        expected = model.head.classifier(pooled(hidden.unflatten(0, (3, length))))
        torch.testing.assert_close(model(batch).logits, expected)
    with pytest.raises(ModelError, match=r"model.pooling = 'last': the last token of an image is one patch"):
        scratch(tmp_path, kind, "image-classification", pooling="last")


def test_drop_path_drops_whole_images_more_often_the_deeper(tmp_path):
    model = scratch(tmp_path, config={"num_hidden_layers": 3}, dropout={"drop_path": 0.5})
    assert [layer.drop_path_rate for layer in model.backbone.layers] == [0.0, 0.25, 0.5]
    layer = model.backbone.layers[-1].train()
    x, packing = pixels(64 * 5, 24), Packing.from_lengths([5] * 64)
    with torch.no_grad():
        changed = (layer(x, packing) != x).view(64, -1)
    assert torch.equal(changed.any(1), changed.all(1))
    assert 0.5 < changed.any(1).float().mean() < 0.95  # one of two branches kept: 0.75


# heads and files


def test_eager_attention_of_transformers_in_fp32_says_the_same(tmp_path):
    """The comparisons of test_conformance.py use its other implementation, as its eager one cannot do fp64."""
    oracle = zoo.save_oracle(tmp_path, "vit", "image-classification", num_labels=3)
    oracle.set_attn_implementation("eager")
    model = models.from_pretrained(tmp_path, head="image-classification").eval()
    batch = models.pack_images(pixels(4, 3, 8, 8))
    with torch.no_grad():
        _, expected = zoo.run_oracle(oracle, "vit", "image-classification", batch)
        torch.testing.assert_close(model(batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_two_classifiers_are_averaged(tmp_path):
    model = scratch(tmp_path, "deit", "distilled-image-classification").eval()
    batch = models.pack_images(pixels(2, 3, 8, 8))
    with torch.no_grad():
        hidden = model.backbone(batch)[0].unflatten(0, (2, 6))
        expected = (model.head.classifier(hidden[:, 0]) + model.head.distilled_classifier(hidden[:, 1])) / 2
        torch.testing.assert_close(model(batch).logits, expected)
    with pytest.raises(ModelError, match=r"model\.pooling = 'mean': a distilled-image-classification head reads"):
        scratch(tmp_path, "deit", "distilled-image-classification", pooling="mean")


def test_one_new_classifier_may_stand_on_a_distilled_deit(tmp_path):
    """As when its 1,000 classes are not those of the data; the two in the file are listed as not read."""
    models.save_pretrained(scratch(tmp_path / "a", "deit", "distilled-image-classification"), tmp_path / "b")
    model = models.from_pretrained(tmp_path / "b", head="image-classification", labels=["x", "y"])
    assert model.report.initialised == ["head.classifier.weight", "head.classifier.bias"]
    assert sorted(model.report.ignored) == [
        f"{name}.{kind}" for name in ("cls_classifier", "distillation_classifier") for kind in ("bias", "weight")
    ]
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors.pop("distillation_classifier.bias")
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    with pytest.raises(ModelError, match=r"a part of the head is missing \(distillation_classifier.bias\)"):
        models.from_pretrained(tmp_path / "b", head="distilled-image-classification")


@pytest.mark.parametrize("head", [None, "image-classification"])
def test_files_of_masked_image_modelling_are_read_as_a_backbone(tmp_path, head):
    model = scratch(tmp_path / "a", "vit", "image-classification")
    models.save_pretrained(model, tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    extra = {"vit.embeddings.mask_token": (1, 1, 24), "decoder.0.weight": (768, 24, 1, 1), "decoder.0.bias": (768,)}
    save_file(tensors | {name: torch.zeros(shape) for name, shape in extra.items()}, tmp_path / "b/model.safetensors")
    read = models.from_pretrained(tmp_path / "b", head=head, labels=LABELS if head else None)
    assert sorted(read.report.ignored) == sorted(extra)
    assert torch.equal(read.backbone.position_embeddings, model.backbone.position_embeddings)


def test_the_names_in_the_file_are_those_of_the_hub(tmp_path):
    """Today's transformers has other names in memory."""
    models.save_pretrained(scratch(tmp_path / "a", "deit", "image-classification"), tmp_path / "b")
    names = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert {
        "deit.embeddings.cls_token",
        "deit.embeddings.distillation_token",
        "deit.encoder.layer.1.attention.attention.query.weight",
        "deit.encoder.layer.1.layernorm_before.bias",
        "deit.layernorm.weight",
        "classifier.bias",
    } <= names
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["architectures"] == ["DeiTForImageClassification"]


# initialisation


def test_scratch_weights_are_drawn_from_the_seed(tmp_path):
    model, again, other = (scratch(tmp_path, "deit", "image-classification", seed=seed) for seed in (3, 3, 4))
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.ndim == 1), name
        if a.numel() > 100:
            assert a.std().item() == pytest.approx(0.3, rel=0.2), name  # initializer_range


def test_a_layer_started_anew_leaves_tokens_and_positions(tmp_path):
    model = tiny.scratch(tmp_path / "a", "deit", None)
    models.save_pretrained(model, tmp_path / "b")
    restarted = models.from_pretrained(tmp_path / "b", reinit_layers=1, seed=2)
    pairs = zip(model.named_parameters(), restarted.parameters(), strict=True)
    changed = [name for (name, a), b in pairs if not torch.equal(a, b)]
    assert changed == restarted.report.initialised
    assert all(name.startswith("backbone.layers.1.") for name in changed)


# refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8, 8), "the images have 1 channels, the model takes 3"),
        ((1, 3, 8, 10), "the images are 8 x 10 pixels, which patches of 4 x 4 do not tile"),
        ((1, 3, 0, 8), "the images are 0 x 8 pixels"),
        ((0, 3, 6, 8), "the images are 6 x 8 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, shape, message):
    with pytest.raises(ModelError, match=message):
        scratch(tmp_path)(models.pack_images(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, "image_size = 10 is not a multiple of patch_size = 4"),
        ({"image_size": [8, 10]}, r"image_size = \[8, 10\] is not a multiple of patch_size = 4"),
        ({"patch_size": [4, 4, 4]}, r"patch_size = \[4, 4, 4\] should be like 16 or \[16, 16\]"),
        ({"patch_size": 0}, "patch_size = 0 should be like 16"),
        ({"image_size": True}, "image_size = True should be like 224"),
        ({"image_size": "224"}, "image_size = '224' should be like 224"),
        ({"qkv_bias": 1}, "qkv_bias = 1 should be like True"),
        ({"num_channels": 0}, "num_channels = 0 should be at least 1"),
        ({"num_attention_heads": 5}, "hidden_size = 24 is not a multiple of num_attention_heads = 5"),
        ({"hidden_act": "prelu"}, "hidden_act = 'prelu' is not supported"),
        ({"head_dim": 7}, "head_dim = 7 is not supported"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob = 1.0 should be a rate"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        scratch(tmp_path, config=changes)


def test_a_distillation_token_makes_a_vit_of_another_kind(tmp_path):
    models.save_pretrained(scratch(tmp_path / "a", "deit"), tmp_path / "b")
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(raw | {"model_type": "vit", "distilled": True}))
    with pytest.raises(ModelError, match=r"unknown to vit: embeddings\.distillation_token"):
        models.from_pretrained(tmp_path / "b")


def test_the_checkpoints_dropout_reaches_every_site(tmp_path):
    model = scratch(tmp_path, config={"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3})
    assert model.backbone.config.rates == DropoutRates(embedding=0.2, attention=0.3, hidden=0.2)
    layer = model.backbone.layers[0]
    assert (model.backbone.dropout.p, layer.dropout.p, layer.attention.dropout) == (0.2, 0.2, 0.3)
