"""Evaluate a trained model on labelled data. As a command:

    python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--against OTHER] [--section.key=value ...]

RUN is a run folder, whose best/ is used, or a checkpoint folder. Settings are those of its recipe unless given.
With --against, RUN and OTHER are compared on the same examples; each may also be a file that engine.predict wrote
(engine/against.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import models
from data import Batch, Examples, Rows
from data.errors import DataError
from data.writing import to_json
from engine import cli, distributed, validate
from engine.calibration import calibration_error, describe_calibration, recorded
from engine.config import Config, ConfigError
from engine.distributed import Ranks
from engine.evaluation_batches import EvaluationContext, run_in_batches, tokens_that_fit
from engine.kernels import choose_kernels
from engine.metrics.bootstrap import MAX_NUMBERS, Interval, confidence_intervals, describe_metrics
from engine.model import disable_cudnn_attention
from engine.mps import move
from engine.precision import Precision
from engine.tasks import Task, TaskSettings, check_labels, find_task, read_file
from engine.tasks.multi_task import MultiTask, join_metrics
from models.multi_task import one_task

USAGE = (
    "python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--against OTHER] [--section.key=value ...]"
)
OPTIONS = {
    "output FILE": "also write the metrics to this file, as one JSON object",
    "against OTHER": "compare RUN with another run, or checkpoint folder, or file of predictions, on the same examples",
}


class Metrics(dict[str, float]):
    """Metrics by name, and with eval.confidence the interval of each."""

    intervals: dict[str, Interval]

    def __init__(self, values: dict[str, float] | None = None, intervals: dict[str, Interval] | None = None):
        super().__init__(values or {})
        self.intervals = intervals or {}

    def with_bounds(self) -> dict[str, float]:
        """Return the metrics, and the bounds of each that has an interval as NAME_low and NAME_high."""
        bounds = [{f"{name}_low": low, f"{name}_high": high} for name, (low, high) in self.intervals.items()]
        return {name: value for values in (self, *bounds) for name, value in values.items()}


class Evaluation(NamedTuple):
    """The metrics of a model on examples, what they were computed from, and with eval.confidence a row an example."""

    metrics: Metrics
    statistics: Tensor
    rows: Tensor | None


def evaluate(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> Metrics:
    """Return the metrics of the model on the examples, equal on all ranks; {} for no examples, or if it was stopped."""
    if not len(examples) or context.was_stopped:
        return Metrics()
    if isinstance(context.task, MultiTask):
        return _evaluate_tasks(model, examples, context.task, context)
    return evaluate_in_full(model, examples, context).metrics


def _evaluate_tasks(model: models.TaskModel, examples: Any, task: MultiTask, context: EvaluationContext) -> Metrics:
    """Return the metrics of several tasks, each evaluated alone, on the shared backbone and its own head."""
    found = {}
    for part in task.parts:
        context.task = part.task
        found[part.name] = evaluate(one_task(model, part.name), examples.parts[part.name], context)
    context.task = task
    intervals = {f"{name}/{key}": value for name, own in found.items() for key, value in own.intervals.items()}
    return Metrics() if context.was_stopped else Metrics(join_metrics(task, found), intervals)


def evaluate_in_full(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> Evaluation:
    """Return the metrics and what they were computed from, equal on all ranks; no metrics if it was stopped."""
    task, ranks = context.task, context.ranks
    rows = example_rows(model, examples, context) if context.confidence else None
    statistics = sum_statistics(model, examples, context) if rows is None else task.collect(rows, model.labels)
    if context.was_stopped:
        return Evaluation(Metrics(), statistics, rows)
    metrics = Metrics(task.compute_metrics(statistics, model.labels))
    metrics.update(compute_own_metrics(model, examples, context))
    if rows is not None and not context.was_stopped:
        inputs = (rows, task.collect, task.compute_metrics, model.labels, context.confidence)
        metrics.intervals = distributed.on_main(ranks, confidence_intervals, *inputs)
    return Evaluation(Metrics() if context.was_stopped else metrics, statistics, rows)


@contextmanager
def _evaluating(model: models.TaskModel, context: EvaluationContext) -> Iterator[None]:
    """Keep the model in evaluation mode, and the precision that of the context, around all batches."""
    was_training = model.training
    model.eval()
    if context.batch_tokens == "auto":
        context.max_tokens = min(context.max_tokens, tokens_that_fit(model, context.ranks.device))
    with context.precision.autocast():  # around all batches, so that the weights are cast once
        yield
    model.train(was_training)


@torch.no_grad()
def example_rows(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> Tensor | None:
    """Return the task's row of each example, (N, K) fp64 on the CPU, equal on all ranks; None for too many numbers."""
    task, ranks = context.task, context.ranks
    if task.evaluate_examples is None:
        raise ConfigError(f"eval.confidence = {context.confidence:g} needs a task with evaluate_examples")

    def compute(batch: Batch) -> Tensor:
        return task.evaluate_examples(model, batch, examples, context.generate)  # type: ignore[misc]

    with _evaluating(model, context):
        width = compute(examples.batch([]).upload(ranks.device)).shape[1]
        if len(examples) * width > MAX_NUMBERS:
            if ranks.is_main:
                print(f"no intervals: {len(examples):,} examples x {width:,} numbers", file=sys.stderr, flush=True)
            return None
        rows = torch.zeros(len(examples), width, dtype=torch.float64)
        for batch, found in run_in_batches(examples, context, compute, "evaluating"):
            rows[list(batch.indices)] = found.double().cpu()
            if context.should_stop():
                break
    context.was_stopped = any(distributed.all_sum(context.should_stop()))
    return distributed.reduce_sum(rows)


def compute_own_metrics(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> dict[str, float]:
    """Return the metrics of plugins that read all predictions and references, equal on all ranks."""
    task = context.task
    if not task.own_metrics or task.references is None:
        return {}
    was_training = model.training
    found = [row.get(task.predicts, row) for row in predict(model, examples, context)]
    model.train(was_training)
    references = task.references(examples, model.labels)
    context.was_stopped = any(distributed.all_sum(context.was_stopped))
    if context.was_stopped:
        return {}
    values: dict[str, float] = distributed.on_main(
        context.ranks, lambda: {name: metric(found, references) for name, metric in task.own_metrics.items()}
    )
    return values


@torch.no_grad()
def predict(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> list[dict[str, Any]]:
    """Return {"id": ..., **prediction of the task} for each example, in their order, on rank 0; [] on other ranks.

    If context.should_stop ends it, some predictions are missing, and context.was_stopped is set.
    """
    model.eval()

    def compute(batch: Batch) -> list[dict[str, Any]]:
        return context.task.predict_batch(model, batch, examples, context.generate)

    rows: list[tuple[int, dict[str, Any]]] = []
    with context.precision.autocast():  # around all batches, so that the weights are cast once
        for batch, predictions in run_in_batches(examples, context, compute, "predicting"):
            for index, example_id, prediction in zip(batch.indices, batch.ids, predictions, strict=True):
                rows.append((index, {"id": example_id, **prediction}))
            if context.should_stop():
                context.was_stopped = len(rows) < len(examples) or context.ranks.world_size > 1
                break
    if context.ranks.world_size > 1:
        rows = [row for rank_rows in distributed.gather_on_main(rows) for row in rank_rows]
    return [prediction for _, prediction in sorted(rows, key=lambda row: row[0])]


@torch.no_grad()
def sum_statistics(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> Tensor:
    """Return the task's statistics summed over all examples, equal on all ranks, in fp64 on the CPU.

    The model is in evaluation mode meanwhile; afterwards its mode is restored.
    """

    def compute(batch: Batch) -> Tensor:
        return context.task.evaluate_batch(model, batch, examples, context.generate)

    with _evaluating(model, context):
        # Zeros, so that a rank without examples has statistics too. The sum is on a GPU where the task keeps it there:
        # it is read once, at the end.
        total = compute(examples.batch([]).upload(context.ranks.device))
        for _, statistics in run_in_batches(examples, context, compute, "evaluating"):
            total += statistics
            if context.should_stop():
                break
    context.was_stopped = any(distributed.all_sum(context.should_stop()))
    return distributed.reduce_sum(total)


def show_generations(model: models.TaskModel, examples: Examples, context: EvaluationContext, count: int) -> str:
    """Return the texts that an evaluation shows, written in its precision; "" if it was stopped, and on other ranks."""
    if not context.ranks.is_main or context.was_stopped:
        return ""
    with context.precision.autocast():
        return context.task.show_generations(model, examples, context.generate, count)


def open_trained(
    folder: Path, config: Config, source: str, labelled: bool, labels: Sequence[str] = (), ranks: Ranks | None = None
) -> tuple[models.TaskModel, Examples, EvaluationContext, Rows]:
    """Return a trained model, the encoded examples of `source`, the context to evaluate or predict in, and the rows.

    The rows are those of the examples, with what is to be said about the file. Rows without a text are left out.

    folder: a checkpoint. config: its recipe with overrides. source: a file, a folder of images, or in-memory rows.
    labels: the order of the classes; (): that of the checkpoint. ranks: where they have been joined before.
    Raises ConfigError, DataError or ModelError where these do not fit together.
    """
    config, task, settings, ranks = start(config, ranks)
    rows = read_file(task, source, settings, labelled)
    model, processor = load_trained(folder, config, task, labels)
    if labelled:
        check_labels(task, source, rows, settings, model.labels)
    examples = task.encoder(processor, settings, model.labels)(rows, labelled)
    validate.check_encoded(config, model, examples)
    if ranks.world_size > 1:
        distributed.check_agreement(validate.shared_settings(config) | {"the data": examples.fingerprint()})
    return model, examples, make_context(model, config, task, ranks), rows


def start(config: Config, ranks: Ranks | None = None) -> tuple[Config, Task, TaskSettings, Ranks]:
    """Join the other ranks; return the configuration for the use of a trained model, its task and its settings."""
    ranks = ranks or distributed.setup(config.run.device, config.distributed.timeout_seconds)
    task, _ = find_task(config.run.task)
    config = replace(config, data=replace(config.data, cache=""))  # a folder of the training machine
    return config, task, replace(validate.task_settings(config, task), accept_empty=True), ranks


def load_trained(folder: Path, config: Config, task: Task, labels: Sequence[str] = ()) -> tuple[models.TaskModel, Any]:
    """Return the model of a checkpoint, and the tokenizer or image preprocessing that fits it.

    labels: the order of the classes; (): that of the checkpoint.
    """
    model = models.from_pretrained(folder, head=task.head, labels=labels or None)
    processor = task.load_processor(folder)
    validate.check_fit(config, model, processor)
    return model, processor


def make_context(model: models.TaskModel, config: Config, task: Task, ranks: Ranks) -> EvaluationContext:
    """Move the model to this rank's device, choose its kernels, and return the context of evaluations there."""
    precision = Precision(config.train.precision, ranks.device)
    move(model, ranks.device)
    choose_kernels(ranks.device, config.train.tf32, config.run.deterministic)
    disable_cudnn_attention(model)
    return EvaluationContext(
        task, precision, ranks, config.eval.batch_tokens, config.generate, confidence=config.eval.confidence
    )


def main(argv: Sequence[str]) -> int:
    if any(argument.partition("=")[0] == "--against" for argument in argv):
        from engine.against import compare  # which imports this module

        return compare(argv, USAGE, OPTIONS)
    folder, config, options = cli.open_model(argv, USAGE, OPTIONS, more=["data.test"])
    test = config.data.test
    if not test:
        raise ConfigError("data.test is empty: --data.test FILE names the labelled file to evaluate on")
    output = cli.check_output(options["output"], test) if "output" in options else None
    model, examples, context, rows = open_trained(folder, config, test, labelled=True)
    if not len(examples):
        raise DataError(f"{test}: every row is left out: {rows.left_out[0].reason}")
    with recorded(model) as classes:
        metrics, statistics, _ = evaluate_in_full(model, examples, context)
    bins = distributed.reduce_sum(classes.bins)
    if context.ranks.is_main:
        console = cli.console_beside(output)
        print(f"{folder}: {len(examples):,} examples of {test}", file=console)
        notes = (*rows.notes, *examples.notes, *classes.own.describe(model.labels))
        print("".join(f"  {note}\n" for note in notes), end="", file=console)
        shown = describe_metrics(metrics, metrics.intervals, config.eval.confidence, config.data.group_column)
        print(shown, file=console)
        if classes.problem:
            print(f"calibration error (ECE) {calibration_error(bins[1]):.4f}", file=console)
        if table := context.task.format_table(statistics, model.labels):
            print(table, file=console)
        if output is not None:
            counts = {"examples": len(examples), "left_out": len(rows.left_out)}
            result: dict[str, Any] = {"checkpoint": str(folder), "data": test, **counts, **metrics}
            if metrics.intervals:
                result |= {"confidence": config.eval.confidence, "intervals": metrics.intervals}
            result |= context.task.tables(statistics, model.labels)
            result |= {"calibration": describe_calibration(classes.own, bins)} if classes.problem else {}
            cli.write_output(output, [to_json(result, ensure_ascii=False)])
    return 0


if __name__ == "__main__":
    cli.run_command(main)
