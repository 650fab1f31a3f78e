"""What is about to be trained on what: printed when a run starts, and all that `--dry-run` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data import Examples, MicroBatching, steps_per_epoch
from data.image_preprocessing import Preprocessing
from data.loader import cut as cut_step
from engine.config import Config, ConfigError, get, recipe_of, to_toml
from engine.config.schema import all_settings
from engine.tasks import TASKS
from engine.tasks.task import OF_SOME_TASKS
from models import TaskModel

MOST_LABELS = 20  # whose counts are shown


def check_fit(config: Config, model: TaskModel, processor: Any) -> None:
    """ConfigError when the inputs as `processor` prepares them do not fit what the model reads.

    Also for a setting that this task does not read: what has no effect was meant to have one.
    """
    _check_used(config)
    if not isinstance(processor, Preprocessing):  # of images, which a ViT scales its positions to
        _check_tokens(config, model, getattr(processor, "tokenizer", processor))  # a PairTokenizer holds one


def _check_used(config: Config) -> None:
    task, default = TASKS[config.run.task], Config()
    unread = [name for name in OF_SOME_TASKS if name not in task.reads]
    for key in all_settings(default):
        of_others = key in unread or key.partition(".")[0] in unread
        if of_others and get(config, key) != get(default, key):
            raise ConfigError(f"{key} = {get(config, key)!r} has no effect on {config.run.task}: leave it out")

    for name in ("mixup", "cutmix"):
        if config.data.teacher and get(config, f"augment.image.{name}"):
            raise ConfigError(
                f"augment.image.{name} mixes two examples, of which data.teacher judges one: leave one out"
            )


def _check_tokens(config: Config, model: TaskModel, tokenizer: Tokenizer) -> None:
    """Texts or ids that exceed what the model has embeddings for."""
    if config.data.max_length > model.max_length:
        raise ConfigError(
            f"data.max_length = {config.data.max_length}, but {config.model.name} has {model.max_length} positions: "
            "lower data.max_length"
        )
    special = tokenizer.num_special_tokens_to_add(bool(config.data.text_pair))
    if config.data.max_length <= special:
        raise ConfigError(
            f"data.max_length = {config.data.max_length} leaves no room beside {special} special tokens: raise it"
        )
    rows = model.backbone.config.vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])  # more than their number, with gaps
    if largest >= rows:
        raise ConfigError(
            f"{config.model.name}: the tokenizer gives {token!r} the id {largest}, the embedding has {rows} rows"
        )


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
        sheet = TASKS[config.run.task].sheet(train_set, Path(f"{config.run.folder}-augmented.png"))
        parts += [sheet] if sheet else []
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs = total_steps / steps_per_epoch(len(train_set), config.train.batch_size)
    parts.append(
        f"parameters: {parameters:,}, {trained:,} of them trained\n"
        f"{plural(total_steps, 'step')} of {plural(config.train.batch_size, 'example')}, "
        f"{epochs:.4g} epoch{'' if epochs == 1 else 's'}\n" + how_it_is_cut(config.train.batch_size, train_set, cut)
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
        text += f"; {plural(targets, 'text')} to be written cut to data.max_target_length"
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
    by_rank = [cut_step(np.arange(size), examples.lengths, replace(cut, rank=r)) for r in range(cut.world_size)]
    sizes = [len(part) for parts in by_rank for part in parts]
    if cut.tokens:
        text = f"{whole} = {ranks} x about {plural(len(by_rank[0]), 'micro-batch')} of at most {cut.tokens:,} tokens"
        longer = int((examples.lengths > cut.tokens).sum())
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
