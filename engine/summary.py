"""The summary that is printed before a run: the model, the data and the steps. `--dry-run` prints more and stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Examples, MicroBatching, steps_per_epoch
from data.cache import notes_of
from data.lengths import count_lengths, percentile
from data.loader import split_into_micro_batches
from data.multi_task import MultiTaskExamples, labels_of
from data.notes import count_of, list_some, printable, short_label
from engine.config import Config, to_dict, to_recipe, to_short_toml, to_toml
from engine.first_screen import (
    SHOWN_LABELS,
    Summary,
    describe_data,
    describe_device,
    describe_model,
    shorten_step,
    split_warnings,
    unusual_report,
)
from engine.imbalance import warn_of_missing
from engine.multi_task import describe_tasks, open_task
from engine.run_end import choose_columns
from engine.tasks import Task
from engine.tasks.multi_task import MultiTask
from engine.watch import warn_of_metric
from models import TaskModel, explain_export
from models.frozen_linear import count_parameters


def describe_run(
    config: Config,
    model: TaskModel,
    processor: Any,
    sets: tuple[Examples, Examples, Examples],
    notes: Sequence[str],
    total_steps: int,
    limits: MicroBatching,
    device: torch.device,
) -> Summary:
    """Return the load report, the data and the steps; in a dry run also the resolved recipe and the first examples.

    sets: the training, validation and test data. notes: sentences about the files and settings.
    """
    train_set = sets[0]
    task, watched = open_task(config)
    views = view_tasks(task, watched, sets, model.labels)
    own_notes = [*notes, *(f"{view.prefix}{line}" for view in views for line in view.warn_of_metric())]
    own_notes += [sentence] if (sentence := explain_export(model)) else []
    own_notes += [f"{view.prefix}{line}" for view in views for line in view.warn_of_missing()]
    own_notes += [describe_tasks(task, train_set, model)] if isinstance(task, MultiTask) else []
    found = [split_warnings(own_notes)]
    found += [split_warnings(model.report.notes, "model: ")]
    paragraphs = [describe_examples(name, examples, labels) for name, examples, labels in each_set(views)]
    found += [split_warnings(notes_of(examples), f"{name}: ") for name, examples, _ in each_set(views)]
    warnings, others = ([line for lines in of_kind for line in lines] for of_kind in zip(*found, strict=True))
    if config.run.dry_run:
        paragraphs += [view.show_examples(processor) for view in views]
        augmented = task.show_augmented(train_set, Path(f"{config.run.folder}-augmented.png"))
        paragraphs += [augmented] if augmented else []
    size = count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch_size = config.train.global_batch_size
    epoch_steps = steps_per_epoch(len(train_set), batch_size)
    epochs = total_steps / epoch_steps
    steps = f"{count_of(total_steps, 'step')} of {count_of(batch_size, 'example')}"
    steps += f", {epochs:.4g} epoch{'' if epochs == 1 else 's'}"
    step = describe_step(batch_size, train_set, limits)
    where = f"{describe_device(device)}, {config.train.precision}"
    recipe = (to_toml if config.run.show_all else to_short_toml)(to_recipe(config))
    whole = [recipe.rstrip()] if config.run.dry_run else []
    whole += [str(model.report), *(["\n".join(own_notes)] if own_notes else []), *paragraphs]
    whole.append("parameters: {:,}, {:,} of them trained\n".format(*size) + f"{steps}\n{step}\ndevice: {where}")
    facts = {
        "model": describe_model(model, *size, config.model, config.run.folder),
        "task": [f"{config.run.task}{describe_labels(views)}"],
        "data": [describe_data(sets)],
        "device": [f"{where}; {shorten_step(step)}"],
        "steps": [f"{steps}; best by {watched}, every {count_of(config.eval.every_steps or epoch_steps, 'step')}"],
        "output": [config.run.folder],
    }
    chosen = [*task.own_metrics]
    chosen += [f"{part.name}/{part.watched}" for part in task.parts] if isinstance(task, MultiTask) else []
    return Summary(
        full="\n\n".join(whole) + "\n",
        facts=facts,
        warnings=warnings,
        notes=others,
        report=unusual_report(model.report, config.model),
        columns=choose_columns(watched, task.metrics, [*task.details, *views[0].hidden_metrics()], chosen),
        recipe=to_dict(config),
    )


def describe_labels(views: Sequence[View]) -> str:
    """Return the labels of a task with their counts in the training data, or the tasks of a run of several."""
    if len(views) > 1 or views[0].prefix:
        return "; " + list_some([f"{view.prefix}best by {view.watched}" for view in views])
    counts, labels = views[0].sets[0].label_counts(len(views[0].labels)), views[0].labels
    if counts is None or not labels:
        return ""
    shown = [f"{short_label(label)} {n:,}" for label, n in zip(labels, counts, strict=False)]
    return f"; {count_of(len(labels), 'label')}: {list_some(shown, most=SHOWN_LABELS)}"


def each_set(views: Sequence[View]) -> list[tuple[str, Examples, tuple[str, ...]]]:
    """Return (name, examples, labels) of each data set that is not empty."""
    named = [
        (f"{view.prefix}{name}", examples, view.labels)
        for view in views
        for name, examples in zip(("training", "validation", "test"), view.sets, strict=True)
    ]
    return [entry for entry in named if len(entry[1])]


class View(NamedTuple):
    """The task of a run, or one of several, with its own data sets and labels. prefix: its name in lines."""

    prefix: str
    task: Task
    watched: str
    sets: tuple[Examples, ...]  # for training, validation and test
    labels: tuple[str, ...]

    def warn_of_metric(self) -> list[str]:
        """Return a warning if the watched metric cannot compare models."""
        return warn_of_metric(self.task, self.watched, self.sets[1], self.labels)

    def hidden_metrics(self) -> list[str]:
        """Return the metrics that the screen leaves out unless watched: those that cannot compare models."""
        return [*self.task.unusable_metrics(self.sets[1], self.labels)]

    def warn_of_missing(self) -> list[str]:
        """Return warnings of labels without examples."""
        return warn_of_missing(self.sets[0], self.sets[1], self.labels, self.task.metrics)

    def show_examples(self, processor: Any) -> str:
        """Return the first training examples. processor: of the task, or of each of several by name."""
        own = processor[self.prefix.removesuffix(": ")] if self.prefix else processor
        return self.prefix + show_examples(self.sets[0], own, self.labels)


def view_tasks(task: Task, watched: str, sets: tuple[Examples, ...], labels: tuple[str, ...]) -> list[View]:
    """Return the task of a run, or each of several, with its own part of the data."""
    joint = [examples for examples in sets if isinstance(examples, MultiTaskExamples)]
    if not isinstance(task, MultiTask):
        return [View("", task, watched, sets, labels)]
    return [
        View(
            f"{part.name}: ",
            part.task,
            part.watched,
            tuple(examples.parts[part.name] for examples in joint),
            labels_of(part.name, labels),
        )
        for part in task.parts
    ]


def describe_examples(name: str, examples: Examples, labels: tuple[str, ...]) -> str:
    """Return the number of examples, their lengths in tokens, the notes and the labels of a data set, as text."""
    by_length = count_lengths(examples.lengths)
    tokens = int(by_length @ np.arange(len(by_length)))
    spread = ", ".join(f"{q}% {int(percentile(by_length, q))}" for q in (50, 95, 100))
    text = f"{name}: {count_of(len(examples), 'example')}, {count_of(tokens, 'token')}"
    text += f" (mean {tokens / len(examples):.1f}, {spread})"
    text += "".join(f"\n  {note}" for note in notes_of(examples))
    counts = examples.label_counts(len(labels))
    if counts is not None:
        text += "\n  labels: " + list_some(
            [f"{printable(label)} {n:,}" for label, n in zip(labels, counts, strict=False)]
        )
    scores = getattr(examples, "labels", None)
    if counts is None and isinstance(scores, np.ndarray) and scores.dtype.kind == "f":
        text += f"\n  {labels[0] if labels else 'score'}: {scores.min():.4g} to {scores.max():.4g}"
        text += f" (mean {scores.mean():.4g}, 50% {np.median(scores):.4g})"
    return text


def show_examples(examples: Examples, processor: Any, labels: tuple[str, ...], count: int = 3) -> str:
    """Return the first `count` examples as the model reads them, with their labels."""
    lines = ["first encoded examples:"]
    for i in range(min(count, len(examples))):
        first, *more = examples.show(i, processor, labels)
        lines += [f"  {first}", *(f"    {line}" for line in more)]
    return "\n".join(lines)


def describe_step(global_batch_size: int, examples: Examples, limits: MicroBatching) -> str:
    """Return "global_batch_size 32 = 2 ranks x accumulation 2 x micro-batch of 8 examples", with the real numbers.

    With a limit in tokens the number of micro-batches depends on the lengths; "about" marks the number that the first
    examples take.
    """
    size = min(global_batch_size, len(examples))
    step = f"global_batch_size {global_batch_size:,}"
    if size < global_batch_size:
        step += f" is more than the training data has, so a step takes all {size:,}"
    share, extra = divmod(size, limits.world_size)
    ranks = count_of(limits.world_size, "rank")
    if extra:
        ranks += f" ({extra} with {count_of(share + 1, 'example')}, {limits.world_size - extra} with {share:,})"
    by_rank = [
        split_into_micro_batches(np.arange(size), examples.lengths, replace(limits, rank=rank))
        for rank in range(limits.world_size)
    ]
    accumulation = len(by_rank[0])
    if limits.max_tokens:
        text = (
            f"{step} = {ranks} x about {count_of(accumulation, 'micro-batch')} of at most {limits.max_tokens:,} tokens"
        )
        longer = int(count_lengths(examples.lengths)[limits.max_tokens + 1 :].sum())
        text += f"; {count_of(longer, 'longer example')}, each alone in a micro-batch" if longer else ""
    else:
        sizes = [len(micro_batch) for micro_batches in by_rank for micro_batch in micro_batches]
        smallest, largest = min(sizes), max(sizes)
        spread = count_of(largest, "example") if smallest == largest else f"{smallest:,} to {largest:,} examples"
        text = f"{step} = {ranks} x accumulation {accumulation:,} x micro-batch of {spread}"
    if last := len(examples) % size:
        text += f"; the last step of an epoch has {count_of(last, 'example')}"
    return text
