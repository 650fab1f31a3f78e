"""What a run prints: lines for people above a progress bar, or with log.json one JSON object a line.

stdout has the lines, stderr the bar. On a terminal lines are wrapped between words, and the bar fits into one line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from data.notes import display_width, printable
from data.writing import to_json
from engine.config import LogSettings

WARNING = "warning: "  # how a warning begins
LINES = 15  # of the first screen
SHORT_BAR, LONG_BAR = 70, 120  # columns: below the first a bar has only numbers, from the second on tqdm's own format
LINES_A_RUN = 15  # lines of training on a terminal, beside the bar


class Screen:
    """stdout of a run on rank 0; on other ranks every method returns at once.

    - show: what metrics.jsonl or summary.txt says too.
    - say: a note; warn: a warning; with log.json {"note": ...} and {"warning": ...}.
    - result: the line with the result, which is not repeated with log.json.
    - write_row: a row of metrics.jsonl, only with log.json.

    log.level = "quiet" leaves warnings and the result: the line, or the row that ends the run.
    """

    def __init__(self, settings: LogSettings, is_main: bool = True):
        self.is_main, self.is_json = is_main, settings.json
        self.is_quiet = settings.level == "quiet"
        self.has_bar = not self.is_quiet and sys.stderr.isatty()
        self.started = time.monotonic()

    def show(self, text: str, indent: int = 2, separator: str = " ") -> None:
        """Print what metrics.jsonl or summary.txt says too. indent and separator: as for wrap."""
        if not self.is_json and not self.is_quiet:
            self._print(wrap(text, terminal_width(), indent, separator))

    def show_commands(self, text: str) -> None:
        """Print lines to copy, which are not wrapped."""
        if not self.is_json and not self.is_quiet:
            self._print(text)

    def say(self, text: str) -> None:
        """Print a note, unless it is empty; one that begins as a warning does is a warning."""
        if text.lstrip().startswith(WARNING):
            self.warn(text)
        elif self.is_json and not self.is_quiet and text:
            self._print(to_json({"note": text.strip()}))
        else:
            self.show(text)

    def warn(self, text: str) -> None:
        """Print a warning, in whatever words, unless it is empty."""
        if self.is_json and text:
            self._print(to_json({"warning": text.strip().removeprefix(WARNING)}))
        else:
            self._print(wrap(text, terminal_width()))

    def result(self, text: str) -> None:
        """Print the line that even a quiet run ends with."""
        if not self.is_json:
            self._print(wrap(text, terminal_width()))

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Print a row of metrics.jsonl where that is the format."""
        if self.is_json and (not self.is_quiet or "end" in row):
            self._print(to_json(dict(row)))

    def _print(self, text: str) -> None:
        if self.is_main and text:  # which may be of the data, with characters that a terminal obeys
            tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stdout)
            sys.stdout.flush()


class ProgressBar:
    """The bar of a run on stderr, where that is a terminal: its steps, the time left, the loss, lr and speed."""

    def __init__(self, start: int, total: int, is_shown: bool):
        self.total = total
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not is_shown, dynamic_ncols=True)
        self.shown_at = start  # the step of the last line of training on a terminal

    def move_to(self, step: int) -> None:
        """Show the number of steps taken."""
        self.bar.update(step - self.bar.n)  # by 0 for a skipped step

    def show_step(self, loss: float, lr: float, rate: float) -> None:
        """Show the numbers of a step, as many as one line has room for."""
        if self.bar.disable:
            return
        width = terminal_width(sys.stderr) or LONG_BAR
        self.bar.bar_format, numbers = bar_format(width, self.total, self._time_left(), loss, lr, rate)
        self.bar.set_postfix_str(numbers, refresh=False)

    def _time_left(self) -> str:
        """Return the time left as the bar shows it."""
        now = self.bar.format_dict
        rate = now["rate"] or (now["n"] - now["initial"]) / max(now["elapsed"], 1e-6)
        return str(tqdm.format_interval((self.total - now["n"]) / rate)) if rate else "00:00"

    def is_line_due(self, step: int) -> bool:
        """Return whether a line of training is printed: each on no terminal, and LINES_A_RUN of a run on one."""
        if not terminal_width():
            return True
        every = max(1, self.total // LINES_A_RUN)
        is_due = step // every > self.shown_at // every or step == self.total
        self.shown_at = step if is_due else self.shown_at
        return is_due

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def bar_format(width: int, total: int, left: str, loss: float, lr: float, rate: float) -> tuple[str | None, str]:
    """Return tqdm's bar_format for a terminal of so many columns, and the numbers that fit behind the time left.

    tqdm leaves the last column free, and cuts off what is longer.
    """
    numbers = [
        f"loss {loss:.4f}, lr {lr:.2e}, {rate:.1f} examples/s",
        f"loss {loss:.4f}, lr {lr:.1e}, {rate:.0f} ex/s",
        f"loss {loss:.3f}, lr {lr:.1e}, {rate:.0f}/s",
        f"loss {loss:.3f}, {rate:.0f}/s",
        f"loss {loss:.3f}",
    ]
    if width >= LONG_BAR:
        return None, numbers[0]
    room = width - 1 - len(f"{total}/{total}, {left} left, ")
    if width < SHORT_BAR:
        counts = "{n_fmt}/{total_fmt}" if len(numbers[-1]) <= room else "{percentage:.0f}%"
        return f"{counts}, {{remaining}} left{{postfix}}", first_that_fits(numbers, room)
    numbers_room = room - len("100%|..........| ")
    return "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}", first_that_fits(
        numbers, numbers_room
    )


def step_line(width: int, step: int, loss: float, lr: float, grad_norm: float, rate: float) -> str:
    """Return the line of a training step. width: of the terminal; 0: of none, where the line is whole."""
    head = f"step {step:>6}  loss {loss:.4f}  lr {lr:.2e}"
    whole = f"{head}  norm {grad_norm:.2f}  {rate:.1f} examples/s"
    shorter = f"step {step:>6}  loss {loss:.4f}"
    return first_that_fits([whole, f"{head}  {rate:.1f} ex/s", head, shorter], width) if width else whole


def first_that_fits(texts: Sequence[str], width: int) -> str:
    """Return the first text that is not longer than `width`, else the last one."""
    return next((text for text in texts if len(text) <= width), texts[-1])


def terminal_width(stream: TextIO | None = None) -> int:
    """Return the columns of the terminal that a stream (None: stdout) writes to; 0 where it writes elsewhere."""
    stream = stream or sys.stdout
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):  # closed, or a stream of Python's own
        return 0


def wrap(text: str, width: int, indent: int = 2, separator: str = " ") -> str:
    """Return a text with its long lines wrapped between words; a longer word, such as a path, stays whole.

    width: in columns, of which a Chinese character takes two; 0: nothing is wrapped. indent: of what follows a break,
    beside the line's own. separator: where a line may be broken.
    """
    if not width:
        return text
    return "\n".join(part for line in text.split("\n") for part in _wrap_line(line, width, indent, separator))


def _wrap_line(line: str, width: int, indent: int, separator: str) -> list[str]:
    if display_width(line) <= width:
        return [line]
    margin = " " * (len(line) - len(line.lstrip()) + indent)
    lines, current = list[str](), ""
    for i, word in enumerate(line.split(separator)):
        longer = f"{current}{separator}{word}" if i else word
        if display_width(longer) > width and current.strip():
            lines.append(current.rstrip())
            current = margin + word
        else:
            current = longer
    return [*lines, current.rstrip()]
