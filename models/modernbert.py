"""ModernBERT (Warner et al. 2024): an encoder with rotary positions and local attention, pre-LayerNorm.

Most layers attend within a window; every third, and the first, to the whole text. Linear layers and LayerNorms have no
biases, the feed-forward part is gated, and the first layer has no LayerNorm before its attention, since the embeddings
have one. The text is packed, so a micro-batch is (T, D) throughout. Shapes: models/ops/packing.py.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.architecture import Architecture, check_divides, read_fields, read_rates
from models.bert import HEAD_ROWS, transformers_classes
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape
from models.inputs import ModelInputs, Reads, packing_of, packing_to_read, require
from models.ops.attention import Bias, packed_attention
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, NO_DROPOUT, DropoutRates, drop_path
from models.ops.local_attention import Blocks, local_attention, split_into_blocks, window_bias
from models.ops.packing import Packing, Padded
from models.ops.rotary import Rotation, rotate, rotation

KINDS = ("full_attention", "sliding_attention")  # of layers, in config.json


@dataclass(frozen=True)
class ModernBertConfig:
    """The fields of a config.json that change the mathematics, under our names (NAMES has ModernBERT's)."""

    vocab_size: int = 50368
    hidden_size: int = 768
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    intermediate_size: int = 1152
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    local_attention: int = 128  # tokens; half of them, rounded down, on each side
    layer_norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    global_attn_every_n_layers: int = 3
    kinds: tuple[str, ...] = ()  # of each layer, one of KINDS; empty: as global_attn_every_n_layers says
    thetas: tuple[float, float] = (160_000.0, 10_000.0)  # of the rotary positions of global and of local layers
    rates: DropoutRates = NO_DROPOUT
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.head_width % 2:
            raise ModelError(
                f"config.json: hidden_size = {self.hidden_size} gives heads of {self.head_width} numbers; "
                "rotary positions need an even number"
            )

    def is_global(self, layer: int) -> bool:
        """Return whether a layer attends to the whole text."""
        return self.kinds[layer] == KINDS[0] if self.kinds else layer % self.global_attn_every_n_layers == 0

    @property
    def head_width(self) -> int:
        """The width K of a head."""
        return self.hidden_size // self.num_attention_heads


class Places(NamedTuple):
    """What the layers of one kind know about the places of the tokens."""

    rotation: Rotation
    blocks: Blocks | None = None  # the windows of local layers; None: attention to the whole text
    bias: Bias | None = None  # the same in an exported graph


class Attention(nn.Module):
    """Self-attention with rotary positions; query, key and value are one product (as in the file: `Wqkv`)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.dropout = config.rates.attention

    def forward(self, x: Tensor, packing: Packing, places: Places) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D)"""
        qkv = torch.unflatten(self.qkv(x), -1, (3 * self.num_heads, -1))  # (T, 3 H, K)
        rotated, v = torch.split(qkv, [2 * self.num_heads, self.num_heads], 1)
        q, k = rotate(rotated, places.rotation).chunk(2, 1)
        dropout = self.dropout if self.training else 0.0
        if places.blocks is not None:
            attended = packing.take(local_attention(q, k, v, places.blocks, dropout=dropout))
        elif packing.lengths:  # attention of the selected tokens only
            attended = packed_attention(packing.take(q), k, v, packing, key_packing=packing.whole, dropout=dropout)
        else:
            attended = packing.take(packed_attention(q, k, v, packing.whole, bias=places.bias, dropout=dropout))
        out: Tensor = self.output(attended)
        return out


class GatedMLP(nn.Module):
    """down(act(a) * b), where a and b are the halves of one product (as in the file: `Wi`) (Shazeer 2020)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = Dropout(config.rates.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)"""
        inner, gate = self.up(x).chunk(2, -1)
        out: Tensor = self.down(self.dropout(self.activation(inner) * gate))
        return out


def build_norm(config: ModernBertConfig) -> nn.LayerNorm:
    """Return a LayerNorm of the hidden states."""
    return nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.norm_bias)


class ModernBertLayer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x)). The first layer has no LayerNorm before its attention."""

    def __init__(self, config: ModernBertConfig, layer: int):
        super().__init__()
        self.attention_norm = build_norm(config) if layer else None
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = GatedMLP(config)
        self.attention_dropout = Dropout(config.rates.attention)
        self.drop_path_rate = config.rates.layer_drop_path_rate(layer, config.num_hidden_layers)

    def forward(self, x: Tensor, packing: Packing, places: Places) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D)"""
        rate = self.drop_path_rate if self.training else 0.0
        normed = x if self.attention_norm is None else self.attention_norm(x)
        attended = self.attention_dropout(self.attention(normed, packing, places))
        x = packing.take(x) + drop_path(attended, packing, rate)
        return x + drop_path(self.mlp(self.mlp_norm(x)), packing, rate)


class ModernBertModel(nn.Module):
    """Embeddings, layers and the last LayerNorm."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = build_norm(config)
        self.dropout = Dropout(config.rates.embedding)
        self.layers = nn.ModuleList(ModernBertLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.are_global = [config.is_global(i) for i in range(config.num_hidden_layers)]

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""
        return self.config.max_position_embeddings

    @property
    def embedding(self) -> nn.Embedding:
        """The matrix that a masked-LM head is tied to."""
        return self.word_embeddings

    def forward(self, inputs: ModelInputs, reads: Reads | None = None) -> tuple[Tensor, Packing]:
        """Return the last hidden states, (T, D), and their packing; of the tokens that `reads` selects, (R, D).

        inputs.input_ids: (T,).
        """
        packing = packing_of(inputs)
        x = self.dropout(self.embedding_norm(self.word_embeddings(require(inputs.input_ids, "input_ids"))))
        places = self.find_places(packing, x.dtype)
        to_read = packing_to_read(packing, inputs, reads)
        *layers, last = zip(self.layers, self.are_global, strict=True)
        for layer, is_global in layers:
            x = layer(x, packing, places[is_global])
        layer, is_global = last
        return self.norm(layer(x, to_read, places[is_global])), to_read

    def find_places(self, packing: Packing, dtype: torch.dtype) -> dict[bool, Places]:
        """Return {whether a layer is global: the places that it knows}."""
        config = self.config
        of_global, of_local = (rotation(packing.positions, theta, config.head_width, dtype) for theta in config.thetas)
        window = config.local_attention // 2
        if isinstance(packing, Padded):
            return {True: Places(of_global), False: Places(of_local, bias=window_bias(window))}
        blocks = None if all(self.are_global) else split_into_blocks(packing, window)
        return {True: Places(of_global), False: Places(of_local, blocks)}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights from Normal(0, initializer_range), truncated; set biases to 0 and LayerNorms to identity.

        It initialises the whole model, or only `modules`. The matrices whose products are added to the residual stream
        are scaled by 1 / sqrt(2 layers), as in the published code.
        """
        std, cutoff = self.config.initializer_range, self.config.initializer_cutoff_factor
        scaled = std / math.sqrt(2 * self.config.num_hidden_layers)
        last = {
            module.output if isinstance(module, Attention) else module.down
            for module in self.modules()
            if isinstance(module, Attention | GatedMLP)
        }
        for module in [child for chosen in modules or [self] for child in chosen.modules()]:
            if isinstance(module, nn.Linear | nn.Embedding):
                width = scaled if module in last else std
                limit = cutoff * width
                if limit:
                    nn.init.trunc_normal_(module.weight, 0.0, width, -limit, limit, generator=generator)
                else:
                    module.weight.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
                module.bias.zero_()


NAMES = {"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"}


def _read_config(raw: JsonObject) -> ModernBertConfig:
    raw = {name: value for name, value in raw.items() if value is not None and name not in ("kinds", "thetas")}
    supported = {"hidden_activation": tuple(ACTIVATIONS), "classifier_activation": tuple(ACTIVATIONS)}
    config = read_fields(ModernBertConfig, raw, NAMES, supported=supported)
    if raw.get("head_dim", config.head_width) != config.head_width:
        shown = reprlib.repr(raw["head_dim"])
        raise ModelError(f"config.json: head_dim = {shown} should be hidden_size / num_attention_heads")
    kinds: Any = raw.get("layer_types", [])
    is_list = isinstance(kinds, list) and all(kind in KINDS for kind in kinds)
    if not is_list or (kinds and len(kinds) != config.num_hidden_layers):
        raise ModelError(
            f"config.json: layer_types = {reprlib.repr(kinds)} should name {' or '.join(KINDS)} for each of the "
            f"{config.num_hidden_layers} layers (or leave it out and set global_attn_every_n_layers)"
        )
    hidden = ("mlp_dropout", 0.0)
    rates = read_rates(raw, embedding=("embedding_dropout", 0.0), attention=("attention_dropout", 0.0), hidden=hidden)
    return replace(
        config,
        kinds=tuple(kinds),
        thetas=_read_thetas(raw),
        rates=DropoutRates(**rates),
        head_dropout=read_rates(raw, head=("classifier_dropout", 0.0))["head"],
    )


def _read_thetas(raw: JsonObject) -> tuple[float, float]:
    """Return the thetas of global and of local layers, from rope_parameters or from the fields of older files."""
    of_kinds: Any = raw.get("rope_parameters", {})
    older = {KINDS[0]: raw.get("global_rope_theta", 160_000.0), KINDS[1]: raw.get("local_rope_theta", 10_000.0)}
    thetas = []
    for kind, default in older.items():
        given: Any = (of_kinds.get(kind) or {}) if isinstance(of_kinds, dict) else None
        theta: Any = given.get("rope_theta", default) if isinstance(given, dict) else None
        is_number = isinstance(theta, int | float) and not isinstance(theta, bool) and 0 < theta < math.inf
        if not is_number or given.get("rope_type", "default") != "default" or "rope_scaling" in raw:
            shown = reprlib.repr(raw.get("rope_scaling") or of_kinds or theta)
            raise ModelError(
                f"config.json: the rotary positions of {kind} need a rope_theta above 0, and no scaling: {shown}"
            )
        thetas.append(float(theta))
    return thetas[0], thetas[1]


def _head_shape(config: ModernBertConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    shape = HeadShape(
        config.hidden_size,
        dense=config.classifier_activation,
        dense_bias=config.classifier_bias,
        layer_norm_eps=config.layer_norm_eps,
        norm_bias=config.norm_bias,
        has_norm=True,
        pools_choices=True,
    )
    if head.is_language_model:
        return replace(shape, vocab_size=config.vocab_size, bias=config.decoder_bias)
    return replace(shape, dropout=config.head_dropout)


def _dense_rows(group: str) -> tuple[WeightRow, ...]:
    return (*linear_rows("head.dense", "head.dense", group), *linear_rows("head.norm", "head.norm", group))


# A new classifier starts from the dense layer of a masked language model, as in transformers.
DENSE = _dense_rows("dense")
CLASSIFIER = (*DENSE, *linear_rows("head.classifier", "classifier", "head"))

MODERNBERT = Architecture(
    read_config=_read_config,
    build=lambda config, head: ModernBertModel(config),
    head_shape=_head_shape,
    heads=transformers_classes("ModernBert"),
    depth=("num_hidden_layers",),
    hub_poolings=("cls", "mean"),
    pooling_field="classifier_pooling",
    weights=WeightTable(
        model_type="modernbert",
        prefix="model.",
        rows=(
            WeightRow("backbone.word_embeddings.weight", "embeddings.tok_embeddings.weight"),
            *linear_rows("backbone.embedding_norm", "embeddings.norm"),
            *linear_rows("backbone.layers.{i}.attention_norm", "layers.{i}.attn_norm"),
            *linear_rows("backbone.layers.{i}.attention.qkv", "layers.{i}.attn.Wqkv"),
            *linear_rows("backbone.layers.{i}.attention.output", "layers.{i}.attn.Wo"),
            *linear_rows("backbone.layers.{i}.mlp_norm", "layers.{i}.mlp_norm"),
            *linear_rows("backbone.layers.{i}.mlp.up", "layers.{i}.mlp.Wi"),
            *linear_rows("backbone.layers.{i}.mlp.down", "layers.{i}.mlp.Wo"),
            *linear_rows("backbone.norm", "final_norm"),
        ),
        heads=HEAD_ROWS
        | {
            "sequence-classification": CLASSIFIER,
            "multiple-choice": CLASSIFIER,
            "token-classification": CLASSIFIER,
            "question-answering": (*DENSE, *linear_rows("head.span", "classifier", "head")),
            "masked-lm": (*_dense_rows("head"), *linear_rows("head.decoder", "decoder", "head")),
        },
        tied={"decoder.weight": "embeddings.tok_embeddings.weight"},
    ),
)
