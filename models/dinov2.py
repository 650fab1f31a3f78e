"""DINOv2 (Oquab et al. 2023), with register tokens too (Darcet et al. 2023): ViT's encoder with scaled branches.

Each channel of a branch has a learned factor. The largest models have a gated feed-forward part. A classifier reads the
class token beside the mean of the patches. Registers follow the class token, have no position, and no head reads them.
Shapes: models/vit.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import Architecture, read_rates
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape
from models.ops.layers import DropoutRates
from models.vit import (
    ATTENTION_ROWS,
    CLASSIFIER,
    EMBEDDING_ROWS,
    IMAGE_POOLINGS,
    NO_WEIGHT_DECAY,
    ViTConfig,
    ViTLayer,
    ViTModel,
    image_head_shape,
    interpolate,
    read_image_config,
)


@dataclass(frozen=True)
class Dinov2Config(ViTConfig):
    """The fields of a config.json that change the mathematics; intermediate_size follows from others."""

    layer_norm_eps: float = 1e-6
    layer_scale: float | None = 1.0
    mlp_ratio: float = 4.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int = 0

    @property
    def num_special(self) -> int:
        """The number of tokens before the patches."""
        return 1 + self.num_register_tokens


class SwiGLU(nn.Module):
    """output(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix, as in the file."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)"""
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.output(F.silu(gate) * up)
        return out


class Dinov2Layer(ViTLayer):
    """ViT's layer, where the feed-forward part may be gated."""

    def build_mlp(self, config: ViTConfig) -> nn.Module:
        """Return the feed-forward part."""
        if isinstance(config, Dinov2Config) and config.use_swiglu_ffn:
            return SwiGLU(config.hidden_size, config.intermediate_size)
        return super().build_mlp(config)


class Dinov2Model(ViTModel):
    """ViT's encoder with register tokens, of which there may be none.

    The mask token, which fine-tuning does not use, is kept for the export.
    """

    config: Dinov2Config

    def __init__(self, config: Dinov2Config):
        super().__init__(config)
        registers = (1, config.num_register_tokens, config.hidden_size)
        self.register_tokens = nn.Parameter(torch.zeros(registers)) if config.num_register_tokens else None
        self.register_buffer("mask_token", torch.zeros(1, config.hidden_size) if config.use_mask_token else None)

    def build_positions(self) -> nn.Parameter:
        """Return the position embeddings: of the class token, then of the patches."""
        rows, columns = self.config.grid
        return nn.Parameter(torch.zeros(1, 1 + rows * columns, self.config.hidden_size))

    def build_layer(self, layer: int, depth: int) -> nn.Module:
        """Return a layer. All have the same rate of drop path, as published."""
        return Dinov2Layer(self.config, self.config.rates.drop_path)

    def embed(self, patches: Tensor) -> Tensor:
        """Return (B, L, D), the class token and the patches with their positions, the registers between them."""
        x = super().embed(patches)
        if self.register_tokens is None:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], 1)

    def resize(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Return positions of the patches, (1, D, Y, X), interpolated to another size."""
        return interpolate(grid, size, "bicubic", antialias=self.register_tokens is not None)

    def tokens_and_positions(self) -> Iterator[nn.Parameter]:
        """Yield the learned tokens and their positions."""
        yield from super().tokens_and_positions()
        if self.register_tokens is not None:
            yield self.register_tokens


def _read_config(raw: JsonObject, registers: bool) -> Dinov2Config:
    given = {name: value for name, value in raw.items() if value is not None and name != "intermediate_size"}
    if registers:
        given = {"num_register_tokens": 4, **given, "use_mask_token": True}
    else:
        given.pop("num_register_tokens", None)
    config = read_image_config(Dinov2Config, given, 16 if registers else 14, {"layer_scale": "layerscale_value"})
    inner = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        inner = (inner * 2 // 3 + 7) // 8 * 8
    if not inner:
        raise ModelError(f"config.json: mlp_ratio = {config.mlp_ratio} leaves the feed-forward part no width")
    rates = read_rates(
        raw,
        embedding=("hidden_dropout_prob", 0.0),
        attention=("attention_probs_dropout_prob", 0.0),
        drop_path=("drop_path_rate", 0.0),
    )
    return replace(config, intermediate_size=inner, rates=DropoutRates(**rates))


def _head_shape(config: Dinov2Config, name: str, head: type[Head], pooling: str) -> HeadShape:
    return image_head_shape(config, pooling)


LAYER = "encoder.layer.{i}"
ROWS = (
    *EMBEDDING_ROWS,
    WeightRow("backbone.mask_token", "embeddings.mask_token"),
    *ATTENTION_ROWS,
    *linear_rows("backbone.layers.{i}.attention_norm", f"{LAYER}.norm1"),
    WeightRow("backbone.layers.{i}.attention_scale.weight", f"{LAYER}.layer_scale1.lambda1"),
    *linear_rows("backbone.layers.{i}.mlp_norm", f"{LAYER}.norm2"),
    *linear_rows("backbone.layers.{i}.mlp.up", f"{LAYER}.mlp.fc1"),
    *linear_rows("backbone.layers.{i}.mlp.down", f"{LAYER}.mlp.fc2"),
    WeightRow("backbone.layers.{i}.mlp_scale.weight", f"{LAYER}.layer_scale2.lambda1"),
    *linear_rows("backbone.norm", "layernorm"),
)
GATED_ROWS = (
    *linear_rows("backbone.layers.{i}.mlp.gate_up", f"{LAYER}.mlp.weights_in"),
    *linear_rows("backbone.layers.{i}.mlp.output", f"{LAYER}.mlp.weights_out"),
)

DINOV2 = Architecture(
    read_config=lambda raw: _read_config(raw, registers=False),
    build=lambda config, head: Dinov2Model(config),
    head_shape=_head_shape,
    heads={None: "Dinov2Model", "image-classification": "Dinov2ForImageClassification"},
    depth=("num_hidden_layers",),
    pooling="cls_mean",
    poolings=IMAGE_POOLINGS,
    no_weight_decay=(*NO_WEIGHT_DECAY, "backbone.register_tokens"),
    weights=WeightTable(
        model_type="dinov2",
        prefix="dinov2.",
        rows=(*ROWS, *GATED_ROWS),
        heads={"image-classification": CLASSIFIER},
        ignored=(r"embeddings\.mask_token",),  # where config.json says that there is none
    ),
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    read_config=lambda raw: _read_config(raw, registers=True),
    heads={
        None: "Dinov2WithRegistersModel",
        "image-classification": "Dinov2WithRegistersForImageClassification",
    },
    weights=replace(
        DINOV2.weights,
        model_type="dinov2_with_registers",
        prefix="dinov2_with_registers.",
        rows=(*ROWS, *GATED_ROWS, WeightRow("backbone.register_tokens", "embeddings.register_tokens")),
    ),
)
