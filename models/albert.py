"""ALBERT (Lan et al. 2020): BERT's encoder whose layers share their weights, and whose embeddings are narrow.

`layers` has the layers with weights of their own, one in all published models; each is computed several times. So a
learning rate, LoRA, freezing and sharding apply to it once. Other groups of layers than the first follow in depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from models.architecture import Architecture, read_fields, read_rates
from models.bert import (
    CLASSIFIER,
    EMBEDDINGS,
    HEAD_ROWS,
    SUPPORTED,
    BertConfig,
    BertLayer,
    BertModel,
    bert_head_shape,
    transformers_classes,
)
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape
from models.ops.layers import DropoutRates
from models.ops.packing import Packing

# Of transformers; they are BERT's where they are not here.
DEFAULTS = {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
    "num_hidden_groups": 1,
}
MAX_DEPTH = 1000
LAYER = "encoder.albert_layer_groups.{i}.albert_layers.0"


class AlbertModel(BertModel):
    """BERT's encoder, each of whose layers is computed for several depths."""

    def build_layers(self) -> nn.ModuleList:
        """Return the layers with weights of their own, one for each group of depths."""
        config = self.config
        return nn.ModuleList(BertLayer(config, config.rates.drop_path) for _ in range(config.num_hidden_groups))

    def computed_layers(self) -> Sequence[Callable[[Tensor, Packing], Tensor]]:
        """Return the layer of each depth, from the input to the output; drop path rises with the depth."""
        depth = self.config.num_hidden_layers
        size = depth / self.config.num_hidden_groups  # as the published code divides, where it is no whole number
        layers = [self.layers[int(i / size)] for i in range(depth)]
        if not self.config.rates.drop_path:
            return layers
        return [partial(layer, drop_path_share=i / max(1, depth - 1)) for i, layer in enumerate(layers)]


def _read_albert(raw: JsonObject) -> BertConfig:
    raw = DEFAULTS | {name: value for name, value in raw.items() if value is not None}
    config = read_fields(BertConfig, raw, supported=SUPPORTED | {"inner_group_num": (1,)})
    if config.num_hidden_layers > MAX_DEPTH:  # no file would have to be larger for it
        raise ModelError(f"config.json describes a model of {config.num_hidden_layers} layers; at most {MAX_DEPTH}")
    if config.num_hidden_groups > config.num_hidden_layers:
        raise ModelError(
            f"config.json: num_hidden_groups = {config.num_hidden_groups} is more than num_hidden_layers = "
            f"{config.num_hidden_layers}, so that some of the groups are never computed"
        )
    hidden = ("hidden_dropout_prob", 0.0)
    rates = read_rates(raw, embedding=hidden, attention=("attention_probs_dropout_prob", 0.0), hidden=hidden)
    head = read_rates(raw, head=("classifier_dropout_prob", 0.1))["head"]
    heads = ("sequence-classification", "token-classification", "relation-classification", "multiple-choice")
    return replace(
        config,
        task_type_vocab_size=0,
        project_embeddings=True,
        drop_mlp_branch=False,
        rates=DropoutRates(**rates),
        head_rates=dict.fromkeys(heads, head),
    )


def _albert_head(config: BertConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    return bert_head_shape(config, name, head, pooling, pooler="tanh", lm_activation=config.hidden_act)


ALBERT = Architecture(
    read_config=_read_albert,
    build=lambda config, head: AlbertModel(config),
    head_shape=_albert_head,
    heads=transformers_classes("Albert"),
    depth=("num_hidden_layers",),
    weights=WeightTable(
        model_type="albert",
        prefix="albert.",
        rows=(
            *EMBEDDINGS,
            WeightRow("backbone.token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
            *linear_rows("backbone.embedding_projection", "encoder.embedding_hidden_mapping_in"),
            *linear_rows("backbone.layers.{i}.attention.query", f"{LAYER}.attention.query"),
            *linear_rows("backbone.layers.{i}.attention.key", f"{LAYER}.attention.key"),
            *linear_rows("backbone.layers.{i}.attention.value", f"{LAYER}.attention.value"),
            *linear_rows("backbone.layers.{i}.attention.output", f"{LAYER}.attention.dense"),
            *linear_rows("backbone.layers.{i}.attention_norm", f"{LAYER}.attention.LayerNorm"),
            *linear_rows("backbone.layers.{i}.mlp.up", f"{LAYER}.ffn"),
            *linear_rows("backbone.layers.{i}.mlp.down", f"{LAYER}.ffn_output"),
            *linear_rows("backbone.layers.{i}.mlp_norm", f"{LAYER}.full_layer_layer_norm"),
        ),
        heads=HEAD_ROWS
        | {
            **dict.fromkeys(
                ("sequence-classification", "multiple-choice"),
                (*linear_rows("head.dense", "pooler", "pooler"), *CLASSIFIER),
            ),
            "masked-lm": (
                *linear_rows("head.dense", "predictions.dense", "head"),
                *linear_rows("head.norm", "predictions.LayerNorm", "head"),
                WeightRow("head.decoder.weight", "predictions.decoder.weight", "head"),
                WeightRow("head.decoder.bias", "predictions.bias", "head", untied="predictions.decoder.bias"),
            ),
        },
        tied={
            "predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        },
        ignored=(r"embeddings\.(position_ids|token_type_ids)", r"sop_classifier\..*"),
    ),
)
