"""A file in, predictions with their ids out, in the order of the file:

    python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder. Each line of the output is
{"id": ..., "label": ..., "probabilities": {label: probability}}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

import models
from data import Cut, TextExamples, evaluation_batches, load_tokenizer
from engine import describe, distributed
from engine.config import ConfigError
from engine.distributed import Ranks
from engine.evaluate import check_output, open_model, write_whole
from engine.log import progress
from engine.precision import Precision
from engine.tasks import Task, find_task

USAGE = "python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]"
OPTIONS = {
    "input": "the texts, as .jsonl, .csv or .tsv; labels are not needed, and not read",
    "output": "one line of JSON for each of them, in their order",
}


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
    folder, config, files = open_model(argv, USAGE, OPTIONS)
    for name in OPTIONS:
        if name not in files:
            raise ConfigError(f"--{name} is missing: {USAGE}")
    output = check_output(files["output"], files["input"])
    ranks = distributed.setup(config.run.device)
    task, _ = find_task(config.run.task)
    rows = task.read(files["input"], config.data, False)
    model = models.from_pretrained(folder, head=task.head)
    tokenizer = load_tokenizer(folder)
    describe.check_fit(config, model, tokenizer)
    examples = task.encode(rows, tokenizer, config.data, model.labels, False)
    amp = Precision(config.train.precision, ranks.device)
    predictions = predict(model.to(ranks.device), examples, task, amp, ranks, config.eval.batch_tokens)
    if ranks.is_main:
        write_whole(output, (json.dumps(row, ensure_ascii=False) for row in predictions))
        print(f"{len(predictions):,} predictions in {output} ({examples.truncated:,} texts cut to max_length)")
    return 0


if __name__ == "__main__":
    distributed.run_command(main)
