"""Token classification: a tag for each word, such as entities or parts of speech."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, TextExamples
from data import token_classification as tagging
from data.augmentation import text as text_augmentation
from data.tag_checks import check_tag_names, find_tag_names
from data.tag_notation import STANDARD, find_notation
from data.tag_schemes import are_entity_tags, find_entities
from data.token_classification import Words, encode_tagged
from data.words import TEXT, locate_words
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics import by_example, tables, unusable
from engine.metrics import token_classification as metrics
from engine.tasks.augmentation import CHANGES_IN_PLACE, RowEncoder, augment_rows, check_text_changes, text_changes
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import Output, TaskModel
from models.ops.packing import to_device


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of words, and with labels their tags."""
    return tagging.read_tagged(
        name,
        settings.data.text_column,
        settings.label_column(labelled),
        group=settings.group_column(name, labelled),
        options=settings.file_options,
        scheme=settings.own.tag_scheme,
        bad_tags=settings.own.bad_tags,
        bad_spans=settings.own.bad_spans,
        labels=settings.data.labels,
        explain=name == settings.data.train,
        columns=(settings.data.text_column, settings.data.label_column),
    )


def find_labels(name: str, rows: list[Row], settings: TaskSettings) -> list[str]:
    """Return data.labels, else the tags that occur, completed by their scheme and sorted."""
    return find_tag_names(name, rows, settings.data.label_column, settings.data.labels, settings.own.tag_scheme)


def check_labels(name: str, rows: list[Row], settings: TaskSettings, labels: Sequence[str]) -> None:
    """Raise DataError for every word whose tag is unknown."""
    check_tag_names(name, rows, settings.data.label_column, labels)


def split_labels(rows: list[Row], settings: TaskSettings) -> list[Collection[str]]:
    """Return the tags of each row."""
    column = settings.data.label_column
    distinct: dict[frozenset[str], frozenset[str]] = {}  # many rows have the same tags
    return [distinct.setdefault(tags, tags) for tags in (frozenset(row.values[column]) for row in rows)]


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[Words]:
    """Encode the words, of at most data.max_length tokens or in windows, and with labels each tag at a first token."""
    return encode_tagged(
        rows,
        processor,
        text=settings.data.text_column,
        label=settings.label_column(labelled),
        labels=labels,
        max_length=settings.data.max_length,
        entities=_are_entities(settings, labels),
        scheme=settings.own.tag_scheme,
        long_texts=settings.data.long_texts,
        window_overlap=settings.data.window_overlap,
    )


def _are_entities(settings: TaskSettings, labels: Sequence[str]) -> bool:
    """Return whether the tags mark entities, instead of being classes of their own."""
    return bool(settings.own.tag_scheme != "none" and are_entity_tags(labels))


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Mask words, replace them one by one, or remove them with their tags."""
    if not check_text_changes(settings, ("delete", *CHANGES_IN_PLACE), "each word has a label"):
        return examples
    data, changes = encode.settings.data, text_changes(settings.text, encode, rows)
    entities = _are_entities(encode.settings, encode.labels)
    outside = (find_notation(encode.labels) or STANDARD).outside if entities else ""

    def change(row: Row, rng: np.random.Generator) -> Row:
        return text_augmentation.change_tagged(row, rng, changes, data.text_column, data.label_column, outside)

    return augment_rows(examples, rows, encode, changes, seed, change)


def evaluate_batch(model: TaskModel, batch: Batch, examples: TextExamples[Words], generate: GenerateSettings) -> Tensor:
    """Return (8 + 3 * units,): sum of losses, targets, words (all, right, unseen), strict counts, counts a unit."""
    _ = batch.required_labels  # TypeError without labels
    words = examples.record
    labels = cast("np.ndarray", words.labels)
    out, predicted, _ = predict_tags(model, batch, words)
    true = [[model.labels[k] for k in labels[words.word_slice(i)].tolist()] for i in batch.indices]
    num_unseen = sum(int((words.first_tokens[words.word_slice(i)] < 0).sum()) for i in batch.indices)
    sentences = zip(true, predicted, strict=True)
    return metrics.tagging_statistics(
        out.loss_sum, batch.num_targets, num_unseen, sentences, model.labels, words.entities, words.scheme
    )


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[Words], generate: GenerateSettings
) -> Tensor:
    """Return the tagging_statistics of each example of a batch."""
    words = examples.record
    labels = cast("np.ndarray", words.labels)
    out, predicted, _ = predict_tags(model, batch, words)
    losses = by_example.token_rows(out.logits, batch).cpu()

    def count(loss: Tensor, num_targets: int, num_unseen: int, sentences: list[metrics.Sentence]) -> Tensor:
        units = (model.labels, words.entities, words.scheme)
        return metrics.tagging_statistics(loss, num_targets, num_unseen, sentences, *units)

    rows = [count(losses.new_zeros(()), 0, 0, [])]  # which an empty batch has too
    for (loss, _, targets), i, tags in zip(losses, batch.indices, predicted, strict=True):
        own = words.word_slice(i)
        true = [model.labels[k] for k in labels[own].tolist()]
        rows.append(count(loss, int(targets), int((words.first_tokens[own] < 0).sum()), [(true, tags)]))
    return torch.stack(rows)[1:]


def references(examples: TextExamples[Words], labels: Sequence[str]) -> list[list[str]]:
    """Return the tags of each example."""
    words = examples.record
    known = cast("np.ndarray", words.labels)
    return [[labels[k] for k in known[words.word_slice(i)].tolist()] for i in range(len(examples))]


def predict_tags(model: TaskModel, batch: Batch, words: Words) -> tuple[Output, list[list[str]], list[list[float]]]:
    """Return (the model's output, the likeliest tag of each word of each example, the tags' probabilities).

    A word that the model did not see has the tag NO_TAG and the probability 0.
    """
    out = model(batch)
    indices = np.asarray(batch.indices, dtype=np.int64)
    counts = words.offsets[indices + 1] - words.offsets[indices]
    places = np.concatenate([words.first_tokens[:0], *(words.first_tokens[words.word_slice(i)] for i in batch.indices)])
    is_seen = places >= 0
    sequences = np.cumsum([0, *batch.sequences]) if batch.sequences is not None else np.arange(len(indices) + 1)
    begins = np.cumsum([0, *batch.lengths])[sequences[:-1]]  # of each example, which may be several windows
    tokens = to_device(torch.from_numpy((np.repeat(begins, counts) + places)[is_seen]), out.logits.device)
    best = torch.softmax(out.logits.index_select(0, tokens).double(), -1).max(-1)
    highest, classes = torch.stack([best.values, best.indices.double()]).tolist()  # one read of a GPU
    tags, probabilities = [metrics.NO_TAG] * len(places), [0.0] * len(places)
    for i, k, p in zip(np.flatnonzero(is_seen).tolist(), classes, highest, strict=True):
        tags[i], probabilities[i] = model.labels[int(k)], p
    slices = [slice(*ends) for ends in pairwise(np.cumsum([0, *counts]).tolist())]
    return out, [tags[example] for example in slices], [probabilities[example] for example in slices]


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[Words], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the tags of each example, or for rows that were texts the spans of entities in characters.

    - For words: their tags, the probability of each, and the entities as ranges of words.
    - The probability of an entity is the product of the probabilities of its tags.
    - The tag of a word that the model did not see is null.
    """
    words = examples.record
    _, tags, probabilities = predict_tags(model, batch, words)
    return [_as_dict(words, *example) for example in zip(batch.indices, tags, probabilities, strict=True)]


def _as_dict(words: Words, index: int, tags: list[str], probabilities: list[float]) -> dict[str, Any]:
    values = words.rows[index].values
    tokens: list[str] = values[words.column]
    notation = find_notation(words.tag_names) or STANDARD
    entities: list[dict[str, Any]] = [
        {"start": start, "end": end, "label": kind, "probability": float(np.prod(probabilities[start:end]))}
        for start, end, kind in (find_entities(tags, notation) if words.entities else ())
    ]
    if TEXT in values and words.entities:
        text, places = values[TEXT], locate_words(tokens)
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
    long_texts=("truncate", "windows"),
    predicts="tags",
    metrics=(
        *("f1", "precision", "recall", "f1_strict", "precision_strict", "recall_strict"),
        *("accuracy", "loss"),
    ),
    columns=Columns(text_pair=None, text="tokens", label="tags"),
    section="token_classification",
    read=read,
    find_labels=find_labels,
    check_labels=check_labels,
    split_labels=split_labels,
    encode=encode,
    augment=augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    references=references,
    compute_metrics=metrics.tagging_metrics,
    unusable_metrics=unusable.for_tags,
    format_table=metrics.type_table,
    tables=tables.of_tags,
    predict_batch=predict_batch,
)
