"""ELECTRA (Clark et al. 2020): BERT's encoder, with embeddings that may be narrower than the layers.

The published discriminators are what is fine-tuned; a generator also has the head of a masked language model.
"""

from __future__ import annotations

import reprlib
from dataclasses import replace

from models.architecture import Architecture, read_rates
from models.bert import (
    CLASSIFIER,
    EMBEDDINGS_AND_LAYERS,
    HEAD_ROWS,
    LEGACY,
    BertConfig,
    BertModel,
    bert_head_shape,
    read_encoder,
    transformers_classes,
)
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightTable, linear_rows
from models.errors import ModelError
from models.heads import Head, HeadShape
from models.roberta import CLASSIFIER_WITH_DENSE

# Of transformers; they are BERT's where they are not here.
DEFAULTS = {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}

# How the head of multiple choice reads a sequence, as in all published models
SUMMARY = {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}


def _read_electra(raw: JsonObject) -> BertConfig:
    config = read_encoder(DEFAULTS | {name: value for name, value in raw.items() if value is not None})
    different = config.embedding_size != config.hidden_size
    for name, supported in SUMMARY.items():
        if raw.get(name, supported) != supported:
            raise ModelError(f"config.json: {name} = {reprlib.repr(raw[name])} is not supported, only {supported!r}")
    summary = read_rates(raw, multiple_choice=("summary_last_dropout", 0.1))["multiple_choice"]
    head_rates = {**config.head_rates, "multiple-choice": summary}
    return replace(config, task_type_vocab_size=0, project_embeddings=different, head_rates=head_rates)


def _electra_head(config: BertConfig, name: str, head: type[Head], pooling: str) -> HeadShape:
    return bert_head_shape(config, name, head, pooling, pooler="gelu", dropout_before_pooler=True, lm_activation="gelu")


ELECTRA = Architecture(
    read_config=_read_electra,
    build=lambda config, head: BertModel(config),
    head_shape=_electra_head,
    heads=transformers_classes("Electra"),
    depth=("num_hidden_layers",),
    weights=WeightTable(
        model_type="electra",
        prefix="electra.",
        rows=(
            *EMBEDDINGS_AND_LAYERS,
            *linear_rows("backbone.embedding_projection", "embeddings_project"),
        ),
        heads=HEAD_ROWS
        | {
            "sequence-classification": CLASSIFIER_WITH_DENSE,
            "multiple-choice": (*linear_rows("head.dense", "sequence_summary.summary", "head"), *CLASSIFIER),
            "masked-lm": (
                *linear_rows("head.dense", "generator_predictions.dense", "head"),
                *linear_rows("head.norm", "generator_predictions.LayerNorm", "head"),
                *linear_rows("head.decoder", "generator_lm_head", "head"),
            ),
        },
        tied={"generator_lm_head.weight": "embeddings.word_embeddings.weight"},
        renamed=LEGACY,
        ignored=(r"embeddings\.(position_ids|token_type_ids)", r"discriminator_predictions\..*"),
    ),
)
