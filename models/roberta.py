"""RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2020) and CamemBERT (Martin et al. 2020).

They are BERT's encoder with other positions and heads. XLM-RoBERTa and CamemBERT are RoBERTa with other tokenizers.
"""

from __future__ import annotations

from dataclasses import replace

from models.architecture import Architecture
from models.bert import (
    EMBEDDINGS_AND_LAYERS,
    HEAD_ROWS,
    LEGACY,
    POOLER_AND_CLASSIFIER,
    BertConfig,
    BertModel,
    bert_head_shape,
    read_bert,
    transformers_classes,
)
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow, WeightTable, linear_rows
from models.heads import Head, HeadShape

# A classifier whose dense layer is its own, not the encoder's pooler
CLASSIFIER_WITH_DENSE = (
    *linear_rows("head.dense", "classifier.dense", "head"),
    *linear_rows("head.classifier", "classifier.out_proj", "head"),
)


def _read_roberta(raw: JsonObject) -> BertConfig:
    pad = 1 if raw.get("pad_token_id") is None else raw["pad_token_id"]
    config = read_bert(raw | {"pad_token_id": pad})
    head_rates = {**config.head_rates, "multiple-choice": config.rates.hidden}
    return replace(config, first_position=config.pad_token_id + 1, head_rates=head_rates)


def _roberta_head(config: BertConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    return bert_head_shape(config, name, head, pooling, pooler="tanh", dropout_before_pooler=True, lm_activation="gelu")


ROBERTA = Architecture(
    read_config=_read_roberta,
    build=lambda config, head: BertModel(config),
    head_shape=_roberta_head,
    heads=transformers_classes("Roberta"),
    depth=("num_hidden_layers",),
    weights=WeightTable(
        model_type="roberta",
        prefix="roberta.",
        rows=EMBEDDINGS_AND_LAYERS,
        heads=HEAD_ROWS
        | {
            "sequence-classification": CLASSIFIER_WITH_DENSE,
            "multiple-choice": POOLER_AND_CLASSIFIER,
            "masked-lm": (
                *linear_rows("head.dense", "lm_head.dense", "head"),
                *linear_rows("head.norm", "lm_head.layer_norm", "head"),
                WeightRow("head.decoder.weight", "lm_head.decoder.weight", "head"),
                WeightRow("head.decoder.bias", "lm_head.bias", "head", untied="lm_head.decoder.bias"),
            ),
        },
        tied={
            "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        renamed=LEGACY,
        ignored=(
            r"embeddings\.(position_ids|token_type_ids)",
            r"pooler\.dense\.(weight|bias)",
        ),  # which no head of RoBERTa reads, but multiple choice
    ),
)
XLM_ROBERTA = replace(
    ROBERTA, heads=transformers_classes("XLMRoberta"), weights=replace(ROBERTA.weights, model_type="xlm-roberta")
)
CAMEMBERT = replace(
    ROBERTA, heads=transformers_classes("Camembert"), weights=replace(ROBERTA.weights, model_type="camembert")
)
