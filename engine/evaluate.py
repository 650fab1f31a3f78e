"""One pass over labelled data. As a command:

    python -m engine.evaluate RUN --data.test FILE [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder; settings are those of its recipe unless given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import models
from data import Cut, TextExamples, evaluation_batches, load_tokenizer
from engine import checkpoint, distributed
from engine.config import Config, ConfigError, check, help_text, override, read_recipe, split_arguments
from engine.distributed import Ranks
from engine.log import progress
from engine.metrics import confusion_matrix, precision_recall_f1
from engine.precision import Precision
from engine.tasks import Task, find_task

USAGE = "python -m engine.evaluate RUN --data.test FILE [--section.key=value ...]"


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, examples: TextExamples, task: Task, amp: Precision, ranks: Ranks, batch_tokens: int
) -> torch.Tensor:
    """The task's statistics summed over every example once, on all ranks. Leaves the model in its mode."""
    was_training = model.training
    model.eval()
    cut = Cut(tokens=batch_tokens, rank=ranks.rank, world_size=ranks.world_size)
    update = progress(ranks, len(examples) // ranks.world_size, "evaluating")

    def measure(part: np.ndarray) -> torch.Tensor:
        batch = examples.batch(part).to(ranks.device)
        with amp.autocast():
            out = model(batch)
        update(len(part))
        return task.statistics(out, batch)

    total = measure(np.empty(0, dtype=np.int64))  # zeros, also on a rank that has no example
    for part in evaluation_batches(examples, cut):
        total += measure(part)
    model.train(was_training)
    return torch.tensor(distributed.all_sum(*total.tolist()), dtype=torch.float64)


def open_model(argv: Sequence[str], usage: str, own: Sequence[str] = ()) -> tuple[Path, Config, dict[str, str]]:
    """(checkpoint folder, its recipe with the overrides, the arguments named in `own`) of a command line."""
    if "--help" in argv or "-h" in argv or not argv:
        print(help_text(usage))
        raise SystemExit(0)
    positional, overrides = split_arguments(list(argv))
    if len(positional) != 1:
        raise ConfigError(f"name one run folder: {usage}")
    folder = checkpoint.open_run(positional[0])
    mine = {key: overrides.pop(key) for key in own if key in overrides}
    fresh = read_recipe(str(folder / "recipe.toml"))
    config = override(replace(fresh, run=replace(fresh.run, device="auto")), overrides)
    check(config)
    return folder, config, mine


def main(argv: Sequence[str]) -> int:
    folder, config, _ = open_model(argv, USAGE)
    if not config.data.test:
        raise ConfigError("data.test is empty: --data.test FILE names the labelled file to evaluate on")
    ranks = distributed.setup(config.run.device)
    task, _ = find_task(config.run.task)
    rows = task.read(config.data.test, config.data, True)
    model = models.from_pretrained(folder, head=task.head)
    task.check_labels(config.data.test, rows, config.data, model.labels)
    examples = task.encode(rows, load_tokenizer(folder), config.data, model.labels, True)
    amp = Precision(config.train.precision, ranks.device)
    statistics = evaluate(model.to(ranks.device), examples, task, amp, ranks, config.eval.batch_tokens)
    if ranks.is_main:
        print(f"{folder}: {len(examples):,} examples of {config.data.test} ({examples.truncated:,} cut to max_length)")
        print("\n".join(f"{name:>10}  {value:.4f}" for name, value in task.summarize(statistics).items()))
        print(per_class_table(statistics, model.labels))
    return 0


def per_class_table(statistics: torch.Tensor, labels: Sequence[str]) -> str:
    """Precision, recall, F1 and count of each class, and what it was taken for."""
    confusion = confusion_matrix(statistics)
    values = precision_recall_f1(confusion)
    width = max(map(len, labels))
    lines = [f"{'':>{width}}  precision  recall      f1  count  predicted as {', '.join(labels)}"]
    for i, label in enumerate(labels):
        p, r, f = (values[name][i].item() for name in ("precision", "recall", "f1"))
        counts = " ".join(f"{int(n)}" for n in confusion[i])
        lines.append(f"{label:>{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {int(confusion[i].sum()):>5}  {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    distributed.run_command(main)
