"""One pass over labelled data. As a command:

    python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder; settings are those of its recipe unless given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch

import models
from data import Examples, MicroBatching, evaluation_batches
from engine import cli, distributed, validate
from engine.cli import check_output, open_model, write_whole
from engine.config import (
    ConfigError,
    GenerateSettings,
)
from engine.distributed import Ranks
from engine.log import progress
from engine.precision import Precision
from engine.tasks import Task, find_task

USAGE = "python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]"
OPTIONS = {"output": "also write the metrics to this file, as one JSON object"}


@torch.no_grad()
def evaluate(
    model: models.TaskModel,
    examples: Examples,
    task: Task,
    amp: Precision,
    ranks: Ranks,
    batch_tokens: int,
    generate: GenerateSettings,
) -> torch.Tensor:
    """The task's statistics summed over every example once, on all ranks. Leaves the model in its mode."""
    was_training = model.training
    model.eval()
    cut = MicroBatching(tokens=batch_tokens, rank=ranks.rank, world_size=ranks.world_size)
    update = progress(ranks, len(examples) // ranks.world_size, "evaluating")

    def count(part: np.ndarray) -> torch.Tensor:
        batch = examples.batch(part).to(ranks.device)
        with amp.autocast():
            statistics = task.measure(model, batch, examples, generate)
        update(len(part))
        return statistics.to(ranks.device)

    total = count(np.empty(0, dtype=np.int64))  # zeros, also on a rank that has no example
    for part in evaluation_batches(examples, cut):
        total += count(part)
    model.train(was_training)
    return distributed.reduce_sum(total)


def measure(
    model: models.TaskModel,
    examples: Examples,
    task: Task,
    amp: Precision,
    ranks: Ranks,
    batch_tokens: int,
    generate: GenerateSettings,
) -> dict[str, float]:
    """The metrics of one pass; none of no examples."""
    if not len(examples):
        return {}
    statistics = evaluate(model, examples, task, amp, ranks, batch_tokens, generate)
    return task.summarize(statistics, model.labels)


def main(argv: Sequence[str]) -> int:
    folder, config, own = open_model(argv, USAGE, OPTIONS, more=["data.test"])
    if not config.data.test:
        raise ConfigError("data.test is empty: --data.test FILE names the labelled file to evaluate on")
    output = check_output(own["output"], config.data.test) if "output" in own else None
    ranks = distributed.setup(config.run.device)
    task, _ = find_task(config.run.task)
    data = config.data
    settings = validate.task_settings(config, task)
    rows = task.read(data.test, settings, True)
    model = models.from_pretrained(folder, head=task.head)
    task.check_labels(data.test, rows, settings, model.labels)
    processor = task.load(folder)
    validate.check_fit(config, model, processor)
    examples = task.encode(rows, processor, settings, model.labels, True)
    amp = Precision(config.train.precision, ranks.device)
    model.to(ranks.device)
    statistics = evaluate(model, examples, task, amp, ranks, config.eval.batch_tokens, config.generate)
    if ranks.is_main:
        metrics = task.summarize(statistics, model.labels)
        cut = f" ({examples.truncated:,} cut to data.max_length)" if examples.truncated else ""
        print(f"{folder}: {len(examples):,} examples of {config.data.test}{cut}")
        width = max(10, *map(len, metrics))
        print("\n".join(f"{name:>{width}}  {value:.4f}" for name, value in metrics.items()))
        if table := task.table(statistics, model.labels):
            print(table)
        if output is not None:
            result = {"checkpoint": str(folder), "data": config.data.test, "examples": len(examples), **metrics}
            write_whole(output, [json.dumps(result)])
    return 0


if __name__ == "__main__":
    cli.run_command(main)
