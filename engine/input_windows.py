"""The file to predict, in windows of rows: all of it is checked first, then each window is read when it is needed.

So every bad row is reported before anything is predicted, and memory does not grow with the file. A file of one window
is read once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from data import Rows
from data.errors import BadRowsError, DataError, ErrorList
from data.formats.rows import KEPT
from data.prepared import check_no_folder
from data.windows import read_windows
from engine.kept_columns import check_kept, find_columns
from engine.tasks import SKIP_HINT, Task, TaskSettings, read_file

DIGITS = 32  # of a checksum
MAX_ERRORS = 10_000  # that are collected; a file with more is not read any further


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class InputWindows:
    """A file whose rows can all be read. `held`: its windows, where its rows are in memory.

    checksum: of the ids, lines and values of all rows. checksums: of each window. num_rows: with those left out.
    repeated: {id: the first line with it} of ids that occur in several windows.
    """

    task: Task
    name: str
    settings: TaskSettings
    size: int
    checksum: str
    checksums: list[str]
    num_rows: int
    held: list[Rows] | None
    repeated: Mapping[str, int]

    @property
    def notes(self) -> list[str]:
        """Sentences about how the file is read."""
        if self.held is None or len(self.held) < 2:
            return []
        return [f"all rows of {self.name} were in memory: its format has no parts that can be read alone"]

    def __len__(self) -> int:
        return len(self.checksums)

    def __iter__(self) -> Iterator[Rows]:
        """Yield the windows, read again unless they are in memory; DataError if the file has changed meanwhile."""
        if self.held is not None:
            yield from self.held
            return
        for rows, checksum in itertools.zip_longest(self._read(), self.checksums):
            if rows is None or _checksum(rows, hashlib.sha256()) != checksum:
                raise DataError(f"{self.name}: the file has changed since it was checked: start again")
            yield rows

    def _read(self) -> Iterator[Rows]:
        def read() -> Rows:
            return read_file(self.task, self.name, self.settings, False)

        with closing(read_windows(self.name, read, self.size, self.repeated)) as windows:
            yield from (window.rows for window in windows)


def check_input(task: Task, name: str, settings: TaskSettings, size: int) -> InputWindows:
    """Read a file to predict, in windows of `size` rows, and drop them; one DataError with all its errors."""
    check_no_folder(name)
    found = _check(task, name, settings, size, {})
    hashes = np.sort(np.concatenate(found.hashes)) if found.held is None else np.empty(0, np.int64)
    repeated = frozenset(hashes[:-1][hashes[1:] == hashes[:-1]].tolist())
    if repeated and (lines := _first_lines(task, name, settings, size, repeated)):
        found = _check(task, name, settings, size, lines)  # with their errors
    check_kept(name, settings.kept, found.columns)
    checksum = found.digest.hexdigest()[:DIGITS]
    return InputWindows(
        task, name, settings, size, checksum, found.checksums, found.num_rows, found.held, found.repeated
    )


@dataclass
class _Check:
    """What one pass over a file has found. hashes: of the ids of each window. columns: where some are to be kept."""

    repeated: Mapping[str, int]
    digest: Digest = field(default_factory=hashlib.sha256)
    checksums: list[str] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    num_rows: int = 0
    held: list[Rows] | None = None
    columns: dict[str, None] = field(default_factory=dict)


def _check(task: Task, name: str, settings: TaskSettings, size: int, repeated: Mapping[str, int]) -> _Check:
    errors, found = ErrorList(), _Check(repeated)

    def read() -> Rows:
        try:
            rows = task.read(name, settings, False)
            return rows if isinstance(rows, Rows) else Rows(rows)  # a plugin's reader may return a list
        except DataError as error:
            if error.errors is None:
                raise
            errors.extend(error.errors)
            if errors.has_bad_file or len(errors) > MAX_ERRORS:
                errors.raise_if_any(type(error))
            return Rows()

    try:
        with closing(read_windows(name, read, size, repeated)) as windows:
            for window in windows:
                rows = window.rows
                found.num_rows += len(rows) + len(rows.left_out)
                found.columns.update(find_columns(name, rows, settings.kept))
                found.checksums.append(_checksum(rows, found.digest))
                found.hashes.append(np.fromiter((hash(row.id) for row in rows), np.int64, len(rows)))
                if window.is_held or (window.is_last and len(found.checksums) == 1):
                    found.held = [*(found.held or []), rows]
        errors.raise_if_any(BadRowsError)
    except BadRowsError as error:
        raise DataError(f"{error}\n{SKIP_HINT}") from None
    return found


def _first_lines(task: Task, name: str, settings: TaskSettings, size: int, hashes: frozenset[int]) -> Mapping[str, int]:
    """Return {id: its first line} of the ids with these hashes that occur in several windows."""
    lines: dict[str, int] = {}
    repeated: set[str] = set()
    with closing(read_windows(name, lambda: read_file(task, name, settings, False), size)) as windows:
        for window in windows:
            for row in (row for row in window.rows if hash(row.id) in hashes):
                if lines.setdefault(row.id, row.line) != row.line:
                    repeated.add(row.id)
    return {id: line for id, line in lines.items() if id in repeated}


def _checksum(rows: Rows, whole: Digest) -> str:
    """Return a checksum of rows, which are added to that of the whole file.

    It is the same on every machine: images count by their content, not by their path.
    """
    digest = hashlib.sha256()
    for row in rows:
        values = {name: value for name, value in row.values.items() if name != KEPT and not isinstance(value, Path)}
        kept = row.values.get(KEPT, {})
        if changed := {name: value for name, value in kept.items() if value is not row.values.get(name)}:
            values[KEPT] = changed  # the others are in the row
        content = repr((row.id, row.line, values)).encode(errors="surrogatepass")
        digest.update(content)
        whole.update(content)
    content = repr([tuple(row) for row in rows.left_out]).encode(errors="surrogatepass")
    digest.update(content)
    whole.update(content if rows.left_out else b"")
    return digest.hexdigest()[:DIGITS]
