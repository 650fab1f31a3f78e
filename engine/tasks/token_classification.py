"""A tag for each word: entities, parts of speech, any labelling of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples
from data import token_classification as tagging
from data.tag_schemes import find_entities, mark_entities
from data.words import TEXT, Words, encode_tagged, word_places
from engine.config import GenerateSettings
from engine.metrics import token_classification as metrics
from engine.tasks.augmentation import augment_tagged
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import Output, TaskModel


def _read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    is_split = settings.is_training_split(name, labelled)
    return tagging.read_tagged(
        name,
        settings.data.text_column,
        settings.data.label_column if labelled else "",
        group=settings.data.group_column if is_split else "",
        id_column=settings.data.id_column,
        format=settings.data.format,
        scheme=settings.own.tag_scheme,
    )


def _find_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    return tagging.tag_names(name, rows, settings.data.label_column, settings.data.labels, settings.own.tag_scheme)


def _check_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    tagging.check_tags(name, rows, settings.data.label_column, labels)


def _encode(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    return encode_tagged(
        rows,
        tokenizer,
        text=settings.data.text_column,
        label=settings.data.label_column if labelled else "",
        labels=labels,
        max_length=settings.data.max_length,
        entities=settings.own.tag_scheme != "none" and mark_entities(labels),
    )


def tag_words(model: TaskModel, batch: Batch, words: Words) -> tuple[Output, list[list[str]], list[list[float]]]:
    """(what the model returned, the likeliest tag of each word of each example, the tags' probabilities).

    These are measured, and these are predicted. A word that the model did not see has NO_TAG, and the probability 0.
    """
    out = model(batch)
    indices = np.asarray(batch.indices, dtype=np.int64)
    counts = words.offsets[indices + 1] - words.offsets[indices]
    places = np.concatenate([words.places[:0], *(words.places[words.part(i)] for i in batch.indices)])
    seen = places >= 0
    begins = np.cumsum([0, *batch.lengths])[:-1]
    tokens = torch.from_numpy((np.repeat(begins, counts) + places)[seen]).to(out.logits.device)
    best = torch.softmax(out.logits[tokens].double(), -1).max(-1)
    tags, probabilities = [metrics.NO_TAG] * len(places), [0.0] * len(places)
    for i, k, p in zip(np.flatnonzero(seen).tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
        tags[i], probabilities[i] = model.labels[k], p
    parts = [slice(*ends) for ends in pairwise(np.cumsum([0, *counts]).tolist())]
    return out, [tags[part] for part in parts], [probabilities[part] for part in parts]


def _measure(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    words: Words = examples.extra["words"]
    if words.labels is None:
        raise TypeError("only labelled examples can be measured")
    out, predicted, _ = tag_words(model, batch, words)
    true = [[model.labels[k] for k in words.labels[words.part(i)].tolist()] for i in batch.indices]
    lost = sum(int((words.places[words.part(i)] < 0).sum()) for i in batch.indices)
    sentences = zip(true, predicted, strict=True)
    return metrics.tagging_statistics(out.loss_sum, batch.num_targets, lost, sentences, model.labels, words.entities)


def _predict(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> list[dict[str, Any]]:
    """Of words: their tags, the probability of each, and the entities in words. Of a text: its spans in characters.

    The probability of an entity is that of all its tags together: their product. The tag of a word that the model did
    not see is null.
    """
    words: Words = examples.extra["words"]
    _, tags, probabilities = tag_words(model, batch, words)
    return [_row(words, *of_one) for of_one in zip(batch.indices, tags, probabilities, strict=True)]


def _row(words: Words, index: int, tags: list[str], probabilities: list[float]) -> dict[str, Any]:
    values = words.rows[index].values
    tokens: list[str] = values[words.column]
    entities: list[dict[str, Any]] = [
        {"start": start, "end": end, "label": kind, "probability": float(np.prod(probabilities[start:end]))}
        for start, end, kind in (find_entities(tags) if words.entities else ())
    ]
    if TEXT in values and words.entities:
        text, places = values[TEXT], word_places(tokens)
        for span in entities:
            start, end = places[span["start"]][0], places[span["end"] - 1][1]
            span |= {"start": start, "end": end, "text": text[start:end]}
        return {"text": text, "spans": entities}
    row = {
        "tokens": [word.lstrip() for word in tokens] if TEXT in values else tokens,
        "tags": [None if tag == metrics.NO_TAG else tag for tag in tags],
        "probabilities": probabilities,
    }
    return row | ({"entities": entities} if words.entities else {})


TOKEN_CLASSIFICATION = Task(
    head="token-classification",
    section="token_classification",
    metrics=("f1", "precision", "recall", "accuracy", "loss"),
    columns=Columns(text_pair=None, text="tokens", label="tags"),
    read=_read,
    find_labels=_find_labels,
    check_labels=_check_labels,
    encode=_encode,
    evaluate_batch=_measure,
    compute_metrics=metrics.tagging_metrics,
    predict_batch=_predict,
    augment=augment_tagged,
    format_table=metrics.type_table,
)
