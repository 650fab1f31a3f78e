"""Summarization: summaries of texts, scored by ROUGE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data import Batch, TextExamples
from data.seq2seq import Seq2SeqRecord
from engine.config import GenerateSettings
from engine.metrics import summarization as metrics
from engine.metrics import unusable
from engine.tasks import seq2seq
from engine.tasks.settings import Columns
from engine.tasks.task import Task
from models import TaskModel
from models.ops.packing import to_device

NUM_COUNTS = 3 + len(metrics.ROUGES)


def evaluate_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], generate: GenerateSettings
) -> Tensor:
    """Return [loss, targets, texts, sum of each ROUGE, tokens written, tokens of the references], (9,)."""
    loss_sum, num_targets, written, references = seq2seq.evaluate_texts(model, batch, examples, generate)
    counts = metrics.summary_statistics(written, references)
    numbers = to_device(torch.tensor([num_targets, *counts], dtype=torch.float64), loss_sum.device)
    return torch.cat([loss_sum.double().reshape(1), numbers])


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], generate: GenerateSettings
) -> Tensor:
    """Return the statistics of each text of a batch, (B, 9)."""
    losses, written, references = seq2seq.evaluate_each_text(model, batch, examples, generate)
    counts = [metrics.summary_statistics([ours], [theirs]) for ours, theirs in zip(written, references, strict=True)]
    return torch.cat([losses, torch.tensor(counts, dtype=torch.float64).view(-1, NUM_COUNTS)], 1)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the loss per token, the mean of each ROUGE, and the summaries' length divided by the references'."""
    loss_sum, num_targets, *counts = statistics.tolist()
    return {"loss": loss_sum / num_targets, **metrics.summary_metrics(counts)}


SUMMARIZATION = Task(
    head="seq2seq-lm",
    caches=True,
    predicts="text",
    metrics=("rougeL", "rouge1", "rouge2", "rougeLsum", "length_ratio", "loss"),
    columns=Columns(text_pair=None, text="text", label="summary"),
    section="seq2seq",
    generates=True,
    read=seq2seq.read,
    load_processor=seq2seq.load_processor,
    encode=seq2seq.encode,
    augment=seq2seq.augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    references=seq2seq.references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_summaries,
    predict_batch=seq2seq.predict_batch,
    show_generations=seq2seq.show_generations,
)
