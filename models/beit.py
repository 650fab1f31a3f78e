"""BEiT (Bao et al. 2022): ViT's encoder with relative positions and scaled branches, and keys without a bias.

A learned bias on the attention scores, for each head and each offset between two patches, belongs to each layer or is
shared by all; a checkpoint may have both, and absolute positions too. Published classifiers read the mean of the
patches, which is normalised after pooling (use_mean_pooling), so that the encoder ends without a norm.
Shapes: models/vit.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import Architecture, read_rates
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape
from models.inputs import require
from models.ops.attention import Bias, SelfAttention, pad_bias
from models.ops.layers import DropoutRates, product_dtype
from models.ops.packing import Packing, Padded
from models.vit import (
    CLASSIFIER,
    IMAGE_POOLINGS,
    NO_WEIGHT_DECAY,
    ROWS,
    ViTConfig,
    ViTLayer,
    ViTModel,
    image_head_shape,
    interpolate,
    read_image_config,
)


@dataclass(frozen=True)
class BeitConfig(ViTConfig):
    """The fields of a config.json that change the mathematics."""

    layer_scale: float | None = 0.1
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False  # of each layer
    use_shared_relative_position_bias: bool = False  # of all layers
    use_mean_pooling: bool = True


@dataclass(eq=False)
class Offsets:
    """The offsets between the tokens of images of one size, and the bias of them that all layers share.

    index: (L, L) int64, the row of a table for each pair of a query and a key. shared: (H, L, L), where there is one.
    """

    grid: tuple[int, int]  # (Y, X) patches
    index: Tensor
    shared: Tensor | None = None

    @classmethod
    def of_grid(cls, grid: tuple[int, int], device: torch.device) -> Offsets:
        """Return the offsets of images of Y x X patches; L = 1 + Y * X."""
        rows, columns = grid
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        down, right = (x[:, None] - x + size - 1 for x, size in ((row, rows), (column, columns)))
        special = (2 * rows - 1) * (2 * columns - 1)  # then: class token to patch, patch to class token, to itself
        index = F.pad(down * (2 * columns - 1) + right, (1, 0, 1, 0), value=special)
        index[1:, 0] = special + 1
        index[0, 0] = special + 2
        return cls(grid, index)

    def __call__(self, length: int, keys: int) -> Tensor:
        """Return the bias that all layers share, as a Bias of packed_attention."""
        return require(self.shared, "shared")


class RelativePositions(nn.Module):
    """A learned term of the attention scores for each head and each offset between two tokens of an image.

    grid: (Y, X) patches for which it is learned. It is interpolated for images of another size.
    """

    def __init__(self, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.size = (2 * grid[0] - 1, 2 * grid[1] - 1)  # offsets between patches along each axis
        self.table = nn.Embedding(self.size[0] * self.size[1] + 3, num_heads)

    def forward(self, offsets: Offsets) -> Tensor:
        """Return (H, L, L)."""
        rows, columns = offsets.grid
        size = 2 * rows - 1, 2 * columns - 1
        table: Tensor = self.table.weight
        if size != self.size:
            patches, special = table.tensor_split([len(table) - 3])
            learned = torch.unflatten(patches.T, 1, self.size).unsqueeze(0)  # (1, H, 2 Y - 1, 2 X - 1)
            table = torch.cat([interpolate(learned, size, "bilinear")[0].flatten(1).T, special])
        return F.embedding(offsets.index, table).movedim(-1, 0)


class BeitAttention(SelfAttention):
    """Self-attention whose keys have no bias, with relative positions of its own where the config says so."""

    def __init__(self, config: BeitConfig):
        heads = config.num_attention_heads
        super().__init__(config.hidden_size, heads, config.rates.attention, key_bias=False)
        own = config.use_relative_position_bias
        self.relative_positions = RelativePositions(heads, config.grid) if own else None

    def forward(self, x: Tensor, packing: Packing, bias: Bias | None = None) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D). bias: the Offsets; None without relative positions."""
        if not isinstance(bias, Offsets):
            return super().forward(x, packing, bias)
        total = bias.shared
        if self.relative_positions is not None:
            own: Tensor = self.relative_positions(bias)
            total = own if total is None else own + total
        return super().forward(x, packing, None if total is None else _on_device(total, packing))


def _on_device(bias: Tensor, packing: Packing) -> Bias:
    """Return a bias of images of one size, (H, L, L), as packed_attention takes it on this device."""
    if bias.device.type == "cpu" or isinstance(packing.whole, Padded):
        return lambda length, keys: bias
    return pad_bias(bias, bias.shape[-1], None, product_dtype(bias))


class BeitLayer(ViTLayer):
    """ViT's layer with another attention."""

    def build_attention(self, config: ViTConfig) -> SelfAttention:
        """Return the attention."""
        return BeitAttention(cast(BeitConfig, config))


class BeitModel(ViTModel):
    """ViT's encoder with relative positions, without absolute ones and without the last norm where the config says so.

    The mask token, which fine-tuning does not use, is kept for the export.
    """

    config: BeitConfig

    def __init__(self, config: BeitConfig):
        super().__init__(config)
        shared = config.use_shared_relative_position_bias
        self.relative_positions = RelativePositions(config.num_attention_heads, config.grid) if shared else None
        self.register_buffer("mask_token", torch.zeros(1, 1, config.hidden_size) if config.use_mask_token else None)

    def build_positions(self) -> nn.Parameter | None:
        """Return the absolute positions; None where the config says so."""
        return super().build_positions() if self.config.use_absolute_position_embeddings else None

    def build_layer(self, layer: int, depth: int) -> nn.Module:
        """Return the layer of this number, from 0."""
        return BeitLayer(self.config, self.config.rates.layer_drop_path_rate(layer, depth))

    def build_norm(self) -> nn.Module:
        """Return the norm after the last layer; nothing where the pooled vector has it."""
        return nn.Identity() if self.config.use_mean_pooling else super().build_norm()

    def attention_bias(self, grid: tuple[int, int]) -> Bias | None:
        """Return the Offsets of images of Y x X patches; None without relative positions."""
        if self.relative_positions is None and not self.config.use_relative_position_bias:
            return None
        offsets = Offsets.of_grid(grid, self.class_token.device)
        if self.relative_positions is not None:
            offsets.shared = self.relative_positions(offsets)
        return offsets

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights, tokens and absolute positions from Normal(0, initializer_range); relative positions are 0."""
        modules = [*modules]
        super().init_weights(generator, modules)
        for module in modules or [self]:
            for child in module.modules():
                if isinstance(child, RelativePositions):
                    child.table.weight.zero_()


def _complete(raw: JsonObject) -> JsonObject:
    """Return config.json with the pooling that follows from use_mean_pooling."""
    return {"pooling": "cls" if raw.get("use_mean_pooling") is False else "mean"} | raw


def _read_config(raw: JsonObject) -> BeitConfig:
    config = read_image_config(BeitConfig, raw, names={"layer_scale": "layer_scale_init_value"})
    hidden = ("hidden_dropout_prob", 0.0)
    rates = read_rates(
        raw,
        embedding=hidden,
        attention=("attention_probs_dropout_prob", 0.0),
        hidden=hidden,
        drop_path=("drop_path_rate", 0.1),
    )
    return replace(config, layer_scale=config.layer_scale or None, rates=DropoutRates(**rates))


def _head_shape(config: BeitConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    shape = image_head_shape(config, pooling)
    trained = "mean" if config.use_mean_pooling else "cls"
    if head.reads_pooled and pooling != trained:
        raise ModelError(
            f"model.pooling = {pooling!r}: the config.json of this BEiT says use_mean_pooling = "
            f'{str(config.use_mean_pooling).lower()}, so its norm belongs to {trained!r}: set it to that, or to ""'
        )
    return replace(shape, pooled_norm=config.use_mean_pooling, layer_norm_eps=config.layer_norm_eps)


RELATIVE = "relative_position_bias.relative_position_bias_table"
BEIT = Architecture(
    read_config=_read_config,
    build=lambda config, head: BeitModel(config),
    head_shape=_head_shape,
    heads={None: "BeitModel", "image-classification": "BeitForImageClassification"},
    depth=("num_hidden_layers",),
    pooling="mean",
    poolings=IMAGE_POOLINGS,
    hub_poolings=("mean", "cls"),
    complete=_complete,
    # As in timm. It is no matrix of a product.
    no_weight_decay=(
        *NO_WEIGHT_DECAY,
        "backbone.relative_positions.table.weight",
        "backbone.layers.{i}.attention.relative_positions.table.weight",
    ),
    weights=WeightTable(
        model_type="beit",
        prefix="beit.",
        rows=(
            *ROWS,
            WeightRow("backbone.mask_token", "embeddings.mask_token"),
            WeightRow("backbone.relative_positions.table.weight", f"encoder.{RELATIVE}"),
            WeightRow(
                "backbone.layers.{i}.attention.relative_positions.table.weight",
                "encoder.layer.{i}.attention.attention." + RELATIVE,
            ),
            WeightRow("backbone.layers.{i}.attention_scale.weight", "encoder.layer.{i}.lambda_1"),
            WeightRow("backbone.layers.{i}.mlp_scale.weight", "encoder.layer.{i}.lambda_2"),
        ),
        heads={"image-classification": (*linear_rows("head.pooled_norm", "pooler.layernorm", "pooler"), *CLASSIFIER)},
        # Indices that older files have, and the head of masked image modelling, whose norm is not the encoder's.
        ignored=(
            r"(.*\.)?relative_position_index",
            r"(layernorm|lm_head)\.(weight|bias)",
            r"embeddings\.mask_token",
        ),
    ),
)
