"""DINOv2 and BEiT beyond conformance: rectangular grids, files of other kinds, initialisation, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny

import models
from models import ModelError
from models.beit import Offsets, RelativePositions

HEAD = "image-classification"
LABELS = ["cat", "dog", "owl"]


def scratch(folder, kind, head=HEAD, config=None, **options):
    tiny.config_folder(folder, kind, **(config or {}))
    return models.from_pretrained(folder, head=head, labels=LABELS if head else None, init="scratch", **options)


def saved(folder, kind, head=HEAD, config=None):
    models.save_pretrained(scratch(folder / "config", kind, head, config), folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (5, 1)])
def test_a_bias_belongs_to_the_offset_of_two_patches(grid):
    """One by one, on rectangles, which transformers does not take."""
    rows, columns = grid
    positions = RelativePositions(2, grid)
    with torch.no_grad():
        positions.table.weight.normal_()
        found = positions(Offsets.of_grid(grid, torch.device("cpu")))
    table, last = positions.table.weight, (2 * rows - 1) * (2 * columns - 1)
    places = [(y, x) for y in range(rows) for x in range(columns)]
    for i, (y, x) in enumerate(places):
        assert torch.equal(found[:, 0, 1 + i], table[last])
        assert torch.equal(found[:, 1 + i, 0], table[last + 1])
        for j, (other_y, other_x) in enumerate(places):
            row = (y - other_y + rows - 1) * (2 * columns - 1) + x - other_x + columns - 1
            assert torch.equal(found[:, 1 + i, 1 + j], table[row])
    assert torch.equal(found[:, 0, 0], table[last + 2])


def test_a_bias_is_interpolated_along_each_axis():
    """A bias that is linear in both offsets stays so between the outermost centres."""
    positions = RelativePositions(1, (2, 4))
    down, right = torch.meshgrid(torch.arange(3.0), torch.arange(7.0), indexing="ij")
    with torch.no_grad():
        positions.table.weight[:-3, 0] = (10 * down + right).flatten()
        found = positions(Offsets.of_grid((3, 4), torch.device("cpu")))[0]
    expected = 10 * ((torch.arange(5) + 0.5) * 3 / 5 - 0.5).clamp(0, 2)
    for offset in range(-2, 3):
        query, key = (1 + 4 * max(0, offset), 1 + 4 * max(0, -offset))  # in one column, whose offset is 3 of 7
        torch.testing.assert_close(found[query, key], expected[offset + 2] + 3)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "beit"])
def test_every_token_and_position_learns_from_rectangular_images(tmp_path, kind):
    config = {
        "image_size": [8, 16],
        "use_shared_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
    }
    model = tiny.scratch(tmp_path / "plain", kind, HEAD)
    assert model.backbone.config.grid == (2, 2)
    model = scratch(tmp_path, kind, config=config)
    for size in ((8, 16), (12, 8)):
        model.zero_grad()
        pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
        model(models.pack_images(pixels, labels=torch.tensor([0, 1, 2]))).loss_sum.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any() or name.endswith("key.bias"), name


def test_mask_tokens_and_old_indices_of_files_are_read(tmp_path):
    folder = saved(tmp_path, "beit", head=None, config={"use_mask_token": True})
    tensors = {f"beit.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    index = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    extra = {index: torch.zeros(5, 5), "layernorm.weight": torch.ones(24), "lm_head.weight": torch.ones(31, 24)}
    save_file(tensors | extra, folder / "model.safetensors")
    model = models.from_pretrained(folder, head=HEAD, labels=LABELS)
    assert sorted(model.report.ignored) == sorted(extra)
    assert model.report.initialised == [f"head.{name}" for name in ("pooled_norm.weight", "pooled_norm.bias")] + [
        "head.classifier.weight",
        "head.classifier.bias",
    ]
    assert "backbone.mask_token" in models.checkpoints.weights.saved_tensors(model)


@pytest.mark.parametrize("kind", ["dinov2", "beit"])
def test_a_mask_token_is_kept_unless_config_denies_it(tmp_path, kind):
    folder = saved(tmp_path, kind, config={"use_mask_token": True})
    tensors = load_file(folder / "model.safetensors")
    name = f"{kind}.embeddings.mask_token"
    assert not tensors[name].any()  # as new
    save_file(tensors | {name: torch.full_like(tensors[name], 0.5)}, folder / "model.safetensors")
    models.save_pretrained(models.from_pretrained(folder, head=HEAD), tmp_path / "again")
    assert (load_file(tmp_path / "again" / "model.safetensors")[name] == 0.5).all()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"use_mask_token": False}))
    assert models.from_pretrained(folder, head=HEAD).report.ignored == [name]


def test_new_factors_and_positions_are_those_of_the_config(tmp_path):
    model = scratch(tmp_path, "beit", config={"layer_scale_init_value": 0.25, "drop_path_rate": 0.4})
    for name, parameter in model.named_parameters():
        if name.endswith("_scale.weight"):
            assert (parameter == 0.25).all()
        if "relative_positions" in name:
            assert not parameter.any()
    assert [layer.drop_path_rate for layer in model.backbone.layers] == [0.0, 0.4]
    assert (scratch(tmp_path, "dinov2").backbone.layers[1].mlp_scale.weight == 0.5).all()
    registers = scratch(tmp_path, "dinov2_with_registers").backbone.register_tokens
    assert len(registers[0].unique(dim=0)) == 3  # equal ones would stay equal


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dinov2", {"mlp_ratio": 0.01}, "mlp_ratio = 0.01 leaves the feed-forward part no width"),
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio = '4' should be like 4.0"),
        ("dinov2", {"patch_size": 3}, "image_size = 8 is not a multiple of patch_size = 3"),
        ("dinov2", {"layerscale_value": -1}, "layerscale_value = -1 should be at least 0"),
        ("dinov2_with_registers", {"num_register_tokens": 0}, "num_register_tokens = 0 should be at least 1"),
        ("beit", {"use_mean_pooling": False}, "use_mean_pooling = false, so its norm belongs to 'cls'"),
        ("beit", {"use_relative_position_bias": "yes"}, "use_relative_position_bias = 'yes' should be like False"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_by_name(tmp_path, kind, changes, message):
    with pytest.raises(ModelError, match=message):
        scratch(tmp_path, kind, config=changes, pooling="mean" if kind == "beit" else None)
