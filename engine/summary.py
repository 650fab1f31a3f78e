"""What is about to be trained on what: printed when a run starts, and all that `--dry-run` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import Examples, MicroBatching, steps_per_epoch
from data.loader import split_into_micro_batches
from engine.config import Config, recipe_of, to_toml
from engine.tasks import TASKS
from models import TaskModel

MOST_LABELS = 20  # whose counts are shown


def run(
    config: Config,
    model: TaskModel,
    processor: Any,
    train_set: Examples,
    validation_set: Examples,
    test_set: Examples,
    total_steps: int,
    cut: MicroBatching,
) -> str:
    """The load report, the data and the plan; for a dry run also the resolved recipe and the first examples."""
    full = config.run.dry_run
    parts = [to_toml(recipe_of(config))] if full else []
    parts.append(str(model.report))
    for name, examples in {"training": train_set, "validation": validation_set, "test": test_set}.items():
        if len(examples):
            parts.append(summary(name, examples, model.labels))
    if untaught := labels_without_an_example(train_set, model.labels):
        more = f" and {len(untaught) - MOST_LABELS:,} more" if len(untaught) > MOST_LABELS else ""
        parts.append(f"warning: no training example of {', '.join(map(repr, untaught[:MOST_LABELS]))}{more}")
    if full:
        parts.append(first_examples(train_set, processor, model.labels))
        sheet = TASKS[config.run.task].show_augmented(train_set, Path(f"{config.run.folder}-augmented.png"))
        parts += [sheet] if sheet else []
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs = total_steps / steps_per_epoch(len(train_set), config.train.global_batch_size)
    parts.append(
        f"parameters: {parameters:,}, {trained:,} of them trained\n"
        f"{plural(total_steps, 'step')} of {plural(config.train.global_batch_size, 'example')}, "
        f"{epochs:.4g} epoch{'' if epochs == 1 else 's'}\n"
        + how_it_is_cut(config.train.global_batch_size, train_set, cut)
    )
    return "\n\n".join(parts) + "\n"


def summary(name: str, examples: Examples, labels: tuple[str, ...]) -> str:
    """Counts, lengths in tokens, truncation and labels of a data set."""
    lengths = examples.lengths
    spread = ", ".join(f"{q}% {int(np.percentile(lengths, q))}" for q in (50, 95, 100))
    text = f"{name}: {plural(len(examples), 'example')}, {plural(int(lengths.sum()), 'token')}"
    text += f" (mean {lengths.mean():.1f}, {spread})"
    if examples.truncated:
        text += f"; {plural(examples.truncated, 'text')} cut to data.max_length"
    if targets := examples.extra.get("truncated_targets"):
        text += f"; {plural(targets, 'text')} to be written cut to seq2seq.max_target_length"
    if words := examples.extra.get("lost_words"):
        text += f"; {plural(words, 'word')} without a token"
    counts = examples.label_counts(len(labels))
    if counts is not None:
        shown = [f"{label} {n:,}" for label, n in zip(labels[:MOST_LABELS], counts, strict=False)]
        more = [f"and {len(labels) - MOST_LABELS:,} more"] if len(labels) > MOST_LABELS else []
        text += "\n  labels: " + ", ".join(shown + more)
    return text


def labels_without_an_example(examples: Examples, labels: tuple[str, ...]) -> list[str]:
    """What cannot be learned: declared and not in the file, or all held out with their groups."""
    counts = examples.label_counts(len(labels))
    return [] if counts is None else [label for label, count in zip(labels, counts, strict=True) if not count]


def first_examples(examples: Examples, processor: Any, labels: tuple[str, ...], count: int = 3) -> str:
    """The first `count` examples as the model reads them, with their labels."""
    lines = ["first encoded examples:"]
    for i in range(min(count, len(examples))):
        first, *more = examples.show(i, processor, labels)
        lines += [f"  {first}", *(f"    {line}" for line in more)]
    return "\n".join(lines)


def how_it_is_cut(batch_size: int, examples: Examples, cut: MicroBatching) -> str:
    """batch_size = ranks x accumulation x micro-batch, with the real numbers where they do not divide.

    Under a limit in tokens the number of micro-batches varies with the lengths: that of one step is shown, as "about".
    """
    size = min(batch_size, len(examples))
    whole = f"batch_size {batch_size:,}"
    if size < batch_size:
        whole += f" is more than the training data has, so a step takes all {size:,}"
    share, extra = divmod(size, cut.world_size)
    ranks = plural(cut.world_size, "rank")
    if extra:
        ranks += f" ({extra} with {plural(share + 1, 'example')}, {cut.world_size - extra} with {share:,})"
    by_rank = [split_into_micro_batches(np.arange(size), examples.lengths, replace(cut, rank=r)) for r in range(cut.world_size)]
    sizes = [len(part) for parts in by_rank for part in parts]
    if cut.max_tokens:
        text = f"{whole} = {ranks} x about {plural(len(by_rank[0]), 'micro-batch')} of at most {cut.max_tokens:,} tokens"
        longer = int((examples.lengths > cut.max_tokens).sum())
        text += f"; {plural(longer, 'example')} with more stand{'' if longer > 1 else 's'} alone" if longer else ""
    else:
        spread = (
            plural(max(sizes), "example") if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,} examples"
        )
        text = f"{whole} = {ranks} x accumulation {len(by_rank[0]):,} x micro-batch of {spread}"
    if last := len(examples) % size:
        text += f"; the last step of an epoch has {plural(last, 'example')}"
    return text


def plural(count: int, noun: str) -> str:
    """1 example, 1,000 examples, 2 micro-batches."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"
