"""Span corruption: an encoder-decoder (T5) learns the texts of a domain, without labels, as it was pretrained.

It writes the spans that were cut out of a text. Its checkpoint is then fine-tuned by summarization or translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import Batch, Examples, Row, TextExamples
from data.seq2seq import PairTokenizer
from data.span_corruption import (
    SENTINEL,
    Corruption,
    DynamicallyCorrupted,
    SpanRecord,
    encode_texts_for_spans,
    encode_texts_with_sentinels,
    fill_spans,
    find_corruption,
    show_corrupted,
)
from engine.config import AugmentSettings, GenerateSettings
from engine.tasks import masked_lm, seq2seq
from engine.tasks.augmentation import RowEncoder, refuse_augmentation
from engine.tasks.generation import generation_settings
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel
from models.generation.generate import generate as generate_tokens


def encode(
    rows: list[Row], processor: PairTokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[SpanRecord]:
    """Encode texts and cut spans out; without labels, texts whose own sentinels are to be replaced by spans."""
    column, max_length = settings.data.text_column, settings.data.max_length
    corruption = _corruption(processor, settings)
    if not labelled:
        return encode_texts_with_sentinels(rows, processor, column=column, max_length=max_length, corruption=corruption)
    return encode_texts_for_spans(
        rows,
        processor,
        column=column,
        max_length=max_length,
        corruption=corruption,
        concatenate=settings.own.concatenate_texts,
    )


def _corruption(processor: PairTokenizer, settings: TaskSettings) -> Corruption:
    own = settings.own
    return find_corruption(processor.tokenizer, own.noise_density, own.mean_span_length)


def texts(row: Row, settings: TaskSettings) -> list[str]:
    """Return the text without its own sentinels, which are read as such."""
    return [SENTINEL.sub(" ", row.values[settings.data.text_column])]


def corrupt_dynamically(
    examples: Any, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int
) -> DynamicallyCorrupted:
    """Return the training examples with other spans in each epoch; ConfigError for any setting of [augment]."""
    refuse_augmentation(examples, rows, encode, settings, seed)
    processor = encode.processor
    return DynamicallyCorrupted(examples, _corruption(processor, encode.settings), seed, processor.tokenizer)


def show_examples(examples: Examples, path: Path) -> str:
    """Return the first training examples as they are in the first epochs."""
    return show_corrupted(examples) if isinstance(examples, DynamicallyCorrupted) else ""


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[SpanRecord], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return each text with its sentinels replaced by what the model writes for them, and these spans."""
    tokenizer = examples.record.tokenizer
    sentinels = [i for token, i in tokenizer.get_vocab().items() if SENTINEL.fullmatch(token)]
    sources = [examples.sequence(i) for i in batch.indices]
    written = generate_tokens(
        model, sources, generation_settings(model, generate), examples=examples.numbers_of(batch.indices)
    )
    rows = []
    for source, tokens in zip(sources, written, strict=True):
        filled, spans = fill_spans(source, tokens.ids, sentinels)
        decoded = [tokenizer.decode(span, skip_special_tokens=True).strip() for span in spans]
        rows.append({"text": tokenizer.decode(filled, skip_special_tokens=True).strip(), "spans": decoded})
    return rows


SPAN_CORRUPTION = Task(
    head="seq2seq-lm",
    caches=True,
    predicts="text",
    metrics=masked_lm.METRICS,
    columns=Columns(text_pair=None, text="text", label=""),
    section="span_corruption",
    generates=True,
    read=masked_lm.read,
    load_processor=seq2seq.load_processor,
    encode=encode,
    texts=texts,
    augment=corrupt_dynamically,
    show_augmented=show_examples,
    evaluate_batch=masked_lm.evaluate_batch,
    evaluate_examples=masked_lm.evaluate_examples,
    compute_metrics=masked_lm.compute_metrics,
    predict_batch=predict_batch,
)
