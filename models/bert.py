"""BERT (Devlin et al. 2018): a bidirectional encoder, post-LayerNorm, with learned positions.

Shapes are those of models/layers.py; the text is packed, so a batch is (T, D) from the embeddings to the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.layers import ACTIVATIONS, MLP, Packing, SelfAttention
from models.weights import Row, Table


@dataclass(frozen=True)
class Config:
    """The fields of a BERT config.json that change the mathematics, under the hub's names and defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Read a config.json; refuse by name what this module would otherwise compute wrongly."""
        supported = {
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "hidden_act": tuple(ACTIVATIONS),
        }
        for name, values in supported.items():
            if name in raw and raw[name] not in values:
                choices = ", ".join(repr(v) for v in values)
                raise ModelError(f"config.json: {name} = {raw[name]!r} is not supported; BERT here takes {choices}")
        given = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        for name, value in given.items():
            example = getattr(cls, name) or 0.0
            if not isinstance(value, str if isinstance(example, str) else int | float) or isinstance(value, bool):
                raise ModelError(f"config.json: {name} = {value!r} should be like {example!r}")
        config = cls(**given)
        if config.hidden_size % config.num_attention_heads:
            raise ModelError(
                f"config.json: hidden_size = {config.hidden_size} is not a multiple of "
                f"num_attention_heads = {config.num_attention_heads}"
            )
        return config

    def with_dropout(self, p: float) -> dict[str, float]:
        """The fields that set every dropout site of this architecture to `p`."""
        return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p, "classifier_dropout": p}

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


class Layer(nn.Module):
    """x -> LN(x + attention(x)) -> LN(x + mlp(x)), with dropout on both branches."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention = SelfAttention(
            config.hidden_size, config.num_attention_heads, config.attention_probs_dropout_prob
        )
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, packing)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Model(nn.Module):
    """The encoder without its pooler, which belongs to the head that reads it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, packing: Packing) -> Tensor:
        """input_ids, token_type_ids: (T,). Returns the last hidden states, (T, D)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.dropout(self.embedding_norm(x + self.position_embeddings(packing.positions)))
        for layer in self.layers:
            x = layer(x, packing)
        return x

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal(0, initializer_range) weights, zero biases, LayerNorm at identity (the published initialisation)."""
        init_normal(self, self.config.initializer_range, generator)


@torch.no_grad()
def init_normal(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Initialise every Linear, Embedding and LayerNorm below `module`, in a fixed order, from one generator."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            child.weight.normal_(0.0, std, generator=generator)
            if isinstance(child, nn.Linear) and child.bias is not None:
                child.bias.zero_()
        elif isinstance(child, nn.LayerNorm):
            child.weight.fill_(1.0)
            child.bias.zero_()


def _both(ours: str, theirs: str, group: str = "backbone") -> tuple[Row, Row]:
    return Row(f"{ours}.weight", f"{theirs}.weight", group), Row(f"{ours}.bias", f"{theirs}.bias", group)


WEIGHTS = Table(
    model_type="bert",
    prefix="bert.",
    rows=(
        Row("backbone.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        Row("backbone.position_embeddings.weight", "embeddings.position_embeddings.weight"),
        Row("backbone.token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
        *_both("backbone.embedding_norm", "embeddings.LayerNorm"),
        *_both("backbone.layers.{i}.attention.query", "encoder.layer.{i}.attention.self.query"),
        *_both("backbone.layers.{i}.attention.key", "encoder.layer.{i}.attention.self.key"),
        *_both("backbone.layers.{i}.attention.value", "encoder.layer.{i}.attention.self.value"),
        *_both("backbone.layers.{i}.attention.output", "encoder.layer.{i}.attention.output.dense"),
        *_both("backbone.layers.{i}.attention_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
        *_both("backbone.layers.{i}.mlp.up", "encoder.layer.{i}.intermediate.dense"),
        *_both("backbone.layers.{i}.mlp.down", "encoder.layer.{i}.output.dense"),
        *_both("backbone.layers.{i}.mlp_norm", "encoder.layer.{i}.output.LayerNorm"),
        *_both("head.pooler", "pooler.dense", group="pooler"),
        *_both("head.classifier", "classifier", group="classifier"),
    ),
    unprefixed=("classifier",),
    renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
    ignored=(r"embeddings\.position_ids", r"cls\..*"),
)

# What transformers calls a checkpoint with each head; a mean-pooled classifier has no counterpart there.
EXPORTED_AS = {None: "BertModel", ("sequence-classification", "cls"): "BertForSequenceClassification"}
