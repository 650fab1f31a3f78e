"""BERT (Devlin et al. 2018) and DistilBERT (Sanh et al. 2019): one encoder, post-LayerNorm.

RoBERTa (roberta.py), ERNIE (ernie.py), ELECTRA (electra.py) and ALBERT (albert.py) have the same encoder. They differ
in the first position, in token types, in the width of the embeddings, in the layers before a classifier's output, and
in the names in their files. So each has a function that reads its config.json, and a table of weights. The text is
packed, so a micro-batch is (T, D) from the embeddings to the last layer. Shapes: models/ops/packing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from models.architecture import Architecture, check_divides, read_fields, read_rates, with_own_names
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape, MultipleChoice
from models.inputs import ModelInputs, Reads, packing_of, packing_to_read, require
from models.ops.attention import SelfAttention
from models.ops.dropout import Dropout
from models.ops.layers import ACTIVATIONS, MLP, NO_DROPOUT, DropoutRates, drop_path, init_normal
from models.ops.packing import Packing


@dataclass(frozen=True)
class BertConfig:
    """The fields of a config.json that change the mathematics, under BERT's names."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2  # 0: no token types
    task_type_vocab_size: int = 0  # ERNIE's task types, of which every token has the first; 0: none
    embedding_size: int = 0  # the width of the embeddings; 0: hidden_size
    project_embeddings: bool = False  # a linear layer from the embeddings to the first layer
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    first_position: int = 0  # RoBERTa's first token is at pad_token_id + 1
    sinusoidal: bool = False  # DistilBERT: new position embeddings are sines and cosines
    drop_attention_branch: bool = True  # False in DistilBERT: no dropout on the attention branch
    drop_mlp_branch: bool = True  # False in ALBERT
    num_hidden_groups: int = 0  # ALBERT's number of layers with weights of their own; 0: all
    rates: DropoutRates = NO_DROPOUT
    head_rates: Mapping[str, float] = field(default_factory=dict)  # head -> dropout before its output

    def __post_init__(self) -> None:
        check_divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @property
    def embedding_width(self) -> int:
        """The width of the embeddings."""
        return self.embedding_size or self.hidden_size


class BertLayer(nn.Module):
    """x -> LN(x + attention(x)) -> LN(x + mlp(x)), with dropout on both branches.

    DistilBERT has none on the first branch, ALBERT none on the second.
    """

    def __init__(self, config: BertConfig, drop_path_rate: float):
        super().__init__()
        self.attention = SelfAttention(config.hidden_size, config.num_attention_heads, config.rates.attention)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.rates.hidden)
        self.drop_attention_branch, self.drop_mlp_branch = config.drop_attention_branch, config.drop_mlp_branch
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, packing: Packing, drop_path_share: float = 1.0) -> Tensor:
        """(T, D) -> (T, D), or with a Selection (R, D). drop_path_share: factor of the drop-path rate."""
        rate = self.drop_path_rate * drop_path_share if self.training else 0.0
        attended = self.attention(x, packing)
        attended = self.dropout(attended) if self.drop_attention_branch else attended
        x = self.attention_norm(packing.take(x) + drop_path(attended, packing, rate))
        computed = self.mlp(x)
        computed = self.dropout(computed) if self.drop_mlp_branch else computed
        out: Tensor = self.mlp_norm(x + drop_path(computed, packing, rate))
        return out


class BertModel(nn.Module):
    """The encoder without its pooler, which belongs to the head that reads it."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.task_type_embeddings = (
            nn.Embedding(config.task_type_vocab_size, width) if config.task_type_vocab_size else None
        )
        self.embedding_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.embedding_projection = nn.Linear(width, config.hidden_size) if config.project_embeddings else None
        self.dropout = Dropout(config.rates.embedding)
        self.layers = self.build_layers()

    def build_layers(self) -> nn.ModuleList:
        """Return the layers from the input to the output."""
        config, depth = self.config, self.config.num_hidden_layers
        return nn.ModuleList(BertLayer(config, config.rates.layer_drop_path_rate(i, depth)) for i in range(depth))

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""
        return self.config.max_position_embeddings - self.config.first_position

    @property
    def embedding(self) -> nn.Embedding:
        """The matrix that a masked-LM head is tied to."""
        return self.word_embeddings

    def forward(self, inputs: ModelInputs, reads: Reads | None = None) -> tuple[Tensor, Packing]:
        """Return the last hidden states, (T, D), and their packing; of the tokens that `reads` selects, (R, D).

        inputs.input_ids, inputs.token_type_ids: (T,).
        """
        packing = packing_of(inputs)
        x = self.embed(inputs, packing)
        to_read = packing_to_read(packing, inputs, reads)
        *layers, last = self.computed_layers()
        for layer in layers:
            x = layer(x, packing)
        return last(x, to_read), to_read

    def computed_layers(self) -> Sequence[Callable[[Tensor, Packing], Tensor]]:
        """Return the layers in the order in which they are computed."""
        return [*self.layers]

    def embed(self, inputs: ModelInputs, packing: Packing) -> Tensor:
        """Return (T, D), the input of the first layer."""
        input_ids = require(inputs.input_ids, "input_ids")
        x = self.word_embeddings(input_ids)
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(require(inputs.token_type_ids, "token_type_ids"))
        x = x + self.position_embeddings(self.positions(input_ids, packing))
        if self.task_type_embeddings is not None:
            x = x + self.task_type_embeddings(torch.zeros_like(input_ids))
        x = self.dropout(self.embedding_norm(x))
        out: Tensor = x if self.embedding_projection is None else self.embedding_projection(x)
        return out

    def positions(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """Return (T,): the row of the position embeddings for each token.

        RoBERTa counts from pad_token_id + 1. A pad token *inside* a text (a literal <pad>) has the position
        pad_token_id and is not counted, as in the published code.
        """
        if not self.config.first_position:
            return packing.positions
        real = (input_ids != self.config.pad_token_id).long()
        return packing.running_sum(real) * real + self.config.pad_token_id

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, modules: Iterable[nn.Module] = ()) -> None:
        """Draw weights from Normal(0, initializer_range), set biases to 0 and LayerNorms to identity, as published.

        It initialises the whole encoder, or only `modules`.
        """
        for module in modules or [self]:
            init_normal(module, self.config.initializer_range, generator)
        if self.config.sinusoidal and not modules:
            self.position_embeddings.weight.copy_(sinusoids(*self.position_embeddings.weight.shape))


def sinusoids(positions: int, width: int) -> Tensor:
    """Return (positions, width) with sin in the even columns and cos in the odd ones (Vaswani et al. 2017, 3.5)."""
    columns = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (columns // 2) / width)
    return torch.where(columns.long() % 2 == 0, angles.sin(), angles.cos()).float()


# Shared by the architectures

SUPPORTED = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "hidden_act": tuple(ACTIVATIONS),
}
LEGACY = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))
EMBEDDINGS = (
    WeightRow("backbone.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    WeightRow("backbone.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    *linear_rows("backbone.embedding_norm", "embeddings.LayerNorm"),
)
# Shared by BERT, ERNIE, RoBERTa and ELECTRA
EMBEDDINGS_AND_LAYERS = (
    *EMBEDDINGS,
    WeightRow("backbone.token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
    *linear_rows("backbone.layers.{i}.attention.query", "encoder.layer.{i}.attention.self.query"),
    *linear_rows("backbone.layers.{i}.attention.key", "encoder.layer.{i}.attention.self.key"),
    *linear_rows("backbone.layers.{i}.attention.value", "encoder.layer.{i}.attention.self.value"),
    *linear_rows("backbone.layers.{i}.attention.output", "encoder.layer.{i}.attention.output.dense"),
    *linear_rows("backbone.layers.{i}.attention_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *linear_rows("backbone.layers.{i}.mlp.up", "encoder.layer.{i}.intermediate.dense"),
    *linear_rows("backbone.layers.{i}.mlp.down", "encoder.layer.{i}.output.dense"),
    *linear_rows("backbone.layers.{i}.mlp_norm", "encoder.layer.{i}.output.LayerNorm"),
)
CLASSIFIER = linear_rows("head.classifier", "classifier", "head")
# BERT's masked-LM head, shared with DeBERTa, and the second names of its tensors
MASKED_LM = (
    *linear_rows("head.dense", "cls.predictions.transform.dense", "head"),
    *linear_rows("head.norm", "cls.predictions.transform.LayerNorm", "head"),
    WeightRow("head.decoder.weight", "cls.predictions.decoder.weight", "head"),
    WeightRow("head.decoder.bias", "cls.predictions.bias", "head", untied="cls.predictions.decoder.bias"),
)
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
HEAD_ROWS = {
    "token-classification": CLASSIFIER,
    "relation-classification": linear_rows("head.classifier", "relation_classifier", "head"),
    "question-answering": linear_rows("head.span", "qa_outputs", "head"),
}
POOLER_AND_CLASSIFIER = (*linear_rows("head.dense", "pooler.dense", "pooler"), *CLASSIFIER)


def transformers_classes(name: str) -> dict[str | None, str]:
    """Return {head: class of transformers}. It has no relation classifier; its model class reads the encoder of one."""
    return {
        None: f"{name}Model",
        "sequence-classification": f"{name}ForSequenceClassification",
        "token-classification": f"{name}ForTokenClassification",
        "question-answering": f"{name}ForQuestionAnswering",
        "relation-classification": f"{name}Model",
        "multiple-choice": f"{name}ForMultipleChoice",
        "masked-lm": f"{name}ForMaskedLM",
    }


def bert_head_shape(
    config: BertConfig,
    name: str,
    head: type[Head],
    pooling: str,
    *,
    pooler: str,
    dropout_before_pooler: bool = False,
    lm_activation: str,
) -> HeadShape:
    """Return the shape of a head. pooler: the activation of the dense layer on the first token."""
    shape = HeadShape(config.hidden_size, dropout=config.head_rates.get(name, 0.0))
    if head.is_language_model:
        eps = config.layer_norm_eps
        width = config.embedding_width
        shape = replace(shape, vocab_size=config.vocab_size, embedding_size=width)
        return replace(shape, dense=lm_activation, layer_norm_eps=eps)
    if issubclass(head, MultipleChoice):
        return replace(shape, dense=pooler)
    if head.reads_pooled:
        dense = pooler if pooling == "cls" else ""
        return replace(shape, dense=dense, dropout_before_dense=dropout_before_pooler)
    return shape


# BERT


def read_encoder(raw: JsonObject) -> BertConfig:
    """Return the config of an encoder whose config.json has BERT's names."""
    config = read_fields(BertConfig, raw, supported=SUPPORTED)
    hidden = ("hidden_dropout_prob", 0.1)
    rates = read_rates(raw, embedding=hidden, attention=("attention_probs_dropout_prob", 0.1), hidden=hidden)
    head = read_rates(raw, head=("classifier_dropout", rates["hidden"]))["head"]
    heads = ("sequence-classification", "token-classification", "relation-classification", "multiple-choice")
    return replace(config, rates=DropoutRates(**rates), head_rates=dict.fromkeys(heads, head))


def read_bert(raw: JsonObject) -> BertConfig:
    """Return the same without the fields of other architectures, which a BERT's config.json may have to no effect."""
    if raw.get("use_task_id"):
        raise ModelError('config.json: use_task_id means task types, which only ERNIE has: its model_type is "ernie"')
    return replace(read_encoder(raw), embedding_size=0, task_type_vocab_size=0)


def _bert_head(config: BertConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    return bert_head_shape(config, name, head, pooling, pooler="tanh", lm_activation=config.hidden_act)


BERT = Architecture(
    read_config=read_bert,
    build=lambda config, head: BertModel(config),
    head_shape=_bert_head,
    heads=transformers_classes("Bert"),
    depth=("num_hidden_layers",),
    weights=WeightTable(
        model_type="bert",
        prefix="bert.",
        rows=EMBEDDINGS_AND_LAYERS,
        heads=HEAD_ROWS
        | {
            "sequence-classification": POOLER_AND_CLASSIFIER,
            "multiple-choice": POOLER_AND_CLASSIFIER,
            "masked-lm": MASKED_LM,
        },
        tied=TIED,
        renamed=LEGACY,
        ignored=(r"embeddings\.(position_ids|token_type_ids)", r"cls\.seq_relationship\..*"),
    ),
)


# DistilBERT


DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "sinusoidal": "sinusoidal_pos_embds",
}


def _read_distilbert(raw: JsonObject) -> BertConfig:
    config = read_fields(BertConfig, raw, DISTILBERT_NAMES, supported={"activation": tuple(ACTIVATIONS)})
    dropout = ("dropout", 0.1)
    rates = read_rates(raw, embedding=dropout, attention=("attention_dropout", 0.1), hidden=dropout)
    heads = read_rates(raw, sequence=("seq_classif_dropout", 0.2), span=("qa_dropout", 0.1), token=dropout)
    head_rates = {
        "sequence-classification": heads["sequence"],
        "relation-classification": heads["sequence"],
        "multiple-choice": heads["sequence"],
        "question-answering": heads["span"],
        "token-classification": heads["token"],
    }
    config = replace(config, type_vocab_size=0, embedding_size=0, task_type_vocab_size=0)
    config = replace(config, layer_norm_eps=1e-12, drop_attention_branch=False)
    return replace(config, rates=DropoutRates(**rates), head_rates=head_rates)


def _distilbert_head(config: BertConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    return bert_head_shape(config, name, head, pooling, pooler="relu", lm_activation=config.hidden_act)


DISTILBERT = Architecture(
    read_config=_read_distilbert,
    build=lambda config, head: BertModel(config),
    head_shape=_distilbert_head,
    heads=transformers_classes("DistilBert"),
    depth=("n_layers",),
    complete=lambda raw: with_own_names(raw, DISTILBERT_NAMES),
    weights=WeightTable(
        model_type="distilbert",
        prefix="distilbert.",
        rows=(
            *EMBEDDINGS,
            *linear_rows("backbone.layers.{i}.attention.query", "transformer.layer.{i}.attention.q_lin"),
            *linear_rows("backbone.layers.{i}.attention.key", "transformer.layer.{i}.attention.k_lin"),
            *linear_rows("backbone.layers.{i}.attention.value", "transformer.layer.{i}.attention.v_lin"),
            *linear_rows("backbone.layers.{i}.attention.output", "transformer.layer.{i}.attention.out_lin"),
            *linear_rows("backbone.layers.{i}.attention_norm", "transformer.layer.{i}.sa_layer_norm"),
            *linear_rows("backbone.layers.{i}.mlp.up", "transformer.layer.{i}.ffn.lin1"),
            *linear_rows("backbone.layers.{i}.mlp.down", "transformer.layer.{i}.ffn.lin2"),
            *linear_rows("backbone.layers.{i}.mlp_norm", "transformer.layer.{i}.output_layer_norm"),
        ),
        heads=HEAD_ROWS
        | {
            **dict.fromkeys(
                ("sequence-classification", "multiple-choice"),
                (*linear_rows("head.dense", "pre_classifier", "head"), *CLASSIFIER),
            ),
            "masked-lm": (
                *linear_rows("head.dense", "vocab_transform", "head"),
                *linear_rows("head.norm", "vocab_layer_norm", "head"),
                WeightRow("head.decoder.weight", "vocab_projector.weight", "head"),
                WeightRow("head.decoder.bias", "vocab_projector.bias", "head"),
            ),
        },
        tied={"vocab_projector.weight": "embeddings.word_embeddings.weight"},
        renamed=LEGACY,
        ignored=(r"embeddings\.(position_ids|token_type_ids)",),
    ),
)
