"""What is about to be trained on what: printed when a run starts, and all that `--dry-run` does."""

from __future__ import annotations

import math

import numpy as np
from tokenizers import Tokenizer

from data import Cut, TextExamples
from data.loader import cut as cut_step
from engine.config import Config, ConfigError, to_toml
from models import TaskModel


def check_fit(config: Config, model: TaskModel, tokenizer: Tokenizer) -> None:
    """ConfigError when texts or ids can exceed what the model has embeddings for."""
    if config.data.max_length > model.max_length:
        raise ConfigError(
            f"data.max_length = {config.data.max_length}, but {config.model.name} has positions for {model.max_length}"
        )
    special = tokenizer.num_special_tokens_to_add(bool(config.data.text_pair))
    if config.data.max_length <= special:
        raise ConfigError(f"data.max_length = {config.data.max_length} leaves no room beside {special} special tokens")
    rows = model.raw_config["vocab_size"]
    if tokenizer.get_vocab_size() > rows:
        raise ConfigError(
            f"{config.model.name}: the tokenizer has {tokenizer.get_vocab_size()} ids, the embedding {rows} rows"
        )


def run(
    config: Config,
    model: TaskModel,
    tokenizer: Tokenizer,
    train_set: TextExamples,
    validation_set: TextExamples,
    total_steps: int,
    cut: Cut,
) -> str:
    """The load report, the data and the plan; for a dry run also the resolved recipe and the first examples."""
    full = config.run.dry_run
    parts = [to_toml(config)] if full else []
    parts.append(str(model.report))
    parts.append(summary("training", train_set, model.labels))
    parts.append(summary("validation", validation_set, model.labels))
    if full:
        parts += [first_examples(train_set, tokenizer, model.labels)]
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs = total_steps * config.train.batch_size / len(train_set)
    parts.append(
        f"parameters: {parameters:,}, {trained:,} of them trained; "
        f"{total_steps:,} steps of {config.train.batch_size} examples, about {epochs:.2f} epochs\n"
        + how_it_is_cut(config, train_set, cut)
    )
    return "\n\n".join(parts) + "\n"


def summary(name: str, examples: TextExamples, labels: tuple[str, ...]) -> str:
    """Counts, lengths in tokens, truncation and labels of a data set."""
    lengths = examples.lengths
    spread = ", ".join(f"{q}% {int(np.percentile(lengths, q))}" for q in (50, 95, 100))
    text = f"{name}: {len(examples):,} examples, {lengths.sum():,} tokens (mean {lengths.mean():.1f}, {spread})"
    if examples.truncated:
        text += f"; {examples.truncated:,} texts cut to data.max_length"
    if examples.labels is not None:
        counts = np.bincount(examples.labels, minlength=len(labels))
        text += "\n  labels: " + ", ".join(f"{label} {n:,}" for label, n in zip(labels, counts, strict=True))
    return text


def first_examples(examples: TextExamples, tokenizer: Tokenizer, labels: tuple[str, ...], count: int = 3) -> str:
    lines = ["first encoded examples:"]
    for i in range(min(count, len(examples))):
        ids = examples.input_ids[examples.offsets[i] : examples.offsets[i + 1]].tolist()
        label = "" if examples.labels is None else f"  {labels[examples.labels[i]]}"
        lines += [
            f"  id {examples.ids[i]}{label}",
            f"    {' '.join(str(tokenizer.id_to_token(k)) for k in ids)}",
            f"    {ids}",
        ]
    return "\n".join(lines)


def how_it_is_cut(config: Config, examples: TextExamples, cut: Cut) -> str:
    """batch_size = ranks x accumulation x micro-batch, with the real numbers where they do not divide."""
    size = min(config.train.batch_size, len(examples))
    shares = [len(range(rank, size, cut.world_size)) for rank in range(cut.world_size)]
    ranks = f"{cut.world_size} rank{'s' if cut.world_size > 1 else ''}"
    if shares[0] != shares[-1]:
        ranks += f" ({' + '.join(map(str, shares))} examples)"
    if cut.tokens:
        count = len(cut_step(np.arange(size), examples.lengths, cut))
        return f"batch_size {size} = {ranks} x about {count} micro-batches of at most {cut.tokens} tokens"
    accumulation = math.ceil(shares[0] / cut.examples) if cut.examples else 1
    return (
        f"batch_size {size} = {ranks} x accumulation {accumulation} x micro-batch {math.ceil(shares[0] / accumulation)}"
    )
