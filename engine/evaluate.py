"""One pass over labelled data. As a command:

    python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]

RUN is a run folder (its best/ is used) or a checkpoint folder; settings are those of its recipe unless given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import models
from data import Examples, MicroBatching, evaluation_batches
from engine import checkpoint, distributed, validate
from engine.config import (
    Config,
    ConfigError,
    GenerateSettings,
    all_settings,
    check,
    did_you_mean,
    override,
    read_recipe,
    split_arguments,
)
from engine.distributed import Ranks
from engine.log import progress
from engine.precision import Precision
from engine.tasks import Task, find_task

USAGE = "python -m engine.evaluate RUN --data.test FILE [--output FILE.json] [--section.key=value ...]"
OPTIONS = {"output": "also write the metrics to this file, as one JSON object"}
# What a trained model still listens to: how data is read (less what only training reads), and the machine.
ONLY_TRAINING_READS = (
    *("train", "validation", "validation_fraction", "limit", "test", "group", "labels", "teacher", "workers"),
)
ALWAYS_USED = ("run.device", "train.precision", "eval.batch_tokens")


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


def open_model(
    argv: Sequence[str], usage: str, options: Mapping[str, str], more: Sequence[str] = ()
) -> tuple[Path, Config, dict[str, str]]:
    """(checkpoint folder, its recipe with the overrides, the values of `options`) of a command line.

    options: {name: what it is} of the command's own options; more: settings that this command reads beside the usual.
    Raises ConfigError for anything that would have no effect; SystemExit(0) after --help.
    """
    known = all_settings(Config())
    settings = {key: declared.metadata["doc"] for key, declared in known.items() if _is_used(key, more)}
    if "--help" in argv or "-h" in argv:
        shown = [usage, "", *(f"  --{name} FILE\n        {doc}" for name, doc in options.items()), ""]
        shown += ["Settings, taken from the recipe of the run where they are not given:", ""]
        print("\n".join([*shown, *(f"  --{key}\n        {doc}" for key, doc in settings.items())]))
        raise SystemExit(0)
    positional, given = split_arguments(list(argv))
    for key in given:
        if key in known and key not in settings:
            raise ConfigError(f"--{key} has no effect on a trained model; --help lists what has one")
        if key not in (*options, *settings):
            raise ConfigError(f"unknown option --{key}{did_you_mean(key, [*options, *settings])}")
    if len(positional) != 1:
        raise ConfigError(f"name one run folder: {usage}")
    folder = checkpoint.open_run(positional[0])
    own = {key: given.pop(key) for key in options if key in given}
    recipe = read_recipe(str(folder / "recipe.toml"))
    config = override(replace(recipe, run=replace(recipe.run, device="auto")), given)
    check(config)
    return folder, config, own


def _is_used(key: str, more: Sequence[str]) -> bool:
    section, _, name = key.partition(".")
    if section == "data":
        return key in more or name not in ONLY_TRAINING_READS
    return key in ALWAYS_USED or section == "generate"


def check_output(name: str, source: str) -> Path:
    """The file to write results to; ConfigError now, not after the work, where it cannot be written."""
    output = Path(name)
    if output.is_dir():
        raise ConfigError(f"--output {name!r} is a folder; name a file")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {name!r}: there is no folder {str(output.parent)!r}")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output {name!r}: the folder {str(output.parent)!r} cannot be written")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise ConfigError(f"--output {name!r} is the file that is read; name another one")
    return output


def write_whole(output: Path, lines: Iterable[str]) -> None:
    """Write beside `output` and rename, so that a file of this name is always a whole one."""
    temporary = output.with_name(output.name + ".writing")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
        os.replace(temporary, output)
    except OSError as error:
        raise distributed.TrainingError(f"--output {str(output)!r} could not be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


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
    distributed.run_command(main)
