"""Texts that are written for other texts: summarisation and machine translation, with an encoder-decoder (T5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from data import Batch, DataError, Row, TextExamples, load_tokenizer
from data.seq2seq import PairTokenizer, Seq2SeqRecord, encode_pairs, read_pairs
from engine.config import GenerateSettings
from engine.metrics import summarization as rouge
from engine.metrics import translation
from engine.tasks.augmentation import augment_sources
from engine.tasks.generation import generation_settings
from engine.tasks.settings import Columns, TaskSettings
from engine.tasks.task import Task
from models import TaskModel
from models.generation.generate import Generated, generate

SHOWN = 300  # characters of a text among the samples


def _load(folder: Path) -> PairTokenizer:
    """DataError where the model could not begin or end a text: its config.json and the tokenizer must say how."""
    config, tokenizer = models.read_config(folder), load_tokenizer(folder)
    start, end = config.get("decoder_start_token_id"), config.get("eos_token_id")
    if not isinstance(start, int):
        raise DataError(f"{folder / 'config.json'}: decoder_start_token_id = {start!r} should be the id of a token")
    if tokenizer.encode("a").ids[-1] not in (end if isinstance(end, list) else [end]):
        raise DataError(
            f"{folder}: its tokenizer does not end a text with eos_token_id = {end!r} of config.json, "
            "so a model could not learn to stop"
        )
    return PairTokenizer(tokenizer, start)


def _read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    is_split = settings.is_training_split(name, labelled)
    return read_pairs(
        name,
        settings.data.text_column,
        settings.data.label_column if labelled else "",
        id_column=settings.data.id_column,
        format=settings.data.format,
        more=[settings.data.group_column] if settings.data.group_column and is_split else [],
    )


def _read_translations(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    if labelled:  # they will be measured: what is missing is said now, not after the training
        translation.require_sacrebleu()
    return _read(name, settings, labelled)


def _encode(
    rows: list[Row],
    processor: PairTokenizer,
    settings: TaskSettings,
    labels: Sequence[str],
    labelled: bool,
    bleu_tokenizer: str = "",
) -> TextExamples[Seq2SeqRecord]:
    return encode_pairs(
        rows,
        processor,
        source=settings.data.text_column,
        target=settings.data.label_column if labelled else "",
        prefix=settings.own.source_prefix,
        max_length=settings.data.max_length,
        max_target_length=settings.own.max_target_length,
        bleu_tokenizer=bleu_tokenizer,
    )


def _encode_translations(
    rows: list[Row], processor: PairTokenizer, settings: TaskSettings, labels: Sequence[str], labelled: bool
) -> TextExamples[Seq2SeqRecord]:
    """Choose BLEU's tokenizer by all the references, so that every batch is scored alike."""
    references = [row.values[settings.data.label_column] for row in rows] if labelled else []
    bleu_tokenizer = translation.choose_tokenizer(references) if labelled else ""
    return _encode(rows, processor, settings, labels, labelled, bleu_tokenizer)


def write(
    model: TaskModel, indices: Sequence[int], examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings
) -> list[tuple[str, Generated]]:
    """What the model writes for these examples, as text and as tokens; measured, predicted and shown alike."""
    written = generate(
        model,
        [examples.sequence(i) for i in indices],
        generation_settings(model, settings),
        examples=indices,
    )
    tokenizer = examples.record.tokenizer
    return [(tokenizer.decode(one.ids, skip_special_tokens=True).strip(), one) for one in written]


def _texts(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings
) -> tuple[list[float], list[str], list[str]]:
    """([sum of the losses of teacher forcing, number of targets], written texts, references) of a batch."""
    loss = model(batch).loss_sum.item() if batch.indices else 0.0
    references = [examples.record.references[i] for i in batch.indices]
    return [loss, batch.num_targets], [text for text, _ in write(model, batch.indices, examples, settings)], references


def _measure_summaries(model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings) -> Tensor:
    """[loss, targets, texts, sum of each ROUGE, tokens written, tokens of the references]."""
    loss, written, references = _texts(model, batch, examples, settings)
    scores = [rouge.rouge(ours, theirs) for ours, theirs in zip(written, references, strict=True)]
    sums = [sum(score[name] for score in scores) for name in rouge.NAMES]
    lengths = [sum(len(rouge.tokenize(text)) for text in texts) for texts in (written, references)]
    return torch.tensor([*loss, len(written), *sums, *lengths], dtype=torch.float64)


def _summarize_summaries(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """The mean of each ROUGE over the texts; loss: of a token; length_ratio: all written over all references."""
    loss, targets, texts, *sums, written, references = statistics.tolist()
    means = {name: value / texts for name, value in zip(rouge.NAMES, sums, strict=True)}
    return {"loss": loss / targets, **means, "length_ratio": written / references if references else 0.0}


def _measure_translations(model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings) -> Tensor:
    """[loss, targets, texts for each of the tokenizers of BLEU, the counts of BLEU and chrF]."""
    loss, written, references = _texts(model, batch, examples, settings)
    tokenizer = examples.record.bleu_tokenizer
    texts = [len(written) if name == tokenizer else 0 for name in translation.TOKENIZERS]
    counts = translation.translation_counts(written, references, tokenizer)
    return torch.tensor([*loss, *texts, *counts], dtype=torch.float64)


def _summarize_translations(statistics: Tensor, labels: Sequence[str]) -> dict[str, float]:
    loss, targets, *rest = statistics.tolist()
    return {"loss": loss / targets, **translation.translation_scores(rest[len(translation.TOKENIZERS) :])}


def _bleu_signature(statistics: Tensor, labels: Sequence[str]) -> str:
    """How BLEU and chrF were computed, as sacrebleu says it."""
    counts = statistics[2 : 2 + len(translation.TOKENIZERS)]
    return "\n".join(translation.signatures(translation.TOKENIZERS[int(counts.argmax())]))


def _predict(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings
) -> list[dict[str, Any]]:
    """The text, its score (log-probability over length ** length_penalty), and whether it ended by itself."""
    ends = generation_settings(model, settings).eos_token_id
    return [
        {"text": text, "score": one.score, "finished": one.ids[-1] in ends}
        for text, one in write(model, batch.indices, examples, settings)
    ]


def _samples(model: TaskModel, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings, count: int) -> str:
    """The first `count` examples: the source, what should be written, and what is."""
    indices = range(min(count, len(examples)))
    lines = []
    for i, (text, _) in zip(indices, write(model, indices, examples, settings), strict=True):
        own = {"source": examples.record.sources[i], "reference": examples.record.references[i], "written": text}
        lines.append(f"id {examples.ids[i]}")
        lines += [f"  {name:>9}: {' '.join(value.split())[:SHOWN]}" for name, value in own.items()]
    return "\n".join(lines)


SUMMARIZATION = Task(
    head="seq2seq-lm",
    section="seq2seq",
    generates=True,
    metrics=("rougeL", "rouge1", "rouge2", "rougeLsum", "length_ratio", "loss"),
    columns=Columns(text_pair=None, text="text", label="summary"),
    load_processor=_load,
    read=_read,
    encode=_encode,
    augment=augment_sources,
    evaluate_batch=_measure_summaries,
    compute_metrics=_summarize_summaries,
    predict_batch=_predict,
    show_generations=_samples,
)
TRANSLATION = replace(
    SUMMARIZATION,
    metrics=("bleu", "chrf", "length_ratio", "loss"),
    columns=Columns(text_pair=None, text="source", label="target"),
    read=_read_translations,
    encode=_encode_translations,
    evaluate_batch=_measure_translations,
    compute_metrics=_summarize_translations,
    format_table=_bleu_signature,
)
