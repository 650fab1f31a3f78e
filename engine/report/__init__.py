"""The report of one or several runs: a page of HTML that needs no network and no script, and a table for the terminal.

__main__.py     the command: python -m engine.report RUN [RUN ...]
runs.py         what a run folder keeps: metrics.jsonl, the recipe, the model card
summary_file.py what a run said before its first step: the model, the data, the steps
predictions.py  what the best weights predict for the validation rows: metrics, tables, mistakes
shown.py        one example as it is shown: its text with marks, or a small image
charts.py       charts as inline SVG
curves.py       the charts of metrics.jsonl, of one run or of several
mistakes.py     the part of the page about predictions
page.py         the page
style.py        its style sheet, light and dark
terminal.py     the table for the terminal
judge.py        predictions beside what is right, and how wrong they are
"""

from __future__ import annotations

import shlex
from pathlib import Path

from data.writing import write_text
from engine.errors import TrainingError

PAGE = "report.html"


def write_page(folder: Path) -> None:
    """Write report.html of a run that has ended, without predictions; TrainingError where that fails."""
    from engine.report.page import page  # here, since only the end of a run needs it
    from engine.report.runs import open_runs

    hint = f"`python -m engine.report {shlex.quote(str(folder))}` adds what the best weights predict."
    try:
        write_text(folder / PAGE, [page(open_runs([str(folder)]), [hint])])
    except OSError as error:
        raise TrainingError(f"{folder / PAGE} could not be written: {error.strerror}; the run is complete") from None
