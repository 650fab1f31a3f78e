"""Evaluate a trained model on labelled data. As a command:

    python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]

RUN is a run folder, whose best/ is used, or a checkpoint folder. Settings are those of its recipe unless given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

import models
from data import Batch, Examples, MicroBatching, Rows, evaluation_batches
from data.errors import DataError
from data.loader import split_into_micro_batches
from data.writing import to_json
from engine import cli, distributed, validate
from engine.config import Config, ConfigError, GenerateSettings
from engine.distributed import Ranks
from engine.errors import TrainingError
from engine.kernels import choose_kernels
from engine.log import progress
from engine.memory import OutOfMemory, catch_out_of_memory, free_bytes
from engine.model import disable_cudnn_attention
from engine.precision import Precision
from engine.tasks import Task, TaskSettings, check_labels, find_task, read_file

USAGE = "python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]"
OPTIONS = {"output FILE": "also write the metrics to this file, as one JSON object"}

AUTO_TOKENS = {"cpu": 4096, "cuda": 32_768}  # of a batch; more would not be faster
BYTES_PER_LOGIT = 12  # of a language model: in 16 bits, in fp32, and its log-softmax, with a margin
SHARE_OF_LOGITS = 0.5  # of a GPU's free memory

Result = TypeVar("Result")


@dataclass
class EvaluationContext:
    """What all evaluations and predictions of a run share.

    batch_tokens: eval.batch_tokens.
    should_stop: whether an evaluation should end, asked after each batch.
    max_tokens: the largest number of tokens of a batch on this rank. Where a batch does not fit into memory, it is
        halved for the rest of the run. It changes no result and no other rank.
    was_stopped: whether an evaluation ended so, the same on all ranks; it and those after it have no metrics.
    """

    task: Task
    precision: Precision
    ranks: Ranks
    batch_tokens: int | Literal["auto"]
    generate: GenerateSettings
    should_stop: Callable[[], bool] = lambda: False
    max_tokens: int = field(init=False)
    was_stopped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        tokens = self.batch_tokens
        self.max_tokens = AUTO_TOKENS[self.ranks.device.type] if tokens == "auto" else tokens

    @property
    def limits(self) -> MicroBatching:
        """The limits of a batch, and which of the ranks this one is."""
        world_size = self.ranks.world_size  # 1 also where this rank has examples of its own
        return MicroBatching(max_tokens=self.max_tokens, rank=self.ranks.rank % world_size, world_size=world_size)


def run_in_batches(
    examples: Examples, context: EvaluationContext, compute: Callable[[Batch], Result], doing: str
) -> Iterator[tuple[Batch, Result]]:
    """Yield this rank's batches of the examples and what `compute` returns for each, with a progress bar.

    doing: the label of the bar. A batch that does not fit into memory and those after it are split into smaller ones.
    Raises TrainingError where a single example does not fit.
    """
    ranks = context.ranks
    update = progress(ranks, len(examples) // ranks.world_size, doing)
    waiting = evaluation_batches(examples, context.limits)
    while waiting:
        indices = waiting[0]
        with catch_out_of_memory() as out_of_memory:
            batch = examples.batch(indices).upload(ranks.device)
            result = compute(batch)
        if out_of_memory:
            context.max_tokens = _halve(int(examples.lengths[indices].sum()), len(indices), doing, out_of_memory, ranks)
            limits = MicroBatching(max_tokens=context.max_tokens)
            waiting = split_into_micro_batches(np.concatenate(waiting), examples.lengths, limits)
            continue
        del waiting[0]
        update(len(indices))
        yield batch, result


def tokens_that_fit(model: models.TaskModel, device: torch.device) -> int:
    """Return the tokens of a batch: AUTO_TOKENS; fewer where the logits of a language model would fill a GPU.

    The 50,257 logits of GPT-2 need 0.6 MB a token: 20 GB for 32,768 tokens.
    """
    most = AUTO_TOKENS[device.type]
    if device.type != "cuda" or model.head is None or not model.head.is_language_model:
        return most
    fitting = SHARE_OF_LOGITS * free_bytes(device) / (BYTES_PER_LOGIT * model.head.shape.vocab_size)
    return min(most, max(1, int(fitting)))


def _halve(tokens: int, count: int, doing: str, caught: OutOfMemory, ranks: Ranks) -> int:
    """Return half the tokens of a batch of `count` examples that did not fit; TrainingError if it has one example."""
    if count < 2:
        raise TrainingError(
            f"{doing}: one example of {tokens:,} tokens does not fit into memory; a lower data.max_length needs less"
        ) from caught.error
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # libraries such as cuBLAS allocate what torch does not hold
    print(f"{doing}: out of memory; from here on {tokens // 2:,} tokens at a time", file=sys.stderr, flush=True)
    return tokens // 2


def evaluate(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> dict[str, float]:
    """Return the metrics of the model on the examples, equal on all ranks; {} for no examples, or if it was stopped."""
    if not len(examples) or context.was_stopped:
        return {}
    statistics = sum_statistics(model, examples, context)
    return {} if context.was_stopped else context.task.compute_metrics(statistics, model.labels)


@torch.no_grad()
def sum_statistics(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> torch.Tensor:
    """Return the task's statistics summed over all examples, equal on all ranks, in fp64 on the CPU.

    The model is in evaluation mode meanwhile; afterwards its mode is restored.
    """
    was_training = model.training
    model.eval()
    if context.batch_tokens == "auto":
        context.max_tokens = min(context.max_tokens, tokens_that_fit(model, context.ranks.device))

    def compute(batch: Batch) -> torch.Tensor:
        return context.task.evaluate_batch(model, batch, examples, context.generate)

    with context.precision.autocast():  # around all batches, so that the weights are cast once
        # Zeros, so that a rank without examples has statistics too. The sum is on a GPU where the task keeps it there:
        # it is read once, at the end.
        total = compute(examples.batch([]).upload(context.ranks.device))
        for _, statistics in run_in_batches(examples, context, compute, "evaluating"):
            total += statistics
            if context.should_stop():
                break
    model.train(was_training)
    context.was_stopped = any(distributed.all_sum(context.should_stop()))
    return distributed.reduce_sum(total)


def show_generations(model: models.TaskModel, examples: Examples, context: EvaluationContext, count: int) -> str:
    """Return the texts that an evaluation shows, written in its precision; "" if it was stopped, and on other ranks."""
    if not context.ranks.is_main or context.was_stopped:
        return ""
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
    config, task, settings, ranks = start(config)
    rows = read_file(task, source, settings, labelled)
    model, processor = load_trained(folder, config, task)
    if labelled:
        check_labels(task, source, rows, settings, model.labels)
    examples = task.encoder(processor, settings, model.labels)(rows, labelled)
    validate.check_encoded(config, model, examples)
    if ranks.world_size > 1:
        distributed.check_agreement(validate.shared_settings(config) | {"the data": examples.fingerprint()})
    return model, examples, make_context(model, config, task, ranks), rows


def start(config: Config) -> tuple[Config, Task, TaskSettings, Ranks]:
    """Join the other ranks; return the configuration for the use of a trained model, its task and its settings."""
    ranks = distributed.setup(config.run.device, config.distributed.timeout_seconds)
    task, _ = find_task(config.run.task)
    config = replace(config, data=replace(config.data, cache=""))  # a folder of the training machine
    return config, task, replace(validate.task_settings(config, task), accept_empty=True), ranks


def load_trained(folder: Path, config: Config, task: Task) -> tuple[models.TaskModel, Any]:
    """Return the model of a checkpoint, and the tokenizer or image preprocessing that fits it."""
    model = models.from_pretrained(folder, head=task.head)
    processor = task.load_processor(folder)
    validate.check_fit(config, model, processor)
    return model, processor


def make_context(model: models.TaskModel, config: Config, task: Task, ranks: Ranks) -> EvaluationContext:
    """Move the model to this rank's device, choose its kernels, and return the context of evaluations there."""
    precision = Precision(config.train.precision, ranks.device)
    model.to(ranks.device)
    choose_kernels(ranks.device, config.train.tf32, config.run.deterministic)
    disable_cudnn_attention(model)
    return EvaluationContext(task, precision, ranks, config.eval.batch_tokens, config.generate)


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
        console = cli.console_beside(output)
        print(f"{folder}: {len(examples):,} examples of {test}", file=console)
        print("".join(f"  {note}\n" for note in (*rows.notes, *examples.notes)), end="", file=console)
        width = max(10, *map(len, metrics))
        print("\n".join(f"{name:>{width}}  {value:.4f}" for name, value in metrics.items()), file=console)
        if table := context.task.format_table(statistics, model.labels):
            print(table, file=console)
        if output is not None:
            counts = {"examples": len(examples), "left_out": len(rows.left_out)}
            result = {"checkpoint": str(folder), "data": test, **counts, **metrics}
            cli.write_output(output, [to_json(result)])
    return 0


if __name__ == "__main__":
    cli.run_command(main)
