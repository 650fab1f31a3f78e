"""A file in, predictions with their ids out, in the order of the file:

    python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder. Each line of the output is {"id": ...} and what the
task predicts: {"label": ..., "probabilities": {label: probability}, "logits": {label: number}} for classes, from whose
logits another model can learn (data.teacher_file); a text for what generates one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

import models
from data import Examples, MicroBatching, evaluation_batches
from engine import cli, distributed, validate
from engine.cli import check_output, open_model, write_whole
from engine.config import ConfigError, GenerateSettings
from engine.distributed import Ranks
from engine.log import progress
from engine.precision import Precision
from engine.tasks import Task, find_task

USAGE = "python -m engine.predict RUN --input FILE --output FILE.jsonl [--section.key=value ...]"
OPTIONS = {
    "input": "the examples, as a file like those of training; labels are not needed, and not read",
    "output": "one line of JSON for each of them, in their order",
}


@torch.no_grad()
def predict(
    model: models.TaskModel,
    examples: Examples,
    task: Task,
    amp: Precision,
    ranks: Ranks,
    batch_tokens: int,
    generate: GenerateSettings,
) -> list[str]:
    """One line of JSON for each example, in their order, on rank 0; none on the others."""
    model.eval()
    cut = MicroBatching(tokens=batch_tokens, rank=ranks.rank, world_size=ranks.world_size)
    update = progress(ranks, len(examples) // ranks.world_size, "predicting")
    lines: list[tuple[int, str]] = []
    for part in evaluation_batches(examples, cut):
        batch = examples.batch(part).to(ranks.device)
        with amp.autocast():
            rows = task.predict(model, batch, examples, generate)
        for index, name, row in zip(batch.indices, batch.ids, rows, strict=True):
            lines.append((index, json.dumps({"id": name, **row}, ensure_ascii=False)))
        update(len(part))
    gathered = distributed.gather_on_main(lines)
    return [line for _, line in sorted(line for lines in gathered for line in lines)]


def main(argv: Sequence[str]) -> int:
    folder, config, files = open_model(argv, USAGE, OPTIONS)
    for name in OPTIONS:
        if name not in files:
            raise ConfigError(f"--{name} is missing: {USAGE}")
    output = check_output(files["output"], files["input"])
    ranks = distributed.setup(config.run.device)
    task, _ = find_task(config.run.task)
    settings = validate.task_settings(config, task)
    rows = task.read(files["input"], settings, False)
    model = models.from_pretrained(folder, head=task.head)
    processor = task.load(folder)
    validate.check_fit(config, model, processor)
    examples = task.encode(rows, processor, settings, model.labels, False)
    amp = Precision(config.train.precision, ranks.device)
    model.to(ranks.device)
    lines = predict(model, examples, task, amp, ranks, config.eval.batch_tokens, config.generate)
    if ranks.is_main:
        write_whole(output, lines)
        cut = f" ({examples.truncated:,} texts cut to data.max_length)" if examples.truncated else ""
        print(f"{len(examples):,} predictions in {output}{cut}")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
