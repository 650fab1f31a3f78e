"""Translation: translations of texts, scored by BLEU and chrF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data import Batch, Row, TextExamples
from data.seq2seq import PairTokenizer, Seq2SeqRecord
from engine.config import GenerateSettings
from engine.metrics import translation as metrics
from engine.metrics import unusable
from engine.tasks import seq2seq
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel
from models.ops.packing import to_device

NUM_TOKENIZERS = len(metrics.TOKENIZERS)
NUM_COUNTS = NUM_TOKENIZERS + metrics.NUM_BLEU_COUNTS + metrics.NUM_CHRF_COUNTS


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of source texts, and with labels their targets; ConfigError if sacrebleu is needed and missing."""
    if labelled:  # such rows will be scored, so that a missing package is reported before the training
        metrics.require_sacrebleu(settings.bleu_tokenizer)
    return seq2seq.read(name, settings, labelled)


def encode(
    rows: list[Row], processor: PairTokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[Seq2SeqRecord]:
    """Encode sources and targets; eval.bleu_tokenizer or all references together determine BLEU's tokenizer."""
    tokenizer, why = settings.bleu_tokenizer, "as eval.bleu_tokenizer says"
    if not labelled:
        return seq2seq.encode(rows, processor, settings, labels, labelled)
    if tokenizer == "auto":
        references = [row.values[settings.data.label_column] for row in rows]
        tokenizer, why = metrics.choose_tokenizer(references), "by the script of most targets"
    examples = seq2seq.encode(rows, processor, settings, labels, labelled, tokenizer)
    return replace(examples, notes=(*examples.notes, f"BLEU: sacrebleu's tokenizer {tokenizer}, {why}"))


def evaluate_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], generate: GenerateSettings
) -> Tensor:
    """Return [sum of losses, targets, texts for each BLEU tokenizer, the counts of BLEU and chrF], (2 + 7 + 28,)."""
    loss_sum, num_targets, written, references = seq2seq.evaluate_texts(model, batch, examples, generate)
    tokenizer = examples.record.bleu_tokenizer
    texts = [len(written) if name == tokenizer else 0 for name in metrics.TOKENIZERS]
    counts = metrics.translation_statistics(written, references, tokenizer)
    numbers = to_device(torch.tensor([num_targets, *texts, *counts], dtype=torch.float64), loss_sum.device)
    return torch.cat([loss_sum.double().reshape(1), numbers])


def evaluate_examples(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], generate: GenerateSettings
) -> Tensor:
    """Return the statistics of each text of a batch, (B, 2 + 7 + 28)."""
    losses, written, references = seq2seq.evaluate_each_text(model, batch, examples, generate)
    tokenizer = examples.record.bleu_tokenizer
    own = [int(name == tokenizer) for name in metrics.TOKENIZERS]
    counts = [
        own + metrics.translation_statistics([ours], [theirs], tokenizer)
        for ours, theirs in zip(written, references, strict=True)
    ]
    return torch.cat([losses, torch.tensor(counts, dtype=torch.float64).view(-1, NUM_COUNTS)], 1)


def compute_metrics(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the loss per token, BLEU, chrF, and the translations' length divided by the references'."""
    loss_sum, num_targets, *rest = statistics.tolist()
    return {"loss": loss_sum / num_targets, **metrics.translation_metrics(rest[NUM_TOKENIZERS:])}


def format_table(statistics: Tensor, labels: Sequence[str]) -> str:
    """Return sacrebleu's signatures, which say how BLEU and chrF were computed."""
    texts = statistics[2 : 2 + NUM_TOKENIZERS]
    return "\n".join(metrics.signatures(metrics.TOKENIZERS[int(texts.argmax())]))


TRANSLATION = Task(
    head="seq2seq-lm",
    caches=True,
    predicts="text",
    metrics=("bleu", "chrf", "length_ratio", "loss"),
    columns=Columns(text_pair=None, text="source", label="target"),
    section="seq2seq",
    generates=True,
    read=read,
    load_processor=seq2seq.load_processor,
    encode=encode,
    augment=seq2seq.augment,
    evaluate_batch=evaluate_batch,
    evaluate_examples=evaluate_examples,
    references=seq2seq.references,
    compute_metrics=compute_metrics,
    unusable_metrics=unusable.for_translations,
    format_table=format_table,
    predict_batch=seq2seq.predict_batch,
    show_generations=seq2seq.show_generations,
)
