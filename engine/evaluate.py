"""Evaluate a trained model on labelled data. As a command:

    python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]

RUN is a run folder, whose best/ is used, or a checkpoint folder. Settings are those of its recipe unless given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import models
from data import Examples, MicroBatching, Rows, evaluation_batches
from data.errors import DataError
from engine import cli, distributed, validate
from engine.config import Config, ConfigError, GenerateSettings
from engine.distributed import Ranks
from engine.log import progress
from engine.model import disable_cudnn_attention
from engine.precision import Precision
from engine.tasks import Task, check_labels, find_task, read_file

USAGE = "python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]"
OPTIONS = {"output": "also write the metrics to this file, as one JSON object"}


@dataclass(frozen=True)
class EvaluationContext:
    """What all evaluations and predictions of a run share."""

    task: Task
    precision: Precision
    ranks: Ranks
    batch_tokens: int  # largest number of tokens of a batch on one rank
    generate: GenerateSettings

    @property
    def limits(self) -> MicroBatching:
        """The limits of a batch, and which of the ranks this one is."""
        return MicroBatching(max_tokens=self.batch_tokens, rank=self.ranks.rank, world_size=self.ranks.world_size)


def evaluate(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> dict[str, float]:
    """Return the metrics of the model on the examples, equal on all ranks; {} for no examples."""
    if not len(examples):
        return {}
    return context.task.compute_metrics(sum_statistics(model, examples, context), model.labels)


@torch.no_grad()
def sum_statistics(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> torch.Tensor:
    """Return the task's statistics summed over all examples, equal on all ranks, in fp64 on the CPU.

    The model is in evaluation mode meanwhile; afterwards its mode is restored.
    """
    was_training = model.training
    model.eval()
    ranks = context.ranks
    update = progress(ranks, len(examples) // ranks.world_size, "evaluating")

    def evaluate_indices(indices: np.ndarray) -> torch.Tensor:
        batch = examples.batch(indices).upload(ranks.device)
        statistics = context.task.evaluate_batch(model, batch, examples, context.generate)
        update(len(indices))
        return statistics

    with context.precision.autocast():  # one context, so that the weights are cast once
        total = evaluate_indices(np.empty(0, dtype=np.int64))  # zeros, for a rank without examples
        for indices in evaluation_batches(examples, context.limits):
            total += evaluate_indices(indices)  # on the GPU where the task keeps them there: one read, at the end
    model.train(was_training)
    return distributed.reduce_sum(total)


def show_generations(model: models.TaskModel, examples: Examples, context: EvaluationContext, count: int) -> str:
    """Return the texts that an evaluation shows, written in the precision of the evaluation."""
    with context.precision.autocast():
        return context.task.show_generations(model, examples, context.generate, count)


def open_trained(
    folder: Path, config: Config, source: str, labelled: bool
) -> tuple[models.TaskModel, Examples, EvaluationContext, Rows]:
    """Return a trained model, the encoded examples of `source`, the context to evaluate or predict in, and the rows.

    The rows are those of the examples, with what is to be said about the file. Rows without a text are left out.

    folder: a checkpoint. config: its recipe with overrides. source: a file, a folder of images, or in-memory rows.
    Raises ConfigError, DataError or ModelError where these do not fit together.
    """
    ranks = distributed.setup(config.run.device)
    task, _ = find_task(config.run.task)
    config = replace(config, data=replace(config.data, cache=""))  # a folder of the training machine
    settings = replace(validate.task_settings(config, task), accept_empty=True)
    rows = read_file(task, source, settings, labelled)
    model = models.from_pretrained(folder, head=task.head)
    if labelled:
        check_labels(task, source, rows, settings, model.labels)
    processor = task.load_processor(folder)
    validate.check_fit(config, model, processor)
    examples = task.encoder(processor, settings, model.labels)(rows, labelled)
    validate.check_encoded(config, model, examples)
    precision = Precision(config.train.precision, ranks.device)
    model.to(ranks.device)
    disable_cudnn_attention(model)
    context = EvaluationContext(task, precision, ranks, config.eval.batch_tokens, config.generate)
    return model, examples, context, rows


def main(argv: Sequence[str]) -> int:
    folder, config, options = cli.open_model(argv, USAGE, OPTIONS, more=["data.test"])
    test = config.data.test
    if not test:
        raise ConfigError("data.test is empty: --data.test FILE names the labelled file to evaluate on")
    output = cli.check_output(options["output"], test) if "output" in options else None
    model, examples, context, rows = open_trained(folder, config, test, labelled=True)
    if not len(examples):
        raise DataError(f"{test}: every row is left out: {rows.left_out[0].reason}")
    statistics = sum_statistics(model, examples, context)
    if context.ranks.is_main:
        metrics = context.task.compute_metrics(statistics, model.labels)
        print(f"{folder}: {len(examples):,} examples of {test}")
        print("".join(f"  {note}\n" for note in (*rows.notes, *examples.notes)), end="")
        width = max(10, *map(len, metrics))
        print("\n".join(f"{name:>{width}}  {value:.4f}" for name, value in metrics.items()))
        if table := context.task.format_table(statistics, model.labels):
            print(table)
        if output is not None:
            counts = {"examples": len(examples), "left_out": len(rows.left_out)}
            result = {"checkpoint": str(folder), "data": test, **counts, **metrics}
            cli.write_output(output, [json.dumps(result)])
    return 0


if __name__ == "__main__":
    cli.run_command(main)
