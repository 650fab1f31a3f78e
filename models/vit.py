"""ViT (Dosovitskiy et al. 2020) and DeiT (Touvron et al. 2021): one encoder of image patches, pre-LayerNorm.

DeiT has a second special token, the distillation token. (A DeiT that was trained without a teacher does not have it;
its model_type on the hub is "vit".) An image is a sequence of its special tokens and Y * X patches, row by row. All
images of a micro-batch have one size. Shapes: models/ops/packing.py, and: C channels, (Y, X) patches.

DINOv2 and BEiT (dinov2.py, beit.py) are this encoder with other layers, tokens and positions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import MAX_SIZE, Architecture, check_divides, read_fields, read_rates
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import DistilledClassification, Head, HeadShape
from models.inputs import ModelInputs, Reads, packing_of_images, packing_to_read, require
from models.ops.attention import Bias, SelfAttention
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, MLP, NO_DROPOUT, DropoutRates, drop_path, init_normal, upcast
from models.ops.packing import Packing


@dataclass(frozen=True)
class ViTConfig:
    """The fields of a config.json that change the mathematics; sizes are (height, width) in pixels."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    num_channels: int = 3
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    image_size: tuple[int, int] = (224, 224)  # of the learned positions; other sizes interpolate them
    patch_size: tuple[int, int] = (16, 16)
    distilled: bool = False  # DeiT: a distillation token after the class token
    layer_scale: float | None = None  # the first value of LayerScale; none: no factors
    rates: DropoutRates = NO_DROPOUT

    def __post_init__(self) -> None:
        check_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @property
    def grid(self) -> tuple[int, int]:
        """(Y, X) patches of an image of `image_size`."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_special(self) -> int:
        """The number of tokens before the patches."""
        return 2 if self.distilled else 1


class LayerScale(nn.Module):
    """A learned factor of each channel of a branch (Touvron et al. 2021b)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)"""
        return x * self.weight


class ViTLayer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x)), with dropout on both branches, and factors of both where there are."""

    def __init__(self, config: ViTConfig, drop_path_rate: float):
        super().__init__()
        size, rates = config.hidden_size, config.rates
        self.attention_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.attention = self.build_attention(config)
        self.attention_scale = self.build_scale(config)
        self.mlp_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.mlp = self.build_mlp(config)
        self.mlp_scale = self.build_scale(config)
        self.dropout = Dropout(rates.hidden)
        self.drop_path_rate = drop_path_rate

    def build_attention(self, config: ViTConfig) -> SelfAttention:
        """Return the attention."""
        heads, dropout = config.num_attention_heads, config.rates.attention
        return SelfAttention(config.hidden_size, heads, dropout, bias=config.qkv_bias)

    def build_mlp(self, config: ViTConfig) -> nn.Module:
        """Return the feed-forward part."""
        return MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def build_scale(self, config: ViTConfig) -> nn.Module:
        """Return the factors of a branch; nothing where the model has none."""
        return nn.Identity() if config.layer_scale is None else LayerScale(config.hidden_size)

    def forward(self, x: Tensor, packing: Packing, bias: Bias | None = None) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D). bias: a term of the attention scores."""
        rate = self.drop_path_rate if self.training else 0.0
        attended = self.dropout(self.attention(self.attention_norm(x), packing, bias))
        x = packing.take(x) + drop_path(self.attention_scale(attended), packing, rate)
        return x + drop_path(self.mlp_scale(self.dropout(self.mlp(self.mlp_norm(x)))), packing, rate)


class ViTModel(nn.Module):
    """The encoder with its last LayerNorm, without the pooler in base checkpoints, which no published head reads."""

    config: ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        size, depth = config.hidden_size, config.num_hidden_layers
        self.class_token = nn.Parameter(torch.zeros(1, 1, size))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, size)) if config.distilled else None
        self.patch_embeddings = nn.Conv2d(config.num_channels, size, config.patch_size, stride=config.patch_size)
        self.position_embeddings = self.build_positions()
        self.dropout = Dropout(config.rates.embedding)
        self.layers = nn.ModuleList(self.build_layer(i, depth) for i in range(depth))
        self.norm = self.build_norm()

    def build_positions(self) -> nn.Parameter | None:
        """Return the position embeddings: of the special tokens, then of the patches."""
        return nn.Parameter(torch.zeros(1, self.max_length, self.config.hidden_size))

    def build_layer(self, layer: int, depth: int) -> nn.Module:
        """Return the layer of this number, from 0."""
        return ViTLayer(self.config, self.config.rates.layer_drop_path_rate(layer, depth))

    def build_norm(self) -> nn.Module:
        """Return the norm after the last layer."""
        return nn.LayerNorm(self.config.hidden_size, self.config.layer_norm_eps)

    @property
    def num_special(self) -> int:
        """The number of tokens before the patches."""
        return self.config.num_special

    @property
    def max_length(self) -> int:
        """The number of tokens of an image of the config's size. Positions of a larger image are interpolated."""
        return self.num_special + self.config.grid[0] * self.config.grid[1]

    def forward(self, inputs: ModelInputs, reads: Reads | None = None) -> tuple[Tensor, Packing]:
        """Return the last hidden states, (T, D), and their packing; of the tokens that `reads` selects, (R, D).

        inputs.pixel_values: (B, C, height, width).
        Raises ModelError unless height and width are multiples of the patch size and C is the config's.
        """
        pixels = require(inputs.pixel_values, "pixel_values")
        self._check_pixels(pixels)
        pixels = pixels.to(self.patch_embeddings.weight.dtype)  # the model may be in bf16, for example
        patches = self.patch_embeddings(pixels)  # (B, D, Y, X)
        x = self.embed(patches)
        packing = packing_of_images(inputs, x)
        x = self.dropout(x.flatten(0, 1))
        to_read = packing_to_read(packing, inputs, reads)
        bias = self.attention_bias((patches.shape[2], patches.shape[3]))
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, packing, bias)
        return self.norm(last(x, to_read, bias)), to_read

    def embed(self, patches: Tensor) -> Tensor:
        """Return (B, L, D), the special tokens and the patches with their positions. patches: (B, D, Y, X)."""
        special = [token for token in (self.class_token, self.distillation_token) if token is not None]
        tokens = [token.expand(patches.shape[0], -1, -1) for token in special]  # len() would be a constant of a graph
        x = torch.cat([*tokens, patches.flatten(2).transpose(1, 2)], 1)
        positions = self.positions(*patches.shape[2:])
        return x if positions is None else x + positions

    def attention_bias(self, grid: tuple[int, int]) -> Bias | None:
        """Return a term of the attention scores of all layers, for images of Y x X patches; None: no such term."""
        return None

    def positions(self, rows: int, columns: int) -> Tensor | None:
        """Return (1, L, D): the position embeddings of a grid of rows x columns patches; None where there are none.

        For a grid of another size than the config's, the learned one is interpolated, bicubic as published. The
        positions of the special tokens stay.
        """
        learned = self.position_embeddings
        if learned is None or (rows, columns) == self.config.grid:
            return learned
        special, patches = learned.tensor_split([learned.shape[1] - self.config.grid[0] * self.config.grid[1]], 1)
        grid = torch.unflatten(patches, 1, self.config.grid).permute(0, 3, 1, 2)  # (1, D, Y, X)
        grid = self.resize(grid, (rows, columns))
        return torch.cat([special, grid.flatten(2).transpose(1, 2)], 1)

    def resize(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Return positions of the patches, (1, D, Y, X), interpolated to another size."""
        return interpolate(grid, size, "bicubic")

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, height, width = pixels.shape[1:]
        if channels != self.config.num_channels:
            raise ModelError(f"the images have {channels} channels, the model takes {self.config.num_channels}")
        patch = self.config.patch_size
        if height % patch[0] or width % patch[1] or not height or not width:
            raise ModelError(
                f"the images are {height} x {width} pixels, which patches of {patch[0]} x {patch[1]} do not tile: "
                "resize them to a multiple"
            )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights, tokens and positions from Normal(0, initializer_range); biases 0, LayerNorms identity.

        It initialises the whole encoder, or only `modules`.
        """
        std = self.config.initializer_range
        for module in modules or [self]:
            init_normal(module, std, generator)
            for child in module.modules():
                if isinstance(child, LayerScale):
                    child.weight.fill_(self.config.layer_scale or 0.0)
        if not modules:
            for parameter in self.tokens_and_positions():
                parameter.normal_(0.0, std, generator=generator)
            for buffer in self.buffers():  # a mask token
                buffer.zero_()

    def tokens_and_positions(self) -> Iterator[nn.Parameter]:
        """Yield the learned tokens and their positions."""
        for parameter in (self.class_token, self.distillation_token, self.position_embeddings):
            if parameter is not None:
                yield parameter


def interpolate(grid: Tensor, size: tuple[int, int], mode: str, antialias: bool = False) -> Tensor:
    """Return (1, D, Y, X) in another size, computed in fp32 or wider.

    Where a GPU should be deterministic it is computed on the CPU, since the backward there is not.
    """
    exact = upcast(grid)
    if grid.is_cuda and torch.are_deterministic_algorithms_enabled():
        exact = exact.cpu()
    resized = F.interpolate(exact, size, mode=mode, align_corners=False, antialias=antialias)
    return resized.to(grid.device, grid.dtype)


ConfigT = TypeVar("ConfigT", bound=ViTConfig)
NOT_PLAIN = ("image_size", "patch_size", "distilled", "layer_scale")  # fields of ours that are not the hub's


def read_image_config(
    cls: type[ConfigT], raw: JsonObject, patch_size: int = 16, names: Mapping[str, str] | None = None
) -> ConfigT:
    """Return a config from config.json: its plain fields and sizes, but no dropout rates.

    patch_size: the default. names: {our field: the hub's}, where they differ.
    """
    image, patch = _read_size(raw, "image_size", 224), _read_size(raw, "patch_size", patch_size)
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ModelError(
            f"config.json: image_size = {raw.get('image_size', 224)!r} is not a multiple of "
            f"patch_size = {raw.get('patch_size', patch_size)!r}"
        )
    plain = {name: value for name, value in raw.items() if name not in NOT_PLAIN}
    config = read_fields(cls, plain, names, supported={"hidden_act": tuple(ACTIVATIONS), "head_dim": (None,)})
    return replace(config, image_size=image, patch_size=patch)


def _read_config(raw: JsonObject, distilled: bool) -> ViTConfig:
    hidden = ("hidden_dropout_prob", 0.0)
    rates = read_rates(raw, embedding=hidden, attention=("attention_probs_dropout_prob", 0.0), hidden=hidden)
    return replace(read_image_config(ViTConfig, raw), distilled=distilled, rates=DropoutRates(**rates))


def _read_size(raw: JsonObject, name: str, default: int) -> tuple[int, int]:
    """Return a size of config.json, one number or [height, width], as (height, width)."""
    value = raw.get(name)
    value = default if value is None else value
    pair = value if isinstance(value, list) else [value, value]
    sizes = [n for n in pair if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MAX_SIZE]
    if len(pair) != 2 or len(sizes) != 2:
        shown = reprlib.repr(value)
        raise ModelError(f"config.json: {name} = {shown} should be like {default} or [{default}, {default}]")
    return sizes[0], sizes[1]


def _head_shape(config: ViTConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    if issubclass(head, DistilledClassification) and pooling != "cls":
        raise ModelError(f"model.pooling = {pooling!r}: a {name} head reads the two special tokens, as with 'cls'")
    return image_head_shape(config, pooling)


def image_head_shape(config: ViTConfig, pooling: str) -> HeadShape:
    """Return the HeadShape of a model of images; ModelError for the last token."""
    if pooling == "last":
        raise ModelError(
            "model.pooling = 'last': the last token of an image is one patch; choose from cls, mean, cls_mean"
        )
    return HeadShape(config.hidden_size, num_special=config.num_special)


EMBEDDING_ROWS = (
    WeightRow("backbone.class_token", "embeddings.cls_token"),
    *linear_rows("backbone.patch_embeddings", "embeddings.patch_embeddings.projection"),
    WeightRow("backbone.position_embeddings", "embeddings.position_embeddings"),
)
ATTENTION_ROWS = (
    *linear_rows("backbone.layers.{i}.attention.query", "encoder.layer.{i}.attention.attention.query"),
    *linear_rows("backbone.layers.{i}.attention.key", "encoder.layer.{i}.attention.attention.key"),
    *linear_rows("backbone.layers.{i}.attention.value", "encoder.layer.{i}.attention.attention.value"),
    *linear_rows("backbone.layers.{i}.attention.output", "encoder.layer.{i}.attention.output.dense"),
)
ROWS = (
    *EMBEDDING_ROWS,
    *ATTENTION_ROWS,
    *linear_rows("backbone.layers.{i}.attention_norm", "encoder.layer.{i}.layernorm_before"),
    *linear_rows("backbone.layers.{i}.mlp_norm", "encoder.layer.{i}.layernorm_after"),
    *linear_rows("backbone.layers.{i}.mlp.up", "encoder.layer.{i}.intermediate.dense"),
    *linear_rows("backbone.layers.{i}.mlp.down", "encoder.layer.{i}.output.dense"),
    *linear_rows("backbone.norm", "layernorm"),
)
CLASSIFIER = linear_rows("head.classifier", "classifier", "head")
IMAGE_POOLINGS = ("cls", "mean", "cls_mean", "last")  # the last one to be refused with a reason
# They are added to the tokens, or are tokens, and no matrix scales them. As in timm (`no_weight_decay`) they keep their
# norm.
NO_WEIGHT_DECAY = ("backbone.class_token", "backbone.distillation_token", "backbone.position_embeddings")
# The pooler, and the parts of a checkpoint of masked image modelling besides its encoder.
IGNORED = (r"pooler\.dense\.(weight|bias)", r"embeddings\.mask_token", r"decoder\.0\.(weight|bias)")

VIT = Architecture(
    read_config=lambda raw: _read_config(raw, distilled=False),
    build=lambda config, head: ViTModel(config),
    head_shape=_head_shape,
    heads={None: "ViTModel", "image-classification": "ViTForImageClassification"},
    depth=("num_hidden_layers",),
    poolings=IMAGE_POOLINGS,
    no_weight_decay=NO_WEIGHT_DECAY,
    weights=WeightTable(
        model_type="vit", prefix="vit.", rows=ROWS, heads={"image-classification": CLASSIFIER}, ignored=IGNORED
    ),
)
DEIT = Architecture(
    read_config=lambda raw: _read_config(raw, distilled=True),
    build=lambda config, head: ViTModel(config),
    head_shape=_head_shape,
    heads={
        None: "DeiTModel",
        "image-classification": "DeiTForImageClassification",
        "distilled-image-classification": "DeiTForImageClassificationWithTeacher",
    },
    depth=("num_hidden_layers",),
    poolings=IMAGE_POOLINGS,
    no_weight_decay=NO_WEIGHT_DECAY,
    weights=WeightTable(
        model_type="deit",
        prefix="deit.",
        rows=(*ROWS, WeightRow("backbone.distillation_token", "embeddings.distillation_token")),
        heads={
            "image-classification": CLASSIFIER,
            "distilled-image-classification": (
                *linear_rows("head.classifier", "cls_classifier", "head"),
                *linear_rows("head.distilled_classifier", "distillation_classifier", "head"),
            ),
        },
        ignored=IGNORED,
    ),
)
