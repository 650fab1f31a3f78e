"""The error for unusable data, and the list in which a reader collects all errors and notes of a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set

from data.formats.options import FileOptions
from data.notes import shorten_lines
from data.row import LeftOut, Row, Rows

_VALUES = re.compile(r"""'[^'\n]*'|"[^"\n]*"|[-+.,\w]*\d[-+.,\w]*""")  # in a message: quoted, or with a digit
MEMORY = "memory:"  # the prefix of the names of rows in memory (data/formats/memory.py)


class DataError(ValueError):
    """Data that cannot be used. The message has the file, the line, the reason and what would work.

    A line of more than LONGEST characters, which quotes a long value, is shown without its middle.
    errors: the list of a reader that raised it; None where the error is a single one.
    """

    LONGEST = 1_000
    errors: ErrorList | None = None

    def __init__(self, message: str = ""):
        super().__init__(shorten_lines(message, self.LONGEST))


class BadRowsError(DataError):
    """Rows that cannot be used in a file that can be read; data.bad_rows = skip would leave them out."""


class ErrorList:
    """The errors of a file, as `file:line: reason`, collected while it is read, and sentences about the file.

    At its end a reader returns `settle(...)`: all rows, or without the bad ones where data.bad_rows is skip, or one
    DataError with all errors.
    """

    SHOWN = 20
    SHOWN_OF_KIND = 5  # errors that differ in numbers and quoted values only

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []  # (line, message)
        self.reasons: dict[int, str] = {}  # {line: the first reason}
        self.broken: dict[int, str] = {}  # {line: id} of records that could not be made a row
        self.notes: list[str] = []  # what was repaired or guessed
        self.unit = ""  # what line numbers count, such as "record", where rows are not on lines of their own
        self.has_bad_file = False  # an error of the file as a whole: no row of it can be used
        self.only_empty = True  # whether all errors are of texts that are empty
        self.of_empty: set[str] = set()  # the messages that are of such texts

    def __len__(self) -> int:
        return len(self.found)

    def add(
        self,
        path: object,
        line: int,
        reason: str,
        *,
        row: int = 0,
        place: str = "",
        is_empty: bool = False,
        of_file: bool = False,
    ) -> None:
        """Add the error of a row; `path` is a file, or the name of rows in memory, whose lines are their numbers.

        row: the line by which the row is known, where the error is in another line of it.
        place: what the message names instead of the line, where rows are not lines ("question 7").
        is_empty: the row is correct but has no text, so there is nothing to predict. of_file: an error of the whole
        file, such as a missing column, which data.bad_rows cannot skip.
        """
        place = place or (f"{self.unit} {line}" if self.unit else "")
        where = f": {place}" if place else f":{line}"
        self.found.append((line, message := f"{str(path).removeprefix(MEMORY)}{where}: {reason}"))
        self.of_empty |= {message} if is_empty else set()
        self.reasons.setdefault(row or line, reason)
        self.has_bad_file |= of_file
        self.only_empty &= is_empty

    def assign(self, line: int, row: int) -> None:
        """Make the error of a line that of the row known by the line `row`."""
        if line in self.reasons:
            self.reasons.setdefault(row, self.reasons.pop(line))

    def extend(self, other: ErrorList) -> None:
        """Add the errors and notes of another file whose lines belong to the same rows."""
        self.found += other.found
        self.notes += other.notes
        self.reasons = {**other.reasons, **self.reasons}
        self.has_bad_file |= other.has_bad_file
        self.only_empty &= other.only_empty
        self.of_empty |= other.of_empty

    def remove(self, lines: Set[int]) -> None:
        """Remove the errors of these lines, which one error of the file replaces."""
        self.found = [(line, message) for line, message in self.found if line not in lines]
        self.reasons = {line: reason for line, reason in self.reasons.items() if line not in lines}

    def move_to(self, other: ErrorList, before: float) -> None:
        """Move the errors of the lines before `before`, and all notes, to another list."""
        moved, kept = ([entry for entry in self.found if (entry[0] < before) is is_moved] for is_moved in (True, False))
        other.found += moved
        other.notes += self.notes
        other.reasons |= {line: reason for line, reason in self.reasons.items() if line < before}
        other.broken |= {line: id for line, id in self.broken.items() if line < before}
        other.unit = other.unit or self.unit
        other.has_bad_file |= self.has_bad_file
        other.only_empty &= all(message in self.of_empty for _, message in moved)
        other.of_empty |= self.of_empty
        self.found, self.notes = kept, []
        self.reasons = {line: reason for line, reason in self.reasons.items() if line >= before}
        self.broken = {line: id for line, id in self.broken.items() if line >= before}

    def raise_if_any(self, kind: type[DataError] = DataError) -> None:
        """Raise one DataError with the first errors and the number of the others; do nothing without errors."""
        if self.found:
            shown = self._choose_shown()
            left = len(self.found) - len(shown)
            error = kind("\n".join(shown) + (f"\n... and {left:,} more" if left else ""))
            error.errors = self
            raise error

    def _choose_shown(self) -> list[str]:
        """Return the messages that are shown, by line: the first few of each kind, so that none hides another."""
        kinds: Counter[str] = Counter()
        shown = []
        for _, text in sorted(self.found, key=lambda item: item[0]):
            kind = _VALUES.sub("", text)
            kinds[kind] += 1
            shown += [text] if kinds[kind] <= self.SHOWN_OF_KIND else []
        return shown[: self.SHOWN]

    def settle(self, rows: list[Row], options: FileOptions) -> Rows:
        """Return the rows that have no errors, with the notes; or raise all errors.

        options.bad_rows: skip leaves rows with errors out, and says so in a note. options.accept_empty: rows whose only
        fault is that they have no text are left out in any case. Raises the errors if no row is left.
        """
        skipping = options.bad_rows == "skip" or (options.accept_empty and self.only_empty)
        if options.accept_empty and not skipping:  # what stops it are the others
            self.found = [(line, message) for line, message in self.found if message not in self.of_empty]
        if self.has_bad_file or not skipping:
            self.raise_if_any(DataError if self.has_bad_file else BadRowsError)
        good = [row for row in rows if row.line not in self.reasons]
        ids = {row.line: row.id for row in rows if row.line in self.reasons} | self.broken
        left_out = [LeftOut(ids.get(line, str(line)), line, reason) for line, reason in sorted(self.reasons.items())]
        if not good and left_out and not options.accept_empty:
            self.raise_if_any()
        return Rows(good, notes=[*self.notes, *self._describe_left_out(len(good) + len(left_out))], left_out=left_out)

    def _describe_left_out(self, count: int) -> list[str]:
        if not self.reasons:
            return []
        _, first = min(self.found, key=lambda item: item[0])
        others = f"; and {len(self.reasons) - 1:,} more" if len(self.reasons) > 1 else ""
        return [f"{len(self.reasons):,} of {count:,} rows left out: {first}{others}"]
