"""ERNIE (Sun et al. 2020, "ERNIE 2.0", as exported to transformers): BERT, with or without task types."""

from __future__ import annotations

import reprlib
from dataclasses import replace

from models.bert import BERT, EMBEDDINGS_AND_LAYERS, BertConfig, read_encoder, transformers_classes
from models.checkpoints.tensor_files import JsonObject
from models.checkpoints.weights import WeightRow
from models.errors import ModelError


def _read_ernie(raw: JsonObject) -> BertConfig:
    use_task_types = raw.get("use_task_id", False)
    if not isinstance(use_task_types, bool):
        raise ModelError(f"config.json: use_task_id = {reprlib.repr(use_task_types)} should be true or false")
    config = read_encoder({"task_type_vocab_size": 3} | raw)
    return replace(config, embedding_size=0, task_type_vocab_size=config.task_type_vocab_size * use_task_types)


ERNIE = replace(
    BERT,
    read_config=_read_ernie,
    heads=transformers_classes("Ernie"),
    weights=replace(
        BERT.weights,
        model_type="ernie",
        prefix="ernie.",
        older_prefix="bert.",  # of the exports that are older than transformers' class
        rows=(
            *EMBEDDINGS_AND_LAYERS,
            WeightRow("backbone.task_type_embeddings.weight", "embeddings.task_type_embeddings.weight"),
        ),
    ),
)
