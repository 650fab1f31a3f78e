"""Language models: of texts, which they continue, and of conversations, which they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from data import Batch, Row, TextExamples
from data.batch import IGNORE_INDEX
from data.causal_lm import encode_language, encode_prompts, read_texts
from data.dialogue import encode_dialogues, read_dialogues
from engine.config import GenerateSettings
from engine.metrics import causal_lm as metrics
from engine.tasks.generation import continue_prompts, continue_tokens
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel

METRICS = ("perplexity", "bits_per_byte", "loss", "token_accuracy")


def _read_texts(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    group = _group(name, settings, labelled)
    return read_texts(
        name,
        settings.data.text_column,
        group=group,
        id_column=settings.data.id_column,
        format=settings.data.format,
        may_be_empty=not labelled,
    )


def _read_dialogues(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    group = _group(name, settings, labelled)
    return read_dialogues(
        name,
        settings.data.text_column,
        labelled,
        group=group,
        id_column=settings.data.id_column,
        format=settings.data.format,
    )


def _group(name: str, settings: TaskSettings, labelled: bool) -> str:
    """The column that the one file which is split must have."""
    return settings.data.group_column if settings.is_training_split(name, labelled) else ""


def _encode_texts(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    column, max_length = settings.data.text_column, settings.data.max_length
    if labelled:
        return encode_language(
            rows, tokenizer, column=column, max_length=max_length, concatenate=settings.own.concatenate_texts
        )
    return encode_prompts(rows, tokenizer, column=column, max_length=max_length)


def _encode_dialogues(
    rows: list[Row], tokenizer: Tokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples:
    return encode_dialogues(
        rows, tokenizer, column=settings.data.text_column, max_length=settings.data.max_length, labelled=labelled
    )


def _measure(model: TaskModel, batch: Batch, examples: Any, generate: GenerateSettings) -> Tensor:
    """Sums over a batch; the logits go no further than this, so that memory does not grow with the data."""
    if batch.labels is None:
        raise TypeError("only labelled examples can be measured")
    out = model(batch)
    num_bytes = examples.record.num_bytes[list(batch.indices)].sum()
    return metrics.language_statistics(out.loss_sum, out.logits, batch.labels, int(num_bytes))


def _summarize(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    return metrics.language_metrics(statistics)


def _sample_texts(model: TaskModel, examples: Any, generate: GenerateSettings, count: int) -> str:
    """How the first texts begin, and how the model goes on."""
    chosen = range(min(count, len(examples)))
    prompts = [examples.sequence(i) for i in chosen]
    prompts = [prompt[: max(1, len(prompt) // 4)] for prompt in prompts]
    return _show(model, prompts, examples, generate)


def _sample_replies(model: TaskModel, examples: Any, generate: GenerateSettings, count: int) -> str:
    """The first conversations up to their last reply, and the model's own."""
    chosen = range(min(count, len(examples)))
    prompts = [examples.sequence(i)[: _last_reply(examples, i)] for i in chosen]
    return _show(model, prompts, examples, generate)


def _last_reply(examples: TextExamples, index: int) -> int:
    """The place where the last reply of example `index` begins, of which the token before is the first to learn."""
    labels = examples.token_labels
    if labels is None:
        raise TypeError("only a labelled conversation has a reply")
    learned = labels[examples.offsets[index] : examples.offsets[index + 1]] != IGNORE_INDEX
    return int(np.flatnonzero(learned & ~np.append(False, learned[:-1]))[-1]) + 1


def _show(model: TaskModel, prompts: list[list[int]], examples: Any, generate: GenerateSettings) -> str:
    if not prompts:
        return ""
    tokenizer = examples.record.tokenizer
    numbers = tuple(range(len(prompts)))
    written = continue_tokens(model, prompts, numbers, [0] * len(prompts), examples.record, generate)
    lines = []
    for i, (prompt, row) in enumerate(zip(prompts, written, strict=True)):
        given = tokenizer.decode(prompt, skip_special_tokens=False)
        lines.append(f"  sample {examples.ids[i]}: {given!r} -> {row['text']!r}")
    return "\n".join(lines)


CAUSAL_LM = Task(
    head="causal-lm",
    metrics=METRICS,
    columns=Columns(text_pair=None, text="text", label=""),
    section="causal_lm",
    generates=True,
    read=_read_texts,
    encode=_encode_texts,
    evaluate_batch=_measure,
    compute_metrics=_summarize,
    predict_batch=continue_prompts,
    show_generations=_sample_texts,
)
DIALOGUE = Task(
    head="causal-lm",
    metrics=METRICS,
    columns=Columns(text_pair=None, text="messages", label=""),
    generates=True,
    read=_read_dialogues,
    encode=_encode_dialogues,
    evaluate_batch=_measure,
    compute_metrics=_summarize,
    predict_batch=continue_prompts,
    show_generations=_sample_replies,
)
