"""Causal language modelling: texts are learned and continued. dialogue.py shares the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples
from data.causal_lm import LanguageModelRecord, PromptRecord, encode_prompts, encode_texts_for_lm, read_texts
from engine.config import GenerateSettings
from engine.metrics import by_example
from engine.metrics import causal_lm as metrics
from engine.tasks.generation import continue_tokens
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel

METRICS = ("perplexity", "bits_per_byte", "loss", "token_accuracy")
PROMPT_DIVISOR = 4  # the prompt of a shown continuation is the first quarter of a text


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of texts; without labels a text, which is then a prompt, may be empty."""
    return read_texts(
        name,
        settings.data.text_column,
        group=settings.group_column(name, labelled),
        options=settings.file_options,
        may_be_empty=not labelled,
    )


def encode(
    rows: list[Row], processor: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[LanguageModelRecord] | TextExamples[PromptRecord]:
    """Encode texts as targets, or without labels as prompts."""
    column, max_length = settings.data.text_column, settings.data.max_length
    if not labelled:
        return encode_prompts(rows, processor, column=column, max_length=max_length)
    return encode_texts_for_lm(
        rows,
        processor,
        column=column,
        max_length=max_length,
        concatenate=settings.own.concatenate_texts,
        document_mask=settings.own.document_mask,
    )


def evaluate_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[LanguageModelRecord], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, right tokens, tokens, bytes], (4,).

    No logits are kept, so that memory does not grow with the data.
    """
    labels = batch.required_labels
    out = model(batch)
    num_bytes = int(examples.record.num_bytes[list(batch.indices)].sum())
    return metrics.language_statistics(out.loss_sum, out.logits, labels, num_bytes)


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[LanguageModelRecord], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, right tokens, tokens, bytes] of each text or block, (B, 4)."""
    rows = by_example.token_rows(model(batch).logits, batch)
    num_bytes = torch.from_numpy(examples.record.num_bytes[list(batch.indices)]).to(rows)
    return torch.cat([rows, num_bytes[:, None]], 1)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return perplexity, bits per byte, loss and token accuracy."""
    return metrics.language_metrics(statistics)


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[PromptRecord], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return the continuation of each prompt, as `continue_tokens` describes it."""
    prompts = [examples.sequence(i) for i in batch.indices]
    num_dropped = [int(examples.record.num_dropped[i]) for i in batch.indices]
    numbers = examples.numbers_of(batch.indices)
    return continue_tokens(model, prompts, numbers, num_dropped, examples.record, generate)


def show_generations(
    model: TaskModel, examples: TextExamples[LanguageModelRecord], generate: GenerateSettings, count: int
) -> str:
    """Return the beginnings of the first `count` texts, each with the model's continuation.

    Of a block whose texts are sequences of their own, the first one is shown.
    """
    first = range(len(examples)) if examples.sequences is None else examples.sequences[:-1].tolist()
    texts = [examples.sequence(i) for i in first[:count]]
    prompts = [text[: max(1, len(text) // PROMPT_DIVISOR)] for text in texts]
    return show_continuations(model, prompts, examples, generate)


def show_continuations(
    model: TaskModel, prompts: list[list[int]], examples: TextExamples[LanguageModelRecord], generate: GenerateSettings
) -> str:
    """Return a line for each prompt, which are those of the first examples: the prompt and its continuation."""
    if not prompts:
        return ""
    indices, none_dropped = tuple(range(len(prompts))), [0] * len(prompts)
    written = continue_tokens(model, prompts, indices, none_dropped, examples.record, generate)
    lines = []
    for i, (prompt, row) in enumerate(zip(prompts, written, strict=True)):
        given = examples.record.tokenizer.decode(prompt, skip_special_tokens=False)
        lines.append(f"  sample {examples.ids[i]}: {given!r} -> {row['text']!r}")
    return "\n".join(lines)


CAUSAL_LM = Task(
    head="causal-lm",
    caches=True,
    predicts="text",
    metrics=METRICS,
    columns=Columns(text_pair=None, text="text", label=""),
    section="causal_lm",
    generates=True,
    read=read,
    encode=encode,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    compute_metrics=compute_metrics,
    predict_batch=predict_batch,
    show_generations=show_generations,
)
