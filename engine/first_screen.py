"""The first screen of a run: what is trained on what, warnings first, in few lines; summary.txt has the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Examples
from data.lengths import count_lengths
from data.notes import count_of, join
from engine.commands import as_started
from engine.config import DEFAULT_RECIPE, ModelSettings, split_arguments
from engine.screen import LINES, WARNING, Screen, terminal_width, wrap
from models import TaskModel
from models.checkpoints.weights import LoadReport

LABEL = 7  # columns of the names at the left
SHOWN_LABELS = 6
FEWEST = 3  # lines of warnings, where the terminal is too narrow for LINES
CUT = " ..."  # after the lines of a warning that is not shown whole


class Summary(NamedTuple):
    """The facts of a run before its first step.

    full: all of it as a text. facts: {name: lines}, of the first screen. warnings and notes: in sentences, about the
    model, the data and the settings; a warning has no mark of its own. report: the load report where it is unusual.
    columns: the metrics that the screen shows, first the watched one. recipe: all settings.
    """

    full: str
    facts: dict[str, list[str]]
    warnings: list[str]
    notes: list[str]
    report: str
    columns: tuple[str, ...]
    recipe: dict[str, Any]


def name_default_recipe(argv: Sequence[str]) -> str:
    """Return the first line of a run whose command line names no recipe: which one it is; "" for other runs."""
    if split_arguments([*argv])[0]:
        return ""
    return f"recipe {DEFAULT_RECIPE}, a shipped one; another: {as_started('python -m engine.train RECIPE')}"


def show(found: Summary | None, screen: Screen, is_dry_run: bool) -> None:
    """Print the first screen, in a dry run the whole summary; quiet and as JSON the warnings and notes alone.

    A dry run as JSON has {"summary": ...}, too.
    """
    if found is None:
        return
    if screen.is_json or screen.is_quiet:
        if is_dry_run:
            screen.write_row({"summary": found.full})
        for line in found.warnings:
            screen.warn(WARNING + line)
        for line in found.notes:
            screen.say(line)
    elif is_dry_run:
        screen.show(found.full)
    else:
        screen.show("\n".join(first_screen(found, terminal_width())) + "\n")


def first_screen(found: Summary, width: int) -> list[str]:
    """Return the lines of the first screen.

    width: of a terminal, on which lines are wrapped, notes are counted, and of the warnings as many are shown as LINES
    leave room for, of the first one at least its beginning; 0: of none, where all are shown.
    """
    facts = {name: block(name, lines, width) for name, lines in found.facts.items()}
    if width:
        room = LINES - 1 - sum(map(len, facts.values())) - bool(found.notes or found.warnings)
        shown, more = fit_warnings(found.warnings, max(room, FEWEST), width)
        more += [count_of(len(found.notes), "note")] if found.notes else []
        shown += block("", [f"{join(more)}: all in summary.txt, and with --dry-run"], width) if more else []
    else:
        shown = block("", [*(WARNING + line for line in found.warnings), *found.notes], width)
        shown = shown if found.warnings or found.notes else []
    facts["data"] += shown
    lines = [line for of_fact in facts.values() for line in of_fact]
    return [*lines, *(["", *wrap(found.report, width).split("\n")] if found.report else [])]


def fit_warnings(warnings: Sequence[str], room: int, width: int) -> tuple[list[str], list[str]]:
    """Return the lines of the first warnings, at most `room`, and what they leave out, in words."""
    shown = list[str]()
    for i, warning in enumerate(warnings):
        lines = block("", [WARNING + warning], width)
        if len(shown) + len(lines) <= room:
            shown += lines
        elif shown:
            return shown, [count_of(len(warnings) - i, "more warning")]
        else:  # a long list of labels, say; what it leaves out may take a line more
            *lines, last = block("", [WARNING + warning], width - len(CUT))[: room - 1]
            others = [count_of(len(warnings) - 1, "more warning")] if len(warnings) > 1 else []
            return [*lines, last + CUT], ["the end of this warning", *others]
    return shown, []


def block(name: str, lines: Sequence[str], width: int) -> list[str]:
    """Return lines behind a name, each wrapped at the width (0: not)."""
    text = "\n".join(f"{name if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate("\n".join(lines).split("\n")))
    wrapped = [wrap(line, width, indent=LABEL if name and i == 0 else 0) for i, line in enumerate(text.split("\n"))]
    return "\n".join(wrapped).split("\n")


def describe_model(model: TaskModel, parameters: int, trained: int, start: ModelSettings, folder: str) -> list[str]:
    """Return the model, its size, and how many tensors were loaded, are new, and were left unread in the file.

    start: [model]. folder: of the run, from which a resumed run reads its weights.
    """
    report = model.report
    source = report.source if report.source.startswith(folder) else start.name
    size = f"{parameters / 1e6:.3g} M parameters" if parameters >= 1e6 else f"{parameters:,} parameters"
    size += "" if trained == parameters else f", {trained / parameters:.2%} trained"
    name = f"{model.spec.architecture.weights.model_type} from {source}"
    if not report.loaded:
        return [f"{name}, only its shape", f"{size}; weights: {report.source}"]
    heads = " (head)" if report.initialised and _only_heads(report) else ""
    tensors = [f"{len(report.loaded)} loaded", f"{len(report.initialised)} new{heads}", f"{len(report.ignored)} unused"]
    tensors = [text for text in tensors if not text.startswith("0 ")]
    return [name, f"{size}; tensors: {', '.join(tensors)}"]


def unusual_report(report: LoadReport, start: ModelSettings) -> str:
    """Return the load report where other parameters than those of the head were not in the file; else ""."""
    is_usual = not report.loaded or start.reinit_layers > 0 or _only_heads(report)
    return "" if is_usual else str(report)


def _only_heads(report: LoadReport) -> bool:
    return all(name.startswith("head.") for name in report.initialised)


def describe_data(sets: Sequence[Examples]) -> str:
    """Return how many examples there are for training, validation and test, and how long those for training are."""
    named = zip(("training", "validation", "test"), sets, strict=True)
    counts = [f"{len(examples):,} {name}" for name, examples in named if len(examples)]
    by_length = count_lengths(sets[0].lengths)
    mean = by_length @ np.arange(len(by_length)) / len(sets[0])
    return f"{join(counts)} examples; tokens: mean {mean:.3g}, max {len(by_length) - 1:,}"


def shorten_step(step: str) -> str:
    """Return a step in words (summary.describe_step) without its beginning and the last step of an epoch."""
    short = step.partition("; the last step")[0]
    return short if "is more than" in short else f"step = {short.partition(' = ')[2]}"


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def split_warnings(lines: Sequence[str], where: str = "") -> tuple[list[str], list[str]]:
    """Return (the warnings, without their mark; the other lines). where: put before each, such as "training: "."""
    warnings = [where + line.removeprefix(WARNING) for line in lines if line.startswith(WARNING)]
    return warnings, [where + line for line in lines if not line.startswith(WARNING)]
