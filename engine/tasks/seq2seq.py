"""Functions shared by summarization and translation: an encoder-decoder (T5) writes a target for a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import models
from data import Batch, DataError, Examples, Row, TextExamples, load_tokenizer
from data.seq2seq import PairTokenizer, Seq2SeqRecord, encode_pairs, read_pairs
from engine.config import AugmentSettings, GenerateSettings
from engine.metrics import by_example
from engine.tasks.augmentation import RowEncoder, augment_columns
from engine.tasks.generation import generation_settings
from engine.tasks.settings import TaskSettings
from models import TaskModel
from models.generation.generate import Generated, generate

SHOWN_CHARACTERS = 300  # of each text that an evaluation shows


class Evaluated(NamedTuple):
    """The loss of a batch, the texts that the model wrote for it, and their references."""

    loss_sum: Tensor  # with teacher forcing; a scalar on the model's device
    num_targets: int
    written: list[str]
    references: list[str]


def load_processor(folder: Path) -> PairTokenizer:
    """Load the tokenizer and the decoder's start token; DataError if the model could not start or end a text."""
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


def read(name: str, settings: TaskSettings, labelled: bool) -> list[Row]:
    """Read rows of source texts, and with labels their targets."""
    group = settings.group_column(name, labelled)
    return read_pairs(
        name,
        settings.data.text_column,
        settings.label_column(labelled),
        options=settings.file_options,
        more=[group] if group else [],
    )


def encode(
    rows: list[Row],
    processor: PairTokenizer,
    settings: TaskSettings,
    labels: Sequence[str],
    labelled: bool,
    bleu_tokenizer: str = "",
) -> TextExamples[Seq2SeqRecord]:
    """Encode the prefix and source of each row, and with labels its target. bleu_tokenizer: "" without BLEU."""
    return encode_pairs(
        rows,
        processor,
        source=settings.data.text_column,
        target=settings.label_column(labelled),
        prefix=settings.own.source_prefix,
        max_length=settings.data.max_length,
        max_target_length=settings.own.max_target_length,
        bleu_tokenizer=bleu_tokenizer,
        max_new_tokens=settings.generate.max_new_tokens,
    )


def augment(examples: Examples, rows: list[Row], encode: RowEncoder, settings: AugmentSettings, seed: int) -> Examples:
    """Augment the source by every change of [augment.text]; the target never changes."""
    return augment_columns(examples, rows, encode, settings, seed, [encode.settings.data.text_column])


def write_texts(
    model: TaskModel, indices: Sequence[int], examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings
) -> list[tuple[str, Generated]]:
    """Return the texts that the model writes for these examples, each with its tokens."""
    sources = [examples.sequence(i) for i in indices]
    numbers = examples.numbers_of(indices)
    written = generate(model, sources, generation_settings(model, settings), examples=numbers)
    tokenizer = examples.record.tokenizer
    return [(tokenizer.decode(tokens.ids, skip_special_tokens=True).strip(), tokens) for tokens in written]


def evaluate_texts(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings
) -> Evaluated:
    """Return the loss of a batch, the texts that the model writes for it, and their references."""
    _ = batch.required_labels  # TypeError without labels
    loss_sum = model(batch).loss_sum
    references = [examples.record.references[i] for i in batch.indices]
    written = [text for text, _ in write_texts(model, batch.indices, examples, settings)]
    return Evaluated(loss_sum, batch.num_targets, written, references)


def evaluate_each_text(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], settings: GenerateSettings
) -> tuple[Tensor, list[str], list[str]]:
    """Return [sum of losses, targets] of each example, (B, 2) fp64 on the CPU, the texts written, the references."""
    losses = by_example.token_rows(model(batch).logits, batch)[:, [0, 2]].cpu()
    written = [text for text, _ in write_texts(model, batch.indices, examples, settings)]
    return losses, written, [examples.record.references[i] for i in batch.indices]


def references(examples: TextExamples[Seq2SeqRecord], labels: Sequence[str]) -> list[str]:
    """Return the target of each example."""
    return list(examples.record.references)


def predict_batch(
    model: TaskModel, batch: Batch, examples: TextExamples[Seq2SeqRecord], generate: GenerateSettings
) -> list[dict[str, Any]]:
    """Return each text, its score (log-probability / length ** length_penalty), and whether the model ended it."""
    end_tokens = generation_settings(model, generate).eos_token_id
    return [
        {"text": text, "score": tokens.score, "finished": tokens.ids[-1] in end_tokens}
        for text, tokens in write_texts(model, batch.indices, examples, generate)
    ]


def show_generations(
    model: TaskModel, examples: TextExamples[Seq2SeqRecord], generate: GenerateSettings, count: int
) -> str:
    """Return the source, the reference and the model's text for each of the first `count` examples."""
    indices, record = range(min(count, len(examples))), examples.record
    lines = []
    for i, (text, _) in zip(indices, write_texts(model, indices, examples, generate), strict=True):
        shown = {"source": record.sources[i], "reference": record.references[i], "written": text}
        lines.append(f"id {examples.ids[i]}")
        lines += [f"  {name:>9}: {' '.join(value.split())[:SHOWN_CHARACTERS]}" for name, value in shown.items()]
    return "\n".join(lines)
