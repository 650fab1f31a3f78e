"""Sentence embedding: a vector for each text, near those of the texts that answer it.

It learns from pairs (anchor, positive). The other texts of the optimizer step are negatives (engine/contrastive.py), so
train.global_batch_size is a part of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Examples, Row, TextExamples
from data import sentence_embedding as pairs
from data.text_classification import encode_texts
from engine.config import AugmentSettings, GenerateSettings
from engine.config.task_sections import SentenceEmbeddingSettings
from engine.contrastive import comparable_vectors, in_batch_negatives_loss
from engine.metrics import sentence_embedding as metrics
from engine.step_loss import StepLoss
from engine.tasks import text_classification
from engine.tasks.augmentation import RowEncoder, check_text_changes
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel
from models.checkpoints.sentence_files import SentenceFiles, write_sentence_files

Embedded = TextExamples[SentenceEmbeddingSettings]


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows with an anchor, a positive and perhaps negatives; without labels, with a text alone."""
    data = settings.data
    if not labelled:
        alone = replace(settings, data=replace(data, text_pair_column=""))
        return text_classification.read_texts(name, alone, False, None)
    group = settings.group_column(name, labelled)
    required = [data.text_column, data.text_pair_column]
    return pairs.read_pairs(name, required, settings.own.negative_columns, group, settings.file_options)


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> Embedded:
    """Encode each text alone, of at most data.max_length tokens; with labels, all texts of a row."""
    data, own = settings.data, settings.own
    limits: dict[str, Any] = {"max_length": data.max_length, "long_texts": data.long_texts}
    if not labelled:
        return encode_texts(rows, processor, text=data.text_column, **limits).with_record(own)
    columns = (data.text_column, data.text_pair_column)
    return pairs.encode_pairs(rows, processor, columns, own.negative_columns, **limits).with_record(own)


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Return the examples unchanged; ConfigError for any setting of [augment]."""
    check_text_changes(settings, (), "rows with the same text are found by it, so as not to be negatives of each other")
    return examples


def step_loss(settings: TaskSettings) -> StepLoss:
    """Return the loss of all pairs of a step."""
    own = settings.own
    return partial(in_batch_negatives_loss, similarity=own.similarity, scale=own.scale)


def evaluate_batch(model: TaskModel, batch: Batch, examples: Embedded, generate: GenerateSettings) -> Tensor:
    """Return a row for each sequence of the data set, flat; zeros for those of other batches."""
    batch.required_labels  # noqa: B018  # raises TypeError
    own, sequences = examples.record, examples.sequences
    if sequences is None:
        raise TypeError("only labelled examples can be evaluated")
    vectors = comparable_vectors(model(batch).logits, own.similarity)
    return metrics.pool_statistics(vectors, batch, sequences, own.scale)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return how well the anchors find their positives among all texts of the data set."""
    return metrics.pool_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: Embedded, generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the vector of each text, for cosine of length 1."""
    vectors = comparable_vectors(model(batch).logits, examples.record.similarity)
    return [{"embedding": vector} for vector in vectors.tolist()]


SENTENCE_EMBEDDING = Task(
    head="sentence-embedding",
    long_texts=("truncate", "head+tail"),
    predicts="embedding",
    metrics=("mrr@10", "accuracy@1", "accuracy@10", "loss", "candidates"),
    details=("candidates",),
    columns=Columns(text="anchor", text_pair="positive", label=""),
    section="sentence_embedding",
    read=read,
    encode=encode,
    augment=augment,
    step_loss=step_loss,
    evaluate_batch=evaluate_batch,
    compute_metrics=compute_metrics,
    predict_batch=predict_batch,
)


def export_sentence_files(model: TaskModel, own: SentenceEmbeddingSettings, max_length: int, folder: Path) -> None:
    """Write the files of sentence-transformers beside the export of a model that embeds texts; else do nothing."""
    if model.head is None or model.head_name != SENTENCE_EMBEDDING.head:
        return
    files = SentenceFiles(model.head.shape.pooling, own.similarity == "cosine", max_length)
    write_sentence_files(folder, files, model.head.shape.hidden_size)
