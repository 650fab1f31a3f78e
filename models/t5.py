"""T5 (Raffel et al. 2020), T5 v1.1 / Flan-T5 and mT5: an encoder-decoder, pre-norm, without biases.

Both stacks read packed text, each with its Packing: the encoder the source, T tokens, the decoder the target, U tokens.
Without a decoder the model is an encoder like BERT. Shapes: models/ops/packing.py. Other than in BERT and GPT-2:
- Attention scores are not divided by sqrt(K); the initialisation of the query compensates for it.
- Positions enter only as a learned bias on the scores, one per head and distance, shared by all layers of a stack.
- The norm has neither mean nor bias (RMSNorm, Zhang & Sennrich 2019); its variance is computed in fp32 or wider.
- v1.0 ties the output matrix to the embedding and scales its input by D^-0.5; v1.1 and mT5 have a separate matrix.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.architecture import Architecture, read_fields, read_rates, with_own_names
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.generation.cache import Cache
from models.heads import Head, HeadShape
from models.inputs import ModelInputs, Reads, packing_of, packing_of_decoder, packing_to_read, require
from models.ops.attention import Bias, packed_attention
from models.ops.dropout import Dropout
from models.ops.feed_forward import FeedForward
from models.ops.joint_linear import joint_linear
from models.ops.layers import ACTIVATIONS, NO_DROPOUT, DropoutRates, drop_path, outside_fp16
from models.ops.packing import Packing, pad_sequences
from models.ops.relative_bias import RelativeBias

Source = tuple[Tensor, Packing]  # the hidden states that keys and values are computed from, and their packing


@dataclass(frozen=True)
class T5Config:
    """The fields of a config.json that change the mathematics, under our names (NAMES has T5's)."""

    vocab_size: int = 32128
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_decoder_layers: int = 6
    num_attention_heads: int = 8
    head_size: int = 64  # K, independent of hidden_size / num_attention_heads
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    is_gated_act: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 1.0
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    decoder_start_token_id: int = 0  # the decoder's first input
    classifier_dropout: float = 0.0
    rates: DropoutRates = NO_DROPOUT

    def __post_init__(self) -> None:
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or farthest <= buckets // 2:
            raise ModelError(
                f"config.json: relative_attention_num_buckets = {buckets} and relative_attention_max_distance = "
                f"{farthest}: there must be at least 4 buckets, and more distances than half of them"
            )

    @property
    def initializer_range(self) -> float:
        """The standard deviation of a new head, its output matrix included, as in T5's code (transformers has 1)."""
        return float(self.initializer_factor * self.hidden_size**-0.5)


class Attention(nn.Module):
    """Multi-head attention to the same tokens or, in cross-attention, to the encoder's."""

    def __init__(self, config: T5Config, layer: int, cross: bool = False):
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * config.head_size
        self.layer, self.cross = layer, cross
        self.num_heads = config.num_attention_heads
        self.dropout = config.rates.attention
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, packing: Packing, source: Source | None, bias: Bias | None, cache: Cache | None
    ) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D).

        source: in cross-attention, where the cache does not have its keys yet.
        """
        hidden, key_packing = source or (x, packing.whole)
        if cache is None:
            query, key, value = self.project(x, hidden)
            attend = functools.partial(packed_attention, scale=1.0, dropout=self.dropout if self.training else 0.0)
            attended = attend(query, key, value, packing.whole, key_packing=key_packing, bias=bias)
        else:
            is_cached = self.cross and source is None
            query, *new = self.project(x, None if is_cached else hidden)
            if new:
                cache.append(self.layer, *new)
            table = bias if isinstance(bias, Tensor) else None
            attended = cache.attend(self.layer, query, packing, bias=table, scale=1.0)
        return outside_fp16(self.output, packing.take(attended))

    def project(self, x: Tensor, hidden: Tensor | None) -> list[Tensor]:
        """Return the queries of x, then the keys and the values of `hidden`, (T, H, K) each; only queries for None."""
        if hidden is None:
            projected = [self.query(x)]
        elif hidden is x:
            projected = joint_linear(x, (self.query, self.key, self.value))
        else:
            projected = [self.query(x), *joint_linear(hidden, (self.key, self.value))]
        return [torch.unflatten(y, -1, (self.num_heads, -1)) for y in projected]


class T5Layer(nn.Module):
    """x + attention(norm(x)), in a decoder x + cross_attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: T5Config, layer: int, depth: int, decoder: bool):
        super().__init__()
        norm = functools.partial(nn.RMSNorm, config.hidden_size, config.layer_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.cross_attention_norm = norm() if decoder else None
        self.cross_attention = Attention(config, layer, cross=True) if decoder else None
        self.mlp_norm = norm()
        self.mlp = FeedForward(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.is_gated_act, config.rates.hidden
        )
        self.dropout = Dropout(config.rates.hidden)
        self.drop_path_rate = config.rates.layer_drop_path_rate(layer, depth)

    def forward(self, x: Tensor, packing: Packing, bias: Bias, source: Source | None, cache: Cache | None) -> Tensor:
        """(T, D) -> (T, D), or in an encoder with a Selection (R, D).

        source: of a decoder without a cache, or whose cache does not have its keys yet.
        """

        def branch(x: Tensor) -> Tensor:
            return drop_path(self.dropout(x), packing, self.drop_path_rate if self.training else 0.0)

        x = packing.take(x) + branch(self.attention(self.attention_norm(x), packing, None, bias, cache))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            cross = cache.cross if cache is not None else None
            x = x + branch(self.cross_attention(self.cross_attention_norm(x), packing, source, None, cross))
        return x + branch(self.mlp(self.mlp_norm(x)))


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, the bias that they share, and the final norm."""

    def __init__(self, config: T5Config, depth: int, decoder: bool):
        super().__init__()
        self.embedding_dropout = Dropout(config.rates.embedding)
        buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.relative_bias = RelativeBias(config.num_attention_heads, buckets, farthest, causal=decoder)
        self.layers = nn.ModuleList(T5Layer(config, i, depth, decoder) for i in range(depth))
        self.norm = nn.RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.rates.hidden)

    def forward(self, x: Tensor, packing: Packing, source: Source | None = None, cache: Cache | None = None) -> Tensor:
        """(T, D) embeddings -> (T, D) hidden states, or in an encoder with a Selection (R, D)"""
        if cache is None:
            bias = self.relative_bias.for_packing(packing.whole)
        else:
            bias = self.relative_bias.for_positions(pad_sequences(cache.extend(packing), packing, 0), cache.longest)
        x = self.embedding_dropout(x)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, packing.whole, bias, source, cache)
        out: Tensor = self.dropout(self.norm(last(x, packing, bias, source, cache)))
        return out


class T5Model(nn.Module):
    """An encoder and, for sequence-to-sequence, a decoder, which share one embedding."""

    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, config.num_hidden_layers, decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, decoder=True) if decoder else None

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence: unlimited, since there are no absolute positions."""
        return sys.maxsize

    @property
    def embedding(self) -> nn.Embedding:
        """The matrix that a language-model head is tied to."""
        return self.word_embeddings

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the encoder, then those of the decoder."""
        return [*self.encoder.layers, *(self.decoder.layers if self.decoder is not None else ())]

    def forward(
        self, inputs: ModelInputs, cache: Cache | None = None, reads: Reads | None = None
    ) -> tuple[Tensor, Packing]:
        """Return the last hidden states and their packing: (U, D) of the decoder, else (T, D) of the encoder.

        An encoder computes those of the tokens that `reads` selects, (R, D); a decoder always those of all tokens.
        inputs.input_ids: (T,). inputs.decoder_input_ids: (U,), the target shifted right. With a cache, the encoder runs
        in the first call only, and decoder_input_ids are the new tokens (models/generation/cache.py).
        """
        if self.decoder is None:
            return self.encode(inputs, reads)
        source = self.encode(inputs) if cache is None or cache.cross is None else None
        if source is not None and cache is not None:
            cache.cross = Cache(causal=False)
            cache.cross.extend(source[1])
        packing = packing_of_decoder(inputs)
        words = self.word_embeddings(require(inputs.decoder_input_ids, "decoder_input_ids"))
        return self.decoder(words, packing, source, cache), packing

    def encode(self, inputs: ModelInputs, reads: Reads | None = None) -> Source:
        """Return the hidden states of the encoder, (T, D) or (R, D), and their packing."""
        packing = packing_to_read(packing_of(inputs), inputs, reads)
        return self.encoder(self.word_embeddings(require(inputs.input_ids, "input_ids")), packing), packing

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights from normal distributions that keep the output of each product at unit variance.

        The standard deviations are multiplied by initializer_factor. The query's is divided by sqrt(K), which replaces
        the scale of the scores. It initialises the whole model, or only `modules`.
        """
        config = self.config
        width = config.hidden_size**-0.5
        inner = (config.num_attention_heads * config.head_size) ** -0.5
        for module in [child for chosen in modules or [self] for child in chosen.modules()]:
            stds: dict[str, float] = {}
            if isinstance(module, Attention):
                stds = {"query": width * config.head_size**-0.5, "key": width, "value": width, "output": inner}
            elif isinstance(module, FeedForward):
                stds = {"gate": width, "linear": width} if module.gated else {"up": width}
                stds["down"] = config.intermediate_size**-0.5
            elif isinstance(module, RelativeBias):
                stds = {"embedding": width}
            elif isinstance(module, T5Model):
                stds = {"word_embeddings": 1.0}
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(config.initializer_factor)
            for name, std in stds.items():
                getattr(module, name).weight.normal_(0.0, config.initializer_factor * std, generator=generator)


NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_size": "d_kv",
    "intermediate_size": "d_ff",
    "hidden_act": "dense_act_fn",
    "layer_norm_eps": "layer_norm_epsilon",
}
SUPPORTED = {"dense_act_fn": tuple(ACTIVATIONS), "is_decoder": (False,)}


def _complete(raw: JsonObject, feed_forward: str, scaled: bool) -> JsonObject:
    """Return config.json with the fields that follow from others, which only newer files contain.

    feed_forward: the default of feed_forward_proj. scaled: whether the input of a tied output matrix is scaled.
    """
    raw = with_own_names(raw, NAMES)
    kind = raw.get("feed_forward_proj") or feed_forward
    *gated, activation = str(kind).split("-")
    if gated not in ([], ["gated"]):
        raise ModelError(f"config.json: feed_forward_proj = {kind!r} should be like 'relu' or 'gated-gelu'")
    implied = {
        "dense_act_fn": "gelu_new" if kind == "gated-gelu" else activation,
        "is_gated_act": bool(gated),
        "scale_decoder_outputs": scaled and raw.get("tie_word_embeddings") is not False,
        "num_decoder_layers": raw.get("num_layers"),
        "decoder_start_token_id": raw.get("pad_token_id"),
    }
    given = {name: value for name, value in raw.items() if value is not None or name not in implied}
    return implied | given | ({} if scaled else {"scale_decoder_outputs": False})


def _read_config(raw: JsonObject) -> T5Config:
    config = read_fields(T5Config, raw, NAMES, supported=SUPPORTED)
    dropout = ("dropout_rate", 0.1)
    rates = read_rates(raw, embedding=dropout, attention=dropout, hidden=dropout)
    head = read_rates(raw, head=("classifier_dropout", 0.0))["head"]
    return replace(config, rates=DropoutRates(**rates), classifier_dropout=head)


def _head_shape(config: T5Config, name: str, head: type[Head], pooling: str) -> HeadShape:
    if not head.is_language_model:
        return HeadShape(config.hidden_size, dropout=config.classifier_dropout)
    scale = config.hidden_size**-0.5 if config.scale_decoder_outputs else 1.0
    return HeadShape(config.hidden_size, vocab_size=config.vocab_size, bias=False, scale=scale)


def _stack_rows(ours: str, theirs: str, group: str, mlp: int) -> tuple[WeightRow, ...]:
    """Return the rows of a stack; `mlp` is the number of the feed-forward part within a block of the file."""

    def projections(ours: str, theirs: str) -> dict[str, str]:
        return {f"{ours}.{a}": f"{theirs}.{a[0]}" for a in ("query", "key", "value", "output")}

    names = {
        "attention_norm": "0.layer_norm",
        **projections("attention", "0.SelfAttention"),
        "mlp_norm": f"{mlp}.layer_norm",
        "mlp.up": f"{mlp}.DenseReluDense.wi",
        "mlp.gate": f"{mlp}.DenseReluDense.wi_0",
        "mlp.linear": f"{mlp}.DenseReluDense.wi_1",
        "mlp.down": f"{mlp}.DenseReluDense.wo",
    }
    if group == "decoder":
        names |= {"cross_attention_norm": "1.layer_norm", **projections("cross_attention", "1.EncDecAttention")}
    return (
        *(
            WeightRow(f"{ours}.layers.{{i}}.{a}.weight", f"{theirs}.block.{{i}}.layer.{b}.weight", group)
            for a, b in names.items()
        ),
        WeightRow(
            f"{ours}.relative_bias.embedding.weight",
            f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            group,
        ),
        WeightRow(f"{ours}.norm.weight", f"{theirs}.final_layer_norm.weight", group),
    )


T5 = Architecture(
    complete=functools.partial(_complete, feed_forward="relu", scaled=True),
    read_config=_read_config,
    build=lambda config, head: T5Model(config, decoder=head is not None and head.needs_decoder),
    head_shape=_head_shape,
    # Of some heads transformers has no class, or only one with a decoder; T5EncoderModel reads their encoder.
    heads={
        None: "T5EncoderModel",
        "seq2seq-lm": "T5ForConditionalGeneration",
        "token-classification": "T5ForTokenClassification",
        "sequence-classification": "T5EncoderModel",
        "relation-classification": "T5EncoderModel",
        "question-answering": "T5EncoderModel",
    },
    depth=("num_layers", "num_decoder_layers"),
    pooling="mean",
    weights=WeightTable(
        model_type="t5",
        prefix="transformer.",
        prefixed=("token-classification",),
        rows=(
            WeightRow("backbone.word_embeddings.weight", "shared.weight"),
            *_stack_rows("backbone.encoder", "encoder", "backbone", mlp=1),
            *_stack_rows("backbone.decoder", "decoder", "decoder", mlp=2),
        ),
        heads={
            "seq2seq-lm": (WeightRow("head.decoder.weight", "lm_head.weight", "head"),),
            "token-classification": linear_rows("head.classifier", "classifier", "head"),
            "sequence-classification": linear_rows("head.classifier", "sequence_classifier", "head"),
            "relation-classification": linear_rows("head.classifier", "relation_classifier", "head"),
            "question-answering": linear_rows("head.span", "span_classifier", "head"),
        },
        tied={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        },
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),  # never used
        # They read the decoder; those of the same name here read the encoder.
        foreign_heads={
            "sequence-classification": r"classification_head\.(dense|out_proj)\.(weight|bias)",
            "question-answering": r"qa_outputs\.(weight|bias)",
        },
    ),
)

# mT5 is T5 v1.1 with another vocabulary; its output is never scaled, tied or not.
MT5 = replace(
    T5,
    complete=functools.partial(_complete, feed_forward="gated-gelu", scaled=False),
    heads={head: f"M{name}" for head, name in T5.heads.items()},
    weights=replace(T5.weights, model_type="mt5"),
)
