"""Predict the examples of a file, in its order. As a command:

    python -m engine.predict RUN --input FILE --output FILE.jsonl [--keep COLUMNS] [--section.key=value ...]

RUN is a run folder, whose best/ is used, or a checkpoint folder. Each line of the output is {"id": ...} and what the
task predicts. For classes that is {"label": ..., "probabilities": {label: probability}, "logits": {label: number}};
another model can learn from the logits (data.teacher_file). A task that writes texts predicts {"text": ...}.
An output that ends in .csv or .parquet is a table (data/table_writing.py). `--keep text,label` adds {"input": {"text":
..., "label": ...}}, the values of the input row (engine/kept_columns.py).

The file is read, predicted and written a window of rows at a time, so it may be larger than memory. A command that was
killed continues after the last complete window when it is given again (engine/prediction_output.py). On several ranks
each one encodes and predicts its part of a window.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import models
from data import Examples, Row, Rows, TextExamples
from data.writing import to_json
from engine import cli, distributed, embeddings, validate
from engine.calibration import read_calibration
from engine.config import Config, ConfigError
from engine.evaluate import load_trained, make_context, predict, start
from engine.evaluation_batches import EvaluationContext
from engine.input_windows import InputWindows, check_input
from engine.kept_columns import keep, parse_names
from engine.prediction_output import Output, check_format, open_output
from engine.tasks import Task

USAGE = "python -m engine.predict RUN --input FILE --output FILE.jsonl [--keep COLUMNS] [--section.key=value ...]"
WINDOW, WINDOW_OF_TEXTS = 8192, 1024  # rows; a text that is written takes much longer than a class
MAX_DIGITS = 9
OPTIONS = {
    "input FILE": "examples, in a format of the training files; labels are not needed and not read",
    "output FILE": "the predictions: a line of JSON for each example, in the order of the input; a table where the "
    "name ends in .csv or .parquet",
    "keep COLUMNS": 'columns that each prediction carries in its member "input" (in a table as input.NAME), such as '
    "text,label",
    "embeddings": "write a vector of each text or image instead (model.pooling); RUN may also be a published model, "
    "and the name of --output end in .npy",
    "window ROWS": f"rows at a time (default {WINDOW:,}, or {WINDOW_OF_TEXTS:,} where texts are written); a command "
    "that was killed continues after the last ones",
}


def with_left_out(
    predictions: list[dict[str, Any]], rows: Rows, task: Task, kept: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return a prediction for each row of the file, in its order.

    predictions: those of `rows`. A row that was left out gets {"id": ..., "reason": ...} and null for what the task
    predicts, so that the output has as many lines as the file has rows. kept: columns of the rows to add.
    """
    pairs = zip(rows, predictions, strict=True)
    by_line = [(row.line, keep(prediction, row.values, kept)) for row, prediction in pairs]
    for row in rows.left_out:
        prediction = {"id": row.id, task.predicts: None, "reason": row.reason}
        by_line.append((row.line, keep(prediction, {}, kept)))
    return [prediction for _, prediction in sorted(by_line, key=lambda item: item[0])]


def predict_windows(
    windows: InputWindows,
    model: models.TaskModel,
    encode: Callable[[list[Row]], Examples],
    context: EvaluationContext,
    output: Output | None,
) -> bool:
    """Predict the windows that the output lacks, and append each one; return whether context.should_stop ended it.

    Of W ranks, each encodes and predicts every W-th row of a window, as if it were alone. output: None but on rank 0.
    """
    ranks = context.ranks
    alone = replace(context, ranks=replace(ranks, world_size=1))

    def predict_part(rows: Rows, first: int) -> Part:
        """Predict this rank's rows of a window, the first of which has the number `first` in the file."""
        examples = encode(rows[ranks.rank :: ranks.world_size])
        if isinstance(examples, TextExamples):  # the number of a row decides what is sampled
            numbers = first + np.arange(ranks.rank, len(rows), ranks.world_size)
            examples = replace(examples, numbers=numbers)
        predictions = predict(model, examples, alone)
        return Part(predictions, examples.notes, not alone.was_stopped, context.should_stop())

    num_complete = distributed.on_main(ranks, lambda: output.num_windows if output else 0)
    num_rows = 0  # of the windows before, without those left out
    for number, rows in enumerate(windows, 1):
        if number > num_complete:
            parts = distributed.gather_on_main(predict_part(rows, num_rows))
            if distributed.on_main(ranks, _append, output, rows, parts, windows, number == len(windows)):
                return True
            del parts  # before the next window is read
        num_rows += len(rows)
    return False


class Part(NamedTuple):
    """What a rank has predicted of a window. is_stopping: whether it was asked to stop."""

    predictions: list[dict[str, Any]]
    notes: Sequence[str]
    is_complete: bool
    is_stopping: bool


def _append(output: Output, rows: Rows, parts: list[Part], windows: InputWindows, is_last: bool) -> bool:
    """Append the predictions of all ranks for a window, if they are complete; return whether to stop after it."""
    if not all(part.is_complete for part in parts):
        return True
    predictions: list[dict[str, Any]] = [{}] * len(rows)
    for rank, part in enumerate(parts):
        predictions[rank :: len(parts)] = part.predictions
    complete = with_left_out(predictions, rows, windows.task, windows.settings.kept)
    lines = [to_json(prediction, ensure_ascii=False) for prediction in complete]
    output.append(lines, [*rows.notes, *(note for part in parts for note in part.notes)])
    return not is_last and any(part.is_stopping for part in parts)


def _window_size(given: str | None, task: Task) -> int:
    """Return the rows of a window; ConfigError where --window is no whole number from 1."""
    if given is None:
        return WINDOW_OF_TEXTS if task.generates else WINDOW
    if not str(given).isdecimal() or len(given) > MAX_DIGITS or not int(given):
        raise ConfigError(f"--window = {given!r:.80} should be a number of rows, from 1")
    return int(given)


def _made_of(folder: Path, config: Config, windows: InputWindows) -> dict[str, Any]:
    """Return what decides about the predictions; the number of ranks only does for their rounding."""
    settings = {
        name: value for name, value in validate.shared_settings(config).items() if not name.startswith("distributed.")
    }
    parts = {"the rows of --input": windows.checksum, "the checkpoint": embeddings.checksum_of(folder)}
    kept = {"--keep": ",".join(windows.settings.kept)} if windows.settings.kept else {}
    return parts | {"--window": windows.size} | kept | settings


def _open(argv: Sequence[str]) -> tuple[embeddings.Embedder, dict[str, str]]:
    """Return (folder, configuration, with --embeddings their similarity, else "", notes), values of OPTIONS."""
    if "--embeddings" not in argv:
        folder, config, options = cli.open_model(argv, USAGE, OPTIONS)
        return embeddings.Embedder(folder, config, "", []), options
    others = [argument for argument in argv if argument != "--embeddings"]
    name, given, options = cli.read_command(others, USAGE, OPTIONS, embeddings.SETTINGS)
    return embeddings.open_embedder(name, given), options


def main(argv: Sequence[str]) -> int:
    (folder, config, similarity, left_out), options = _open(argv)
    embeds = bool(similarity)
    for name in ("input", "output"):
        if name not in options:
            raise ConfigError(f"--{name} is missing: {USAGE}")
    path, stop = cli.check_output(options["output"], options["input"]), cli.StopRequest("batch")
    check_format(path, embeds)
    config, task, settings, ranks = start(config)
    write = embeddings.find_writer(path, options["input"]) if embeds else None
    settings = replace(settings, kept=parse_names(options.get("keep"), path if write else None))
    if embeds:
        task = embeddings.embedding_task(task, similarity, as_text=write is not None)
    windows = check_input(task, options["input"], settings, _window_size(options.get("window"), task))
    model, processor = (embeddings.load_embedder if embeds else load_trained)(folder, config, task)
    encoder = task.encoder(processor, settings, model.labels)

    def encode(rows: list[Row]) -> Examples:
        examples = encoder(rows, False)
        validate.check_encoded(config, model, examples)
        return examples

    made_of, outputs = _made_of(folder, config, windows), list[Output]()
    if embeds:
        made_of["the pooling"] = embeddings.describe_pooling(model, similarity)
    distributed.check_agreement(made_of)
    context = make_context(model, config, task, ranks)
    context.should_stop = stop.is_seen
    with ExitStack() as stack:
        distributed.on_main(ranks, lambda: outputs.append(open_output(path, made_of, len(windows), stack, write)))
        if outputs and outputs[0].num_windows:
            print(f"{outputs[0].describe()}", file=sys.stderr)
        stack.callback(stop.restore_handlers)
        stop.listen(announce=ranks.is_main)
        if predict_windows(windows, model, encode, context, outputs[0] if outputs else None):
            if outputs:
                name = signal.Signals(stop.exit_code - 128).name
                print(f"stopped by {name}: {outputs[0].describe()}", file=sys.stderr)
            return stop.exit_code
        distributed.on_main(ranks, lambda: outputs[0].finish())
    if outputs:
        console = cli.console_beside(path)
        what = f"vectors, {embeddings.describe_pooling(model, similarity)}," if embeds else "predictions"
        print(f"{windows.num_rows:,} {what} in {path}", file=console)
        notes = [*left_out, *windows.notes, *outputs[0].notes(), *read_calibration(model).describe(model.labels)]
        print("".join(f"  {note}\n" for note in notes), end="", file=console)
    return 0


if __name__ == "__main__":
    cli.run_command(main)
