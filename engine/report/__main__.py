"""Report one or several runs, as a page of HTML and as a table. As a command:

    python -m engine.report RUN [RUN ...] [--output FILE.html] [--no-predict] [--max-examples N]
                            [--section.key=value ...]

RUN is a run folder. The page has the curves of its metrics.jsonl, its recipe and data, and what its best weights
predict for the validation rows: a confusion matrix, calibration, mistakes. It is one file, which loads nothing.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from engine import cli
from engine.config import ConfigError, split_arguments
from engine.errors import USER_ERRORS
from engine.report import PAGE
from engine.report.page import Examined, OfTasks, page
from engine.report.predictions import MORE, MOST_EXAMPLES, MOST_TEXTS, examine
from engine.report.runs import Run, open_runs
from engine.report.terminal import format_table
from engine.run_folder import BEST, LAST, PREVIOUS
from engine.tasks import MULTI_TASK

USAGE = "python -m engine.report RUN [RUN ...] [--output FILE.html] [--no-predict] [--max-examples N]"
OPTIONS = {
    "output FILE.html": "the page; default: report.html in the folder of the first run",
    "no-predict": "do not load the best weights: curves, recipe and data alone",
    "max-examples N": f"validation rows to predict at most; default: {MOST_EXAMPLES:,}, or {MOST_TEXTS} where texts "
    "are written",
}
MAX_DIGITS = 9


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    flag = "--no-predict"
    if {"--help", "-h"} & set(argv):
        cli.read_command(argv, USAGE, OPTIONS, MORE)
    names, given = split_arguments([argument for argument in argv if argument != flag])
    if not names:
        raise ConfigError(f"name a run folder: {USAGE}")
    output_name, most = given.pop("output", ""), _read_most(given.pop("max_examples", ""))
    cli.read_command([names[0], *(f"--{key}={value}" for key, value in given.items())], USAGE, OPTIONS, MORE)
    if useless := [key for key in given if not cli.is_used(key, MORE)]:
        raise ConfigError(f"--{useless[0]} has no effect on a trained model; --help lists the settings that have one")
    runs = open_runs(names)
    output = cli.check_output(output_name or str(runs[0].folder / PAGE), "")
    examined = [_examine(run, given, most, flag in argv) for run in runs]
    cli.write_output(output, [page(runs, examined)])
    console = cli.console_beside(output)
    print(format_table(runs, shutil.get_terminal_size().columns), file=console)
    print(f"report: {output}", file=console)
    return 0


def _read_most(text: str) -> int | None:
    """Return --max-examples; None where it is not given."""
    if text and (not text.isdecimal() or len(text) > MAX_DIGITS or not int(text)):
        raise ConfigError(f"--max-examples = {text!r:.80} should be a number of rows, from 1")
    return int(text) if text else None


def _examine(run: Run, given: dict[str, str], most: int | None, is_off: bool) -> Examined | OfTasks:
    """Return what the best weights predict, of several tasks each, or why that cannot be said."""
    if is_off:
        return "Nothing was predicted, because of --no-predict."
    if not any((run.folder / part).is_dir() for part in (BEST, LAST, PREVIOUS)):
        return _say_nothing(run.name, "the run has not saved weights yet")
    if run.settings.get("run.task") != MULTI_TASK:
        return _examine_one(run.name, run.folder, given, most)
    folders = {path.name.removeprefix(f"{BEST}-"): path for path in sorted(run.folder.glob(f"{BEST}-*"))}
    if not folders:
        return f"Nothing was predicted: there is no {BEST}-NAME/ yet, which a run of several tasks saves for each."
    if key := next((key for key in MORE if key in given), ""):
        raise ConfigError(f"--{key} has no effect on {run.name}, a run of several tasks: leave it out")
    return {name: _examine_one(f"{run.name}, {name}", path, given, most) for name, path in folders.items()}


def _examine_one(name: str, folder: Path, given: dict[str, str], most: int | None) -> Examined:
    try:
        return examine(str(folder), given, most)
    except USER_ERRORS as error:
        return _say_nothing(name, str(error))


def _say_nothing(name: str, reason: str) -> str:
    """Print why nothing is predicted, and return it as the page says it."""
    print(f"{name}: nothing is predicted: {reason}", file=sys.stderr)
    return f"Nothing was predicted: {reason}"


if __name__ == "__main__":
    cli.run_command(main)
