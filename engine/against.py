"""Compare two models on the same examples, for engine.evaluate:

    python -m engine.evaluate RUN --data.test FILE --against OTHER [--output FILE.json]

RUN and OTHER are each a run folder, a checkpoint folder, or a .jsonl file that engine.predict wrote for the rows of
FILE. Two files need `--run.task TASK`, and what else their recipe said about the data.

- The difference of each metric has a paired bootstrap interval.
- Accuracy, and the share of examples with all labels right, are tested by McNemar's exact test; every other metric by
  an approximate permutation test (Noreen 1989), which exchanges the two models' results on random examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.errors import DataError
from data.writing import to_json
from engine import checkpoint, cli
from engine.config import Config, ConfigError, all_settings, did_you_mean, override, split_arguments
from engine.distributed import Ranks
from engine.evaluate import example_rows, open_trained, start
from engine.metrics import by_example
from engine.metrics.bootstrap import RESAMPLES, Comparison, compare_metrics, mcnemar
from engine.plugins import load_plugins
from engine.prediction_rows import labels_of, match, prediction_rows, read_predictions
from engine.tasks import Task, check_labels, read_file

DEFAULT_CONFIDENCE = 0.95
ALL_RIGHT = {"accuracy", "subset_accuracy"}  # shares of right examples
BY_CLASS = (by_example.collect_classes, by_example.collect_images, by_example.collect_relations)


@dataclass(frozen=True)
class Side:
    """One of the two: a row for each example (engine/metrics/by_example.py), in the order of the file."""

    name: str
    task_name: str
    task: Task
    labels: tuple[str, ...]
    ids: list[str]
    rows: Tensor
    ranks: Ranks
    confidence: float  # eval.confidence


def compare(argv: Sequence[str], usage: str, options: Mapping[str, str]) -> int:
    """Run the command; return its exit code."""
    if {"--help", "-h"} & set(argv):
        cli.open_model(argv, usage, options)
    names, given = split_arguments(list(argv))
    if len(names) != 1:
        raise ConfigError(f"name one run folder, or file of predictions: {usage}")
    names.append(given.pop("against"))
    output_name = given.pop("output", "")
    known = all_settings(Config())
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown option --{key}{did_you_mean(key, ['output', 'against', *known])}")
    sides = _open_sides(names, given)
    test = _labelled_file(names, given)
    output = cli.check_output(output_name, test) if output_name else None
    confidence = sides[0].confidence or sides[1].confidence or DEFAULT_CONFIDENCE
    _check_pair(sides[0], sides[1])
    found = compare_sides(sides[0], sides[1], confidence)
    if sides[0].ranks.is_main:
        console = cli.console_beside(output)
        print(describe(names, test, len(sides[0].ids), found, confidence), file=console)
        if output is not None:
            metrics = {name: comparison._asdict() for name, comparison in found.items()}
            result = {"a": names[0], "b": names[1], "data": test, "examples": len(sides[0].ids)}
            result |= {"confidence": confidence, "metrics": metrics}
            cli.write_output(output, [to_json(result, ensure_ascii=False)])
    return 0


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _labelled_file(names: Sequence[str], given: Mapping[str, str]) -> str:
    """Return data.test, of the command or of the first run's recipe; ConfigError where there is none."""
    test = given.get("data.test", "")
    for name in names:
        if not test and not _is_file(name):
            test = cli.configure(checkpoint.open_run(name), _for_runs(given), more=["data.test"]).data.test
    if not test:
        raise ConfigError("data.test is empty: --data.test FILE names the labelled file to compare on")
    return test


def _for_runs(given: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that a run takes; run.task is that of files of predictions."""
    return {key: value for key, value in given.items() if key != "run.task"}


def _open_sides(names: Sequence[str], given: Mapping[str, str]) -> list[Side]:
    """Return both sides, the runs first, since a file of predictions is read by the recipe of the run."""
    test = _labelled_file(names, given)
    sides: dict[int, Side] = {}
    config: Config | None = None
    for position in sorted((0, 1), key=lambda i: _is_file(names[i])):
        known = next(iter(sides.values()), None)
        if _is_file(names[position]):
            config = config or _config_of_files(given)
            sides[position] = _open_file(names[position], config, test, known)
        else:
            folder = checkpoint.open_run(names[position])
            config = cli.configure(folder, _for_runs(given) | {"data.test": test}, more=["data.test"])
            sides[position] = _open_run(names[position], folder, config, test, given.get("run.task", ""), known)
    return [sides[0], sides[1]]


def _config_of_files(given: Mapping[str, str]) -> Config:
    if "run.task" not in given:
        raise ConfigError("two files of predictions need --run.task TASK, the task that they are of")
    config = override(Config(), dict(given))
    load_plugins(config.run.plugins)
    return config


def _open_run(name: str, folder: Path, config: Config, test: str, task: str, known: Side | None) -> Side:
    """Return the side of a run. task: run.task of the command, "" where it has none."""
    labels = known.labels if known else ()
    _check_task(known, name, config.run.task)
    if task not in ("", config.run.task):
        raise ConfigError(f"run.task = {task!r}, and {name} is a model of {config.run.task}: leave it out")
    ranks = known.ranks if known else None
    model, examples, context, _ = open_trained(folder, config, test, labelled=True, labels=labels, ranks=ranks)
    context.confidence = config.eval.confidence or DEFAULT_CONFIDENCE
    if context.task.evaluate_examples is None:
        raise ConfigError(f"{config.run.task} has no statistics of single examples, which a comparison needs")
    rows = example_rows(model, examples, context)
    if rows is None:
        raise ConfigError(f"{test}: too many examples, or classes, to keep a row of each for a comparison")
    ids = [str(one) for one in examples.ids]
    return Side(name, config.run.task, context.task, model.labels, ids, rows, context.ranks, config.eval.confidence)


def _check_task(known: Side | None, name: str, task: str) -> None:
    if known and known.task_name != task:
        raise ConfigError(f"{known.name} is a model of {known.task_name}, {name} of {task}: they cannot be compared")


def _open_file(name: str, config: Config, test: str, known: Side | None) -> Side:
    config, task, settings, ranks = start(config, known.ranks if known else None)
    predictions = read_predictions(Path(name))
    rows = read_file(task, test, settings, True)
    labels = known.labels if known else tuple(config.data.labels or labels_of(predictions))
    if not labels:
        labels = tuple(task.find_labels(test, rows, settings))
    check_labels(task, test, rows, settings, labels)
    if not rows:
        raise DataError(f"{test}: every row is left out: {rows.left_out[0].reason}")
    matched = match(Path(name), predictions, test, rows, task)
    found = prediction_rows(task, matched, rows, labels, settings, Path(name))
    ids = [row.id for row in rows]
    return Side(name, config.run.task, task, labels, ids, found, ranks, config.eval.confidence)


def _check_pair(a: Side, b: Side) -> None:
    """Raise DataError unless both have the same examples, ConfigError unless they have the same classes."""
    if a.labels != b.labels:
        raise ConfigError(f"{a.name} has the classes {list(a.labels)!r:.200}, {b.name} {list(b.labels)!r:.200}")
    if a.ids != b.ids:
        only_a, only_b = set(a.ids) - set(b.ids), set(b.ids) - set(a.ids)
        raise DataError(
            f"{a.name} and {b.name} are not of the same examples: {len(a.ids):,} and {len(b.ids):,}, of which "
            f"{len(only_a):,} are only in the first and {len(only_b):,} only in the second"
        )


def compare_sides(a: Side, b: Side, confidence: float) -> dict[str, Comparison]:
    """Return the comparison of every metric that both have a value of."""
    task, rows = a.task, (a.rows, b.rows)
    found = compare_metrics(rows, task.collect, task.compute_metrics, a.labels, confidence)
    for name in ALL_RIGHT & found.keys():
        right = [_is_right(task, of_model, len(a.labels)) for of_model in rows]
        if right[0] is not None and right[1] is not None:
            only_a, only_b = (right[0] & ~right[1]).sum().item(), (right[1] & ~right[0]).sum().item()
            test = f"McNemar, {int(only_a)} right by the first alone and {int(only_b)} by the second"
            found[name] = found[name]._replace(p_value=mcnemar(int(only_a), int(only_b)), test=test)
    return {name: comparison for name, comparison in found.items() if comparison.difference == comparison.difference}


def _is_right(task: Task, rows: Tensor, num_labels: int) -> Tensor | None:
    """Return whether each example is right, (N,) bool; None where its rows do not say it."""
    if task.collect in BY_CLASS:
        return rows[:, 1] == rows[:, 2]
    if task.collect is by_example.collect_label_sets:
        _, _, true, chosen = torch.split(rows, [1, *[num_labels] * 3], 1)
        return ((true > 0.5) == (chosen > 0)).all(1)
    return rows[:, 1] > 0 if task.predicts == "choice" else None


def describe(names: Sequence[str], test: str, count: int, found: Mapping[str, Comparison], confidence: float) -> str:
    """Return the table of the command."""
    width = max(10, *map(len, found)) if found else 10
    lines = [f"a = {names[0]}, b = {names[1]}: {count:,} examples of {test}"]
    lines.append(f"{'':>{width}}  {'a':>8}  {'b':>8}  {'a - b':>8}  {f'{confidence:.4g} interval':>20}  p-value")
    for name, (a, b, difference, (low, high), p, test_name) in found.items():
        interval = f"[{low:.4f}, {high:.4f}]"
        line = f"{name:>{width}}  {a:8.4f}  {b:8.4f}  {difference:8.4f}  {interval:>20}  {p:7.4f}"
        lines.append(line + (f"  ({test_name})" if test_name != "permutation" else ""))
    lines.append(
        f"intervals: paired bootstrap, {RESAMPLES:,} resamples of the examples; p-values, unless named: approximate "
        f"permutation test, two-sided, {RESAMPLES:,} exchanges"
    )
    return "\n".join(lines)
