"""GPT-2 (Radford et al. 2019): a decoder-only transformer, pre-LayerNorm.

The text is packed, so a micro-batch is (T, D) from the embeddings to the last layer. With a cache
(models/generation/cache.py) the model continues after the tokens that it has read. Shapes: models/ops/packing.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from models.architecture import Architecture, check_divides, read_fields, read_rates, with_own_names
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.generation.cache import Cache
from models.heads import Head, HeadShape
from models.inputs import ModelInputs, Reads, packing_of, packing_to_read, require
from models.ops.attention import packed_attention
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, MLP, NO_DROPOUT, DropoutRates, drop_path, init_normal, upcast
from models.ops.packing import Packing, Selection


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a config.json that change the mathematics, under our names (NAMES has GPT-2's)."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 0  # 0: four times hidden_size
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True  # scores times 1 / sqrt(K)
    scale_attn_by_inverse_layer_idx: bool = False  # scores times 1 / (layer + 1)
    reorder_and_upcast_attn: bool = False  # attention in fp32, independent of the precision of the model
    rates: DropoutRates = NO_DROPOUT
    head_rates: Mapping[str, float] = field(default_factory=dict)  # head -> dropout before its output

    def __post_init__(self) -> None:
        check_divides("n_embd", self.hidden_size, "n_head", self.num_attention_heads)


class Attention(nn.Module):
    """Causal self-attention; query, key and value are one product (as in the file: `c_attn`)."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.rates.attention
        self.layer = layer
        self.scale = (width // self.num_heads) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.in_fp32 = config.reorder_and_upcast_attn
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing, cache: Cache | None) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (T, H, K) each
        if not self.in_fp32:
            out: Tensor = self.output(self.attend(q, k, v, packing, cache))
            return out
        with torch.autocast(x.device.type, enabled=False):
            attended = self.attend(upcast(q), upcast(k), upcast(v), packing, cache)
        out = self.output(attended.to(q.dtype))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, cache: Cache | None) -> Tensor:
        """(T, H, K) each -> (T, D), or with a Selection (R, D)"""
        if cache is None:
            attend = partial(packed_attention, scale=self.scale, dropout=self.dropout if self.training else 0.0)
            if isinstance(packing, Selection) and packing.are_last:
                return attend(packing.take(q), k, v, packing, key_packing=packing.whole)
            return packing.take(attend(q, k, v, packing.whole, causal=True))
        cache.append(self.layer, k, v)
        return cache.attend(self.layer, q, packing, scale=self.scale)


class GPT2Layer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x)), with dropout on both branches."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size or 4 * config.hidden_size, config.hidden_act)
        self.dropout = Dropout(config.rates.hidden)
        self.drop_path_rate = config.rates.layer_drop_path_rate(layer, config.num_hidden_layers)

    def forward(self, x: Tensor, packing: Packing, cache: Cache | None) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D)"""
        rate = self.drop_path_rate if self.training else 0.0
        attended = self.dropout(self.attention(self.attention_norm(x), packing, cache))
        x = packing.take(x) + drop_path(attended, packing, rate)
        return x + drop_path(self.dropout(self.mlp(self.mlp_norm(x))), packing, rate)


class GPT2Model(nn.Module):
    """Embeddings, layers and the last LayerNorm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = Dropout(config.rates.embedding)
        self.layers = nn.ModuleList(GPT2Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""
        return self.config.max_position_embeddings

    @property
    def embedding(self) -> nn.Embedding:
        """The matrix that a causal-LM head is tied to."""
        return self.word_embeddings

    def forward(
        self, inputs: ModelInputs, cache: Cache | None = None, reads: Reads | None = None
    ) -> tuple[Tensor, Packing]:
        """Return the last hidden states, (T, D), and their packing; of the tokens that `reads` selects, (R, D).

        inputs.input_ids: (T,); with a cache, only the new tokens.
        """
        packing = packing_of(inputs)
        positions = packing.positions if cache is None else cache.extend(packing)
        words = self.word_embeddings(require(inputs.input_ids, "input_ids"))
        x = self.dropout(words + self.position_embeddings(positions))
        to_read = packing_to_read(packing, inputs, reads)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, packing, cache)
        return self.norm(last(x, to_read, cache)), to_read

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights from Normal(0, initializer_range), set biases to 0 and LayerNorms to identity.

        It initialises the whole model, or only `modules`. The residual stream should not grow with depth, so the
        matrices whose products are added to it are scaled by 1 / sqrt(2 layers) (Radford et al. 2019, 2.3).
        """
        std, depth = self.config.initializer_range, self.config.num_hidden_layers
        for module in modules or [self]:
            init_normal(module, std, generator)
            for layer in module.modules():
                if isinstance(layer, GPT2Layer):
                    for last in (layer.attention.output, layer.mlp.down):
                        last.weight.normal_(0.0, std / math.sqrt(2 * depth), generator=generator)


NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
SUPPORTED = {
    "activation_function": tuple(ACTIVATIONS),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}


def _read_config(raw: JsonObject) -> GPT2Config:
    config = read_fields(GPT2Config, raw, NAMES, supported=SUPPORTED)
    rates = read_rates(raw, embedding=("embd_pdrop", 0.1), attention=("attn_pdrop", 0.1), hidden=("resid_pdrop", 0.1))
    token = read_rates(
        raw, token=("hidden_dropout", 0.1) if raw.get("classifier_dropout") is None else ("classifier_dropout", 0.1)
    )
    # In the published code only the token classifier has dropout.
    return replace(config, rates=DropoutRates(**rates), head_rates={"token-classification": token["token"]})


def _head_shape(config: GPT2Config, name: str, head: type[Head], pooling: str) -> HeadShape:
    shape = HeadShape(config.hidden_size, dropout=config.head_rates.get(name, 0.0))
    if head.is_language_model:
        return replace(shape, vocab_size=config.vocab_size, bias=False)
    return replace(shape, bias=not head.reads_pooled)


GPT2 = Architecture(
    read_config=_read_config,
    build=lambda config, head: GPT2Model(config),
    head_shape=_head_shape,
    heads={
        None: "GPT2Model",
        "causal-lm": "GPT2LMHeadModel",
        "sequence-classification": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
        "question-answering": "GPT2ForQuestionAnswering",
    },
    depth=("n_layer",),
    complete=lambda raw: with_own_names(raw, NAMES),
    pooling="last",
    weights=WeightTable(
        model_type="gpt2",
        prefix="transformer.",
        rows=(
            WeightRow("backbone.word_embeddings.weight", "wte.weight"),
            WeightRow("backbone.position_embeddings.weight", "wpe.weight"),
            *linear_rows("backbone.layers.{i}.attention_norm", "h.{i}.ln_1"),
            *linear_rows("backbone.layers.{i}.attention.qkv", "h.{i}.attn.c_attn", transpose=True),
            *linear_rows("backbone.layers.{i}.attention.output", "h.{i}.attn.c_proj", transpose=True),
            *linear_rows("backbone.layers.{i}.mlp_norm", "h.{i}.ln_2"),
            *linear_rows("backbone.layers.{i}.mlp.up", "h.{i}.mlp.c_fc", transpose=True),
            *linear_rows("backbone.layers.{i}.mlp.down", "h.{i}.mlp.c_proj", transpose=True),
            *linear_rows("backbone.norm", "ln_f"),
        ),
        heads={
            "causal-lm": (WeightRow("head.decoder.weight", "lm_head.weight", "head"),),
            "sequence-classification": (WeightRow("head.classifier.weight", "score.weight", "head"),),
            "token-classification": linear_rows("head.classifier", "classifier", "head"),
            "question-answering": linear_rows("head.span", "qa_outputs", "head"),
        },
        tied={"lm_head.weight": "wte.weight"},
        # The causal mask, saved by old versions, and the second head of a GPT2DoubleHeadsModel.
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"multiple_choice_head\.summary\.(weight|bias)"),
    ),
)
