"""Predict the rows that a run held out for validation, with its best weights. As a command:

    python -m engine.held_out RUN --output FILE.jsonl

Each line is what engine.predict writes for the row, and "row", its place in data.train. A study runs it after each fold
(engine/study_runs.py), so that together every row of data.train is predicted by a model that did not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data import TextExamples
from data.prepared import is_prepared
from data.writing import to_json
from engine import cli, validate
from engine.config import ConfigError
from engine.evaluate import load_trained, make_context, predict, start
from engine.tasks import read_file, read_training_data

USAGE = "python -m engine.held_out RUN --output FILE.jsonl [--section.key=value ...]"
OPTIONS = {"output FILE": "the predictions: a line of JSON for each row that was held out"}


def main(argv: Sequence[str]) -> int:
    folder, config, options = cli.open_model(argv, USAGE, OPTIONS)
    if "output" not in options:
        raise ConfigError(f"--output is missing: {USAGE}")
    source = config.data.train
    output = cli.check_output(options["output"], source)
    if config.data.validation or is_prepared(source):
        raise ConfigError(f"{folder}: this run held out no rows of the file data.train = {source!r}")
    config, task, settings, ranks = start(config)
    as_trained = replace(settings, accept_empty=False)
    held_out = {(row.id, row.line) for row in read_training_data(task, as_trained, config.run.seed).validation}
    rows = read_file(task, source, settings, False)
    places = [i for i, row in enumerate(rows) if (row.id, row.line) in held_out]
    model, processor = load_trained(folder, config, task)
    examples = task.encoder(processor, settings, model.labels)([rows[i] for i in places], False)
    validate.check_encoded(config, model, examples)
    if isinstance(examples, TextExamples):  # the number of a row decides what is sampled
        examples = replace(examples, numbers=np.array(places))
    predictions: list[dict[str, Any]] = predict(model, examples, make_context(model, config, task, ranks))
    lines = ({"row": place, **prediction} for place, prediction in zip(places, predictions, strict=True))
    if ranks.is_main:
        cli.write_output(output, [to_json(line, ensure_ascii=False) for line in lines])
    return 0


if __name__ == "__main__":
    cli.run_command(main)
