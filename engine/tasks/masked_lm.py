"""Masked language modelling: a pretrained encoder learns the texts of a domain, without labels.

Its checkpoint is then fine-tuned by any other task (Gururangan et al. 2020, "Don't stop pretraining").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import IGNORE_INDEX, Batch, Examples, Row, TextExamples
from data.augmentation.text import MASKS
from data.causal_lm import read_texts
from data.masked_lm import (
    DynamicallyMasked,
    FillRecord,
    MaskedRecord,
    encode_texts_for_mlm,
    encode_texts_to_fill,
    find_masking,
    show_masked,
)
from data.segmentation import load_segmenter
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics import by_example
from engine.metrics import masked_lm as metrics
from engine.tasks.augmentation import RowEncoder, refuse_augmentation
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel

METRICS = ("perplexity", "accuracy", "loss")
NUM_PREDICTIONS = 5  # tokens that are predicted for each mask


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of texts."""
    group = settings.group_column(name, labelled)
    return read_texts(name, settings.data.text_column, group=group, options=settings.file_options)


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[MaskedRecord] | TextExamples[FillRecord]:
    """Encode texts and mask them; without labels, texts whose own masks are to be filled."""
    column, max_length, own = settings.data.text_column, settings.data.max_length, settings.own
    if not labelled:
        return encode_texts_to_fill(rows, processor, column=column, max_length=max_length)
    return encode_texts_for_mlm(
        rows,
        processor,
        column=column,
        max_length=max_length,
        masking=find_masking(processor, own.mask_probability),
        whole_words=own.whole_words,
        segment=load_segmenter(own.segmenter) if own.segmenter else None,
        concatenate=own.concatenate_texts,
    )


def texts(row: Row, settings: TaskSettings) -> list[str]:
    """Return the text without its own mask tokens, which are read as such."""
    text: str = row.values[settings.data.text_column]
    for token in MASKS:
        text = text.replace(token, " ")
    return [text]


def mask_dynamically(
    examples: Any, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int
) -> DynamicallyMasked:
    """Return the training examples with other masks in each epoch; ConfigError for any setting of [augment]."""
    refuse_augmentation(examples, rows, encode, settings, seed)
    masking = find_masking(encode.processor, encode.settings.own.mask_probability)
    return DynamicallyMasked(examples, masking, seed, encode.processor)


def show_examples(examples: Examples, path: Path) -> str:
    """Return the first training examples as they are masked in the first epochs."""
    return show_masked(examples) if isinstance(examples, DynamicallyMasked) else ""


def evaluate_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[MaskedRecord], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, right tokens, masked tokens], (3,); the logits of masked tokens alone are computed."""
    labels = batch.required_labels
    out = model(batch)
    return metrics.masked_statistics(out.loss_sum, out.logits, labels)


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[MaskedRecord], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, right tokens, masked tokens] of each text or block, (B, 3)."""
    return by_example.token_rows(model(batch).logits, batch)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return perplexity, accuracy and loss."""
    return metrics.masked_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[FillRecord], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return each text with its masks filled, and for each mask the most probable tokens, the best first."""
    tokenizer, mask_id = examples.record.tokenizer, examples.record.mask_token_id
    sequences = [examples.sequence(i) for i in batch.indices]
    num_masks = [ids.count(mask_id) for ids in sequences]
    best, probabilities = _fill(model, batch, mask_id, sum(num_masks))
    rows, done = list[dict[str, Any]](), 0
    for ids, count in zip(sequences, num_masks, strict=True):
        own = range(done, done + count)
        done += count
        chosen = iter(best[i][0] for i in own)
        text = tokenizer.decode([next(chosen) if k == mask_id else k for k in ids], skip_special_tokens=True)
        masks = [
            [
                {"token": str(tokenizer.id_to_token(k)), "probability": p}
                for k, p in zip(best[i], probabilities[i], strict=True)
            ]
            for i in own
        ]
        rows.append({"text": text, "masks": masks})
    return rows


def _fill(model: TaskModel, batch: Batch, mask_id: int, num_masks: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return the most probable tokens of each mask of a batch, and their probabilities, the highest first."""
    if not num_masks or batch.input_ids is None:
        return [], []
    # Labels at the masks, whatever they are, make the head compute the logits there alone.
    labels = torch.where(batch.input_ids == mask_id, 0, IGNORE_INDEX)
    logits = model(replace(batch, labels=labels, num_targets=num_masks)).logits.double()
    probabilities, best = logits.softmax(-1).topk(min(NUM_PREDICTIONS, logits.shape[-1]))
    return best.tolist(), probabilities.tolist()


MASKED_LM = Task(
    head="masked-lm",
    caches=True,
    predicts="text",
    metrics=METRICS,
    columns=Columns(text_pair=None, text="text", label=""),
    section="masked_lm",
    read=read,
    encode=encode,
    texts=texts,
    augment=mask_dynamically,
    show_augmented=show_examples,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    compute_metrics=compute_metrics,
    predict_batch=predict_batch,
)
