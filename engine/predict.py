"""A file in, predictions with their ids out, in the order of the file:

    python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder. Each line of the output is
{"id": ..., "label": ..., "probabilities": {label: probability}}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import models
from data import Cut, TextExamples, evaluation_batches, load_tokenizer
from engine import distributed
from engine.config import ConfigError
from engine.distributed import Ranks
from engine.evaluate import open_model
from engine.log import progress
from engine.precision import Precision
from engine.tasks import Task, find_task

USAGE = "python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]"


@torch.no_grad()
def predict(
    model: models.TaskModel, examples: TextExamples, task: Task, amp: Precision, ranks: Ranks, batch_tokens: int
) -> list[dict[str, Any]]:
    """One row for each example, exactly once, in the order of the examples, on every rank."""
    model.eval()
    cut = Cut(tokens=batch_tokens, rank=ranks.rank, world_size=ranks.world_size)
    update = progress(ranks, len(examples) // ranks.world_size, "predicting")
    mine: dict[int, dict[str, Any]] = {}
    for part in evaluation_batches(examples, cut):
        batch = examples.batch(part).to(ranks.device)
        with amp.autocast():
            out = model(batch)
        for index, row in zip(batch.indices, task.predict(out.logits, model.labels), strict=True):
            mine[index] = {"id": examples.ids[index], **row}
        update(len(part))
    everyone: dict[int, dict[str, Any]] = {}
    for rows in distributed.gather(mine):
        everyone |= rows
    return [everyone[i] for i in range(len(examples))]


def main(argv: Sequence[str]) -> int:
    folder, config, files = open_model(argv, USAGE, own=("input", "output"))
    for name in ("input", "output"):
        if name not in files:
            raise ConfigError(f"--{name} is missing: {USAGE}")
    output = Path(files["output"])
    if not output.parent.is_dir():
        raise ConfigError(f"--output {str(output)!r}: there is no folder {str(output.parent)!r}")
    ranks = distributed.setup(config.run.device)
    task, _ = find_task(config.run.task)
    rows = task.read(files["input"], config.data, False)
    model = models.from_pretrained(folder, head=task.head)
    examples = task.encode(rows, load_tokenizer(folder), config.data, model.labels, False)
    amp = Precision(config.train.precision, ranks.device)
    predictions = predict(model.to(ranks.device), examples, task, amp, ranks, config.eval.batch_tokens)
    if ranks.is_main:
        # Beside and then renamed, so that a file of this name is always a whole one.
        temporary = output.with_name(output.name + ".writing")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        os.replace(temporary, output)
        print(f"{len(predictions):,} predictions in {output} ({examples.truncated:,} texts cut to max_length)")
    return 0


if __name__ == "__main__":
    distributed.run_command(main)
