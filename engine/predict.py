"""Predict the examples of a file, in its order. As a command:

    python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]

RUN is a run folder, whose best/ is used, or a checkpoint folder. Each line of the output is {"id": ...} and what the
task predicts. For classes that is {"label": ..., "probabilities": {label: probability}, "logits": {label: number}};
another model can learn from the logits (data.teacher_file). A task that writes texts predicts {"text": ...}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import models
from data import Batch, Examples, Rows
from data.writing import to_json
from engine import cli, distributed
from engine.config import ConfigError
from engine.evaluate import EvaluationContext, open_trained, run_in_batches
from engine.tasks import Task

USAGE = "python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]"
OPTIONS = {
    "input": "a file of examples, in a format of the training files; labels are not needed and not read",
    "output": "the predictions: a line of JSON for each example, in the order of the input",
}


@torch.no_grad()
def predict(model: models.TaskModel, examples: Examples, context: EvaluationContext) -> list[dict[str, Any]]:
    """Return {"id": ..., **prediction of the task} for each example, in their order, on rank 0; [] on other ranks."""
    model.eval()

    def compute(batch: Batch) -> list[dict[str, Any]]:
        return context.task.predict_batch(model, batch, examples, context.generate)

    rows: list[tuple[int, dict[str, Any]]] = []
    with context.precision.autocast():  # around all batches, so that the weights are cast once
        for batch, predictions in run_in_batches(examples, context, compute, "predicting"):
            for index, example_id, prediction in zip(batch.indices, batch.ids, predictions, strict=True):
                rows.append((index, {"id": example_id, **prediction}))
    gathered = [row for rank_rows in distributed.gather_on_main(rows) for row in rank_rows]
    return [prediction for _, prediction in sorted(gathered, key=lambda row: row[0])]


def with_left_out(predictions: list[dict[str, Any]], rows: Rows, task: Task) -> list[dict[str, Any]]:
    """Return a prediction for each row of the file, in its order.

    predictions: those of `rows`. A row that was left out gets {"id": ..., "reason": ...} and null for what the task
    predicts, so that the output has as many lines as the file has rows.
    """
    by_line = [(row.line, prediction) for row, prediction in zip(rows, predictions, strict=True)]
    by_line += [(row.line, {"id": row.id, task.predicts: None, "reason": row.reason}) for row in rows.left_out]
    return [prediction for _, prediction in sorted(by_line, key=lambda item: item[0])]


def main(argv: Sequence[str]) -> int:
    folder, config, options = cli.open_model(argv, USAGE, OPTIONS)
    for name in OPTIONS:
        if name not in options:
            raise ConfigError(f"--{name} is missing: {USAGE}")
    output = cli.check_output(options["output"], options["input"])
    model, examples, context, rows = open_trained(folder, config, options["input"], labelled=False)
    predictions = predict(model, examples, context)
    if context.ranks.is_main:
        predictions = with_left_out(predictions, rows, context.task)
        cli.write_output(output, (to_json(prediction, ensure_ascii=False) for prediction in predictions))
        console = cli.console_beside(output)
        print(f"{len(predictions):,} predictions in {output}", file=console)
        print("".join(f"  {note}\n" for note in (*rows.notes, *examples.notes)), end="", file=console)
    return 0


if __name__ == "__main__":
    cli.run_command(main)
