"""DeBERTa-v2 and -v3 (He et al. 2021 and 2023): an encoder with disentangled attention, post-LayerNorm.

Both have one model_type. v3 and its multilingual models differ in their training only; the two large v2 models also
have a convolution over neighbouring tokens beside the first layer.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from models.architecture import Architecture, check_divides, read_fields, read_rates
from models.bert import CLASSIFIER, HEAD_ROWS, LEGACY, MASKED_LM, TIED, transformers_classes
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape, MultipleChoice
from models.inputs import ModelInputs, Reads, packing_of, packing_to_read, require
from models.ops.attention import to_packed, to_padded
from models.ops.disentangled import DisentangledAttention, Distances
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, MLP, NO_DROPOUT, DropoutRates, drop_path, init_normal
from models.ops.packing import Packing

KINDS = ("c2p", "p2c")


@dataclass(frozen=True)
class DebertaConfig:
    """The fields of a config.json that change the mathematics, under DeBERTa's names."""

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 0  # 0: no token types
    layer_norm_eps: float = 1e-7
    initializer_range: float = 0.02
    position_biased_input: bool = True  # absolute positions are added to the input
    position_buckets: int = 0  # of distances, for each sign; 0: each distance has its own
    max_relative_positions: int = 0  # 0: max_position_embeddings
    share_att_key: bool = False
    conv_kernel_size: int = 0  # 0: no convolution
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_hidden_act: str = "gelu"
    kinds: tuple[str, ...] = KINDS  # pos_att_type
    norm_positions: bool = False  # norm_rel_ebd
    rates: DropoutRates = NO_DROPOUT
    head_rates: Mapping[str, float] = field(default_factory=dict)  # head -> dropout before its output

    def __post_init__(self) -> None:
        check_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        check_divides("hidden_size", self.hidden_size, "conv_groups", self.conv_groups)

    @property
    def distances(self) -> Distances:
        """The buckets of relative positions."""
        longest = self.max_relative_positions or self.max_position_embeddings
        return Distances(self.position_buckets or longest, longest, logarithmic=self.position_buckets > 0)


class DebertaLayer(nn.Module):
    """x -> LN(x + attention(x)) -> LN(x + mlp(x)), with dropout on both branches."""

    def __init__(self, config: DebertaConfig, drop_path_rate: float):
        super().__init__()
        width, rates = config.hidden_size, config.rates
        heads, distances, shared = config.num_attention_heads, config.distances, config.share_att_key
        self.attention = DisentangledAttention(
            width, heads, distances, config.kinds, shared, rates.attention, position_dropout=rates.hidden
        )
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = Dropout(rates.hidden)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, packing: Packing, positions: Tensor) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D). positions: the embeddings of the buckets, for each sign."""
        rate = self.drop_path_rate if self.training else 0.0
        attended = self.dropout(self.attention(x, packing, positions))
        x = self.attention_norm(packing.take(x) + drop_path(attended, packing, rate))
        out: Tensor = self.mlp_norm(x + drop_path(self.dropout(self.mlp(x)), packing, rate))
        return out


class Convolution(nn.Module):
    """LN(y + activation(conv(x))), over the tokens of each sequence, with zeros beyond its ends."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        width, size = config.hidden_size, config.conv_kernel_size
        self.conv = nn.Conv1d(width, width, size, padding=(size - 1) // 2, groups=config.conv_groups)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = Dropout(config.rates.hidden)
        self.activation = ACTIVATIONS[config.conv_act]

    def forward(self, x: Tensor, y: Tensor, packing: Packing) -> Tensor:
        """Return (T, D). x: the input of the first layer, (T, D). y: its output, (T, D)."""
        if x.shape[0]:
            padded = to_padded(x, packing) * packing.is_token.unsqueeze(-1).to(x.dtype)  # (B, L, D)
            mixed = to_packed(self.conv(padded.mT).mT.flatten(0, 1), packing)
        else:  # the parameters stay in the graph
            mixed = x + sum(parameter.sum() for parameter in self.conv.parameters())
        out: Tensor = self.norm(y + self.activation(self.dropout(mixed)))
        return out


class DebertaModel(nn.Module):
    """The encoder without its pooler, which belongs to the head that reads it."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.config = config
        depth, width, eps = config.num_hidden_layers, config.hidden_size, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, width) if config.position_biased_input else None
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.embedding_norm = nn.LayerNorm(width, eps)
        self.dropout = Dropout(config.rates.embedding)
        self.relative_embeddings = nn.Embedding(2 * config.distances.size, width)
        self.relative_embedding_norm = nn.LayerNorm(width, eps) if config.norm_positions else None
        self.layers = nn.ModuleList(
            DebertaLayer(config, config.rates.layer_drop_path_rate(i, depth)) for i in range(depth)
        )
        self.convolution = Convolution(config) if config.conv_kernel_size else None

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence: unlimited without absolute positions, as in v3."""
        return self.config.max_position_embeddings if self.position_embeddings is not None else sys.maxsize

    @property
    def embedding(self) -> nn.Embedding:
        """The matrix that a masked-LM head is tied to."""
        return self.word_embeddings

    def forward(self, inputs: ModelInputs, reads: Reads | None = None) -> tuple[Tensor, Packing]:
        """Return the last hidden states, (T, D), and their packing; of the tokens that `reads` selects, (R, D).

        inputs.input_ids, inputs.token_type_ids: (T,).
        """
        packing = packing_of(inputs)
        x = self.word_embeddings(require(inputs.input_ids, "input_ids"))
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(packing.positions)
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(require(inputs.token_type_ids, "token_type_ids"))
        x = embedded = self.dropout(self.embedding_norm(x))
        positions = self.relative_embeddings.weight
        if self.relative_embedding_norm is not None:
            positions = self.relative_embedding_norm(positions)
        first, *others = self.layers
        if self.convolution is not None:  # it reads the output of the first layer for all tokens
            x = self.convolution(embedded, first(x, packing, positions), packing)
        else:
            others = [first, *others]
        to_read = packing_to_read(packing, inputs, reads) if others else packing
        for layer in others[:-1]:
            x = layer(x, packing, positions)
        return (others[-1](x, to_read, positions) if others else x), to_read

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights from Normal(0, initializer_range), set biases to 0 and LayerNorms to identity, as published.

        It initialises the whole encoder, or only `modules`.
        """
        for module in modules or [self]:
            init_normal(module, self.config.initializer_range, generator)


def _read_deberta(raw: JsonObject) -> DebertaConfig:
    raw = {name: value for name, value in raw.items() if value is not None}
    hidden, heads = raw.get("hidden_size", DebertaConfig.hidden_size), raw.get("num_attention_heads")
    head_width = [hidden // heads] if type(hidden) is int and type(heads) is int and heads > 0 else []
    supported = {
        "hidden_act": tuple(ACTIVATIONS),
        "conv_act": tuple(ACTIVATIONS),
        "pooler_hidden_act": tuple(ACTIVATIONS),
        "relative_attention": (True,),
        "embedding_size": (hidden,),
        "pooler_hidden_size": (hidden,),
        "attention_head_size": head_width,
        "pooler_dropout": (0, 0.0),
    }
    kinds, norm = _words(raw, "pos_att_type", ""), _words(raw, "norm_rel_ebd", "none")
    if not kinds or {*kinds} - {*KINDS} or {*norm} - {"none", "layer_norm"}:
        raise ModelError(
            f"config.json: pos_att_type = {reprlib.repr(raw.get('pos_att_type'))} should be p2c, c2p or p2c|c2p, and "
            f"norm_rel_ebd = {reprlib.repr(raw.get('norm_rel_ebd', 'none'))} none or layer_norm"
        )
    unset = [name for name in UNSET if type(raw.get(name)) is int and raw[name] in UNSET[name]]
    left_out = (*unset, "kinds", "norm_positions")
    given = {"relative_attention": False} | {name: value for name, value in raw.items() if name not in left_out}
    config = read_fields(DebertaConfig, given, supported=supported)
    distances = config.distances
    if distances.logarithmic and not 0 < distances.size // 2 < distances.longest - 1:
        raise ModelError(
            f"config.json: position_buckets = {distances.size} should be from 2 to less than twice "
            f"max_relative_positions, {distances.longest}"
        )
    if config.conv_kernel_size and config.conv_kernel_size % 2 == 0:
        raise ModelError(f"config.json: conv_kernel_size = {config.conv_kernel_size} should be odd")
    dropout = ("hidden_dropout_prob", 0.1)
    rates = read_rates(raw, embedding=dropout, attention=("attention_probs_dropout_prob", 0.1), hidden=dropout)
    of_texts = read_rates(raw, head=("cls_dropout", rates["hidden"]))["head"]
    head_rates = {
        "sequence-classification": of_texts,
        "relation-classification": of_texts,
        "token-classification": rates["hidden"],
        "multiple-choice": of_texts,
    }
    kinds = [kind for kind in KINDS if kind in kinds]
    config = replace(config, kinds=tuple(kinds), norm_positions="layer_norm" in norm)
    return replace(config, rates=DropoutRates(**rates), head_rates=head_rates)


# Values that mean "not set"
UNSET = {"position_buckets": (-1, 0), "max_relative_positions": (-1, 0), "conv_kernel_size": (-1, 0)}


def _words(raw: JsonObject, name: str, default: str) -> list[str]:
    """Return the words of a field, a text like "p2c|c2p" or a list of texts."""
    value = raw.get(name, default)
    listed = value.lower().split("|") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        raise ModelError(f"config.json: {name} = {reprlib.repr(value)} should be a text or a list of texts")
    return [word.strip() for word in listed if word.strip()]


def _deberta_head(config: DebertaConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    shape = HeadShape(config.hidden_size, dropout=config.head_rates.get(name, 0.0))
    if head.is_language_model:
        eps = config.layer_norm_eps
        return replace(shape, vocab_size=config.vocab_size, dense=config.hidden_act, layer_norm_eps=eps)
    has_pooler = issubclass(head, MultipleChoice) or (head.reads_pooled and pooling == "cls")
    return replace(shape, dense=config.pooler_hidden_act) if has_pooler else shape


LAYER = "encoder.layer.{i}"
DEBERTA_V2 = Architecture(
    read_config=_read_deberta,
    build=lambda config, head: DebertaModel(config),
    head_shape=_deberta_head,
    heads=transformers_classes("DebertaV2"),
    depth=("num_hidden_layers",),
    complete=lambda raw: raw | {"legacy": True},  # the names of the masked-LM head that an export has
    weights=WeightTable(
        model_type="deberta-v2",
        prefix="deberta.",
        rows=(
            WeightRow("backbone.word_embeddings.weight", "embeddings.word_embeddings.weight"),
            WeightRow("backbone.position_embeddings.weight", "embeddings.position_embeddings.weight"),
            WeightRow("backbone.token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
            *linear_rows("backbone.embedding_norm", "embeddings.LayerNorm"),
            WeightRow("backbone.relative_embeddings.weight", "encoder.rel_embeddings.weight"),
            *linear_rows("backbone.relative_embedding_norm", "encoder.LayerNorm"),
            *linear_rows("backbone.convolution.conv", "encoder.conv.conv"),
            *linear_rows("backbone.convolution.norm", "encoder.conv.LayerNorm"),
            *linear_rows("backbone.layers.{i}.attention.query", f"{LAYER}.attention.self.query_proj"),
            *linear_rows("backbone.layers.{i}.attention.key", f"{LAYER}.attention.self.key_proj"),
            *linear_rows("backbone.layers.{i}.attention.value", f"{LAYER}.attention.self.value_proj"),
            *linear_rows("backbone.layers.{i}.attention.position_key", f"{LAYER}.attention.self.pos_key_proj"),
            *linear_rows("backbone.layers.{i}.attention.position_query", f"{LAYER}.attention.self.pos_query_proj"),
            *linear_rows("backbone.layers.{i}.attention.output", f"{LAYER}.attention.output.dense"),
            *linear_rows("backbone.layers.{i}.attention_norm", f"{LAYER}.attention.output.LayerNorm"),
            *linear_rows("backbone.layers.{i}.mlp.up", f"{LAYER}.intermediate.dense"),
            *linear_rows("backbone.layers.{i}.mlp.down", f"{LAYER}.output.dense"),
            *linear_rows("backbone.layers.{i}.mlp_norm", f"{LAYER}.output.LayerNorm"),
        ),
        heads=HEAD_ROWS
        | {
            **dict.fromkeys(
                ("sequence-classification", "multiple-choice"),
                (*linear_rows("head.dense", "pooler.dense", "head"), *CLASSIFIER),
            ),
            "masked-lm": MASKED_LM,
        },
        tied=TIED,
        # The names of the published files, which compute the same
        renamed=(
            *LEGACY,
            ("lm_predictions.lm_head.bias", "cls.predictions.bias"),
            *(
                (f"lm_predictions.lm_head.{part}.{kind}", f"cls.predictions.transform.{part}.{kind}")
                for part in ("dense", "LayerNorm")
                for kind in ("weight", "bias")
            ),
        ),
        ignored=(
            r"embeddings\.(position_ids|position_embeddings\.weight)",  # in files of v2 too, which does not add them
            r"mask_predictions\..*",
        ),
    ),
)
