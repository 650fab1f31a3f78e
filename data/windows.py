"""A file of rows that is read a window at a time, in memory that does not grow with the file.

    for window in read_windows(name, read, size=8192):  # elsewhere, read() reads the whole file
        use(window.rows)

Readers take their records from `open_source(name)`. While read_windows goes over that file, each call of a
reader gets the records of the next window. At other times it gets all of them.

Read in windows: .jsonl, .csv, .tsv, .parquet, .arrow, .txt, and a word or a sentence a line. Other formats, such as
one JSON document, two parallel files or a folder of images, are held as a whole and divided into windows afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.errors import MEMORY, ErrorList
from data.formats.lines import locate
from data.row import Row, Rows

MAX_CHARACTERS = 64_000_000  # of the rows of a window, so that long texts do not fill the memory


@dataclass
class Source:
    """The records of a file for one reader, and what it has seen of the file before this window.

    limit: the rows of a window; 0: all rows of the file.
    repeated: {id: the first line with it} of ids that occur in several windows.
    """

    limit: int = 0
    repeated: Mapping[str, int] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)  # of all rows
    num_rows: int = 0  # good ones
    has_ids: bool = False  # whether a row had the column of ids
    line_without_id: int = 0  # the first line, where the rows before this window have no column of ids
    is_read: bool = False  # to the end of the file
    _errors: ErrorList = field(default_factory=ErrorList)
    _records: Iterator[Row] | None = None
    _upcoming: Row | None = None

    def take(self, make: Callable[[ErrorList], Iterator[Row]], errors: ErrorList) -> Iterator[Row]:
        """Return the records of the window; make(errors) yields those of the file. Errors are added to `errors`."""
        return self._take_window(make, errors) if self.limit else make(errors)

    def _take_window(self, make: Callable[[ErrorList], Iterator[Row]], errors: ErrorList) -> Iterator[Row]:
        if self._records is None:
            self._records = make(self._errors)
            self._upcoming = next(self._records, None)
        count = characters = 0
        try:
            while self._upcoming is not None and count < self.limit and characters < MAX_CHARACTERS:
                record = self._upcoming
                count, characters = count + 1, characters + _size(record.values)
                yield record
                self._upcoming = next(self._records, None)
            self.is_read = self._upcoming is None
        finally:
            # The upcoming record may have errors, too.
            self._errors.move_to(errors, math.inf if self._upcoming is None else self._upcoming.line)


def _size(value: Any) -> int:
    """Return about how many characters a value has."""
    kind = type(value)
    if kind is str or kind is bytes:
        return len(value)
    items = value.values() if kind is dict else value if kind is list else ()
    return 1 + sum(map(_size, items))


@dataclass
class _Windows:
    """The sources of a file that is read in windows, in the order in which a reader opens them in each window."""

    limit: int
    repeated: Mapping[str, int]
    sources: list[Source] = field(default_factory=list)
    num_opened: int = 0  # in this window


_OPEN: dict[str, _Windows] = {}  # by the name of the file


def open_source(name: str) -> Source:
    """Return the records of a file for one reader. Each reader of the file calls this once in every window."""
    windows = _OPEN.get(name)
    if windows is None:
        return Source()
    if windows.num_opened == len(windows.sources):
        windows.sources.append(Source(windows.limit, windows.repeated))
    windows.num_opened += 1
    return windows.sources[windows.num_opened - 1]


class RowWindow(NamedTuple):
    """Some rows of a file, next to each other."""

    rows: Rows
    is_last: bool
    is_held: bool  # whether all rows of the file are in memory


def read_windows(
    name: str, read: Callable[[], Rows], size: int, repeated: Mapping[str, int] | None = None
) -> Generator[RowWindow, None, None]:
    """Yield the windows of a file, in its order.

    read: the reader of the file, called for each window. size: the rows of a window at most. repeated: as in Source. A
    file that cannot be read a second time, such as a pipe, is read as a whole.
    """
    path = locate(name.removeprefix(MEMORY))
    if name.startswith(MEMORY) or not (path.is_file() or path.is_dir()):
        yield from _divide(read(), size)
        return
    with _reading(name, _Windows(size, repeated or {})) as windows:
        is_read = False
        while not is_read:
            windows.num_opened = 0
            rows = read()
            if not windows.num_opened:
                yield from _divide(rows, size)
                return
            is_read = windows.sources[0].is_read
            yield RowWindow(rows, is_read, False)


@contextmanager
def _reading(name: str, windows: _Windows) -> Iterator[_Windows]:
    _OPEN[name] = windows
    try:
        yield windows
    finally:
        del _OPEN[name]


def _divide(rows: Rows, size: int) -> Iterator[RowWindow]:
    """Yield all rows of a file in windows, each with the rows that were left out among its own."""
    left_out = sorted(rows.left_out, key=lambda row: row.line)
    if len(rows) <= size:
        yield RowWindow(rows, True, True)
        return
    ordered: list[Row] = sorted(rows, key=lambda row: row.line)
    for begin in range(0, len(ordered), size):
        window, is_last = ordered[begin : begin + size], begin + size >= len(ordered)
        end = len(left_out) if is_last else sum(row.line < ordered[begin + size].line for row in left_out)
        notes = rows.notes if begin == 0 else ()
        yield RowWindow(Rows(window, notes=notes, left_out=left_out[:end]), is_last, True)
        del left_out[:end]
