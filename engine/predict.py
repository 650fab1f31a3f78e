"""A file in, predictions with their ids out, in the order of the file:

    python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder. Each line of the output is
{"id": ..., "label": ..., "probabilities": {label: probability}}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

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
ROWS = 1_000  # made at a time


@torch.no_grad()
def predict(model: models.TaskModel, examples: TextExamples, amp: Precision, ranks: Ranks, batch_tokens: int) -> Tensor:
    """The logits (N, C) of the examples, each exactly once and in their order, on rank 0; (0, C) on the others."""
    model.eval()
    cut = Cut(tokens=batch_tokens, rank=ranks.rank, world_size=ranks.world_size)
    update = progress(ranks, len(examples) // ranks.world_size, "predicting")
    indices, logits = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, len(model.labels))]
    for part in evaluation_batches(examples, cut):
        batch = examples.batch(part).to(ranks.device)
        with amp.autocast():
            out = model(batch)
        indices.append(torch.tensor(batch.indices))
        logits.append(out.logits.float().cpu())
        update(len(part))
    # Two tensors a rank travel; rows are made of them where they are written.
    gathered = distributed.gather_on_main((torch.cat(indices), torch.cat(logits)))
    if not gathered:
        return logits[0]
    order = torch.cat([places for places, _ in gathered]).argsort()
    return torch.cat([values for _, values in gathered])[order]


def rows_of(ids: Sequence[str], logits: Tensor, task: Task, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row an example, made as they are asked for."""
    for start in range(0, len(ids), ROWS):
        part = slice(start, start + ROWS)
        for name, row in zip(ids[part], task.predict(logits[part], labels), strict=True):
            yield {"id": name, **row}


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
    logits = predict(model.to(ranks.device), examples, amp, ranks, config.eval.batch_tokens)
    if ranks.is_main:
        predictions = rows_of(examples.ids, logits, task, model.labels)
        write_whole(output, (json.dumps(row, ensure_ascii=False) for row in predictions))
        print(f"{len(examples):,} predictions in {output} ({examples.truncated:,} texts cut to max_length)")
    return 0


if __name__ == "__main__":
    distributed.run_command(main)
