"""The first part of engine.prepare: a file is read and checked window by window, and its rows are divided.

The readers are those of training, so that a file has the same rows, errors and notes. What has to be known of all rows,
their ids, labels and groups, is collected window by window. The rows themselves lie in files of the folder, each of
which becomes a shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex, cast

import numpy as np

from data.errors import BadRowsError, DataError, ErrorList
from data.formats.lines import locate
from data.prepared import encode_row, iterate_rows
from data.row import Row, Rows
from data.split import hold_out, sample_places
from data.tag_schemes import count_pairs, find_scheme
from data.windows import read_windows
from data.writing import write_text
from engine.tasks import SKIP_HINT, Task, TaskSettings, check_labels
from engine.tasks.task import accept_labels, no_split_labels

WINDOW_ROWS = 2048  # read at a time
PART_ROWS = 65_536  # of a shard, at most
PART_CHARACTERS = 8_000_000  # of the rows of a shard, about; more in a file that would have above MOST_PARTS
MOST_PARTS = 16_384
TRAIN, HELD_OUT, SAMPLE = 1, 2, 4  # what a row is for, bits of its use
LEFT_OUT = " rows left out: "  # in the note of ErrorList.settle
_NUMBER = re.compile(r"\d[\d,.%]*")


class LabelRows(Rows):
    """A row for each row of a file, with its label alone; rows with the same label are one in memory.

    Iterating gives copies, since a check of labels writes into rows.
    """

    def __init__(self, rows: Iterable[Row], counts: Iterable[int]):
        super().__init__(rows)
        self.counts = dict(zip((row.line for row in self.distinct()), counts, strict=True))

    def distinct(self) -> Iterator[Row]:
        """Yield one row of each label."""
        return (row.updated({}) for row in list.__iter__(self))

    def __iter__(self) -> Iterator[Row]:
        return (row.updated({}) for row in list.__iter__(self) for _ in range(self.counts[row.line]))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __setitem__(self, key: SupportsIndex | slice, rows: Any) -> None:
        """Keep the rows that are among `rows`, as a check that leaves rows out does."""
        lines = {row.line for row in rows}
        kept = [row for row in list.__iter__(self) if row.line in lines]
        self.counts = {row.line: self.counts[row.line] for row in kept}
        super().__setitem__(slice(None), kept)


@dataclass
class Coded(Sequence[str]):
    """A text for each row, of which the different ones are in memory once."""

    names: dict[str, int] = field(default_factory=dict)
    codes: array[int] = field(default_factory=lambda: array("i"))

    def add(self, name: str) -> int:
        """Add the text of the next row; return its number."""
        code = self.names.setdefault(name, len(self.names))
        self.codes.append(code)
        return code

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, key: Any) -> Any:
        return [*self.names][self.codes[key]]

    def __iter__(self) -> Iterator[str]:
        names = [*self.names]
        return (names[code] for code in self.codes)


@dataclass
class Reading:
    """Facts about all rows of a file, collected window by window."""

    task: Task
    settings: TaskSettings
    parts: list[int] = field(default_factory=list)  # rows of each
    notes: list[str] = field(default_factory=list)
    num_left_out: int = 0
    first_left_out: str = ""
    is_held: bool = False  # whether all rows were in memory at once
    labels: Coded = field(default_factory=Coded)  # of each row, as JSON
    label_rows: list[Row] = field(default_factory=list)  # the first row with each label, or each pair of tags
    label_sets: Coded = field(default_factory=Coded)  # what Task.split_labels returns of each row, as JSON
    groups: Coded = field(default_factory=Coded)
    ids: array[int] = field(default_factory=lambda: array("Q"))  # hashes
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # of tags
    schemes: set[str] = field(default_factory=set)  # of tags, as the windows show them

    @property
    def has_tags(self) -> bool:
        """Whether a row has a label for each word."""
        return self.task.head == "token-classification"

    @property
    def has_label_table(self) -> bool:
        """Whether rows are classified, by labels that are checked."""
        return self.task.check_labels is not accept_labels and not self.has_tags

    def add(self, rows: Rows) -> None:
        """Count the labels, groups and ids of some rows."""
        column, is_split = self.settings.data.label_column, not self.settings.data.validation
        for row in rows:
            self.ids.append(
                int.from_bytes(hashlib.blake2b(row.id.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
            )
        if self.has_label_table:
            for row in rows:
                known = len(self.label_rows)
                if self.labels.add(json.dumps(row.values[column])) == known:
                    self.label_rows.append(Row(row.id, row.line, {column: row.values[column]}))
        if self.has_tags:
            self._add_tags(rows, column)
        if is_split and not self.has_label_table and self.task.split_labels is not no_split_labels:
            for names in self.task.split_labels(rows, self.settings):
                self.label_sets.add(json.dumps(sorted(names)))
        if is_split and (group := self.settings.data.group_column):
            for row in rows:
                self.groups.add(str(row.values.get(group)))

    def _add_tags(self, rows: Rows, column: str) -> None:
        pairs: Counter[tuple[str, str]] = Counter()
        for row in rows:
            own = count_pairs([row.values[column]])
            if not own.keys() <= self.pairs.keys() | pairs.keys():
                self.label_rows.append(Row(row.id, row.line, dict(row.values)))
            pairs.update(own)
        self.pairs.update(pairs)
        self.schemes |= {find_scheme(pairs, self.settings.own.tag_scheme)} if rows else set()


def part_file(folder: Path, kind: str, number: int, ending: str) -> Path:
    """Return the path of a file of part `number`."""
    return folder / f"{kind}-{number:05d}.{ending}"


def read_source(task: Task, settings: TaskSettings, folder: Path, update: Any) -> Reading:
    """Read and check data.train; write its rows to the files rows-00000.jsonl ... of the folder.

    update: called with the number of rows of each window. Raises one DataError with all errors of the file.
    """
    reading = _read_once(task, settings, folder, update, {})
    if repeated := _find_repeated(reading, folder):  # the reader says where, or leaves such rows out
        reading = _read_once(task, settings, folder, update, repeated)
    _check_scheme(reading)
    return reading


def _read_once(task: Task, settings: TaskSettings, folder: Path, update: Any, repeated: dict[str, int]) -> Reading:
    reading, errors, name = Reading(task, settings), ErrorList(), settings.data.train
    notes: list[str] = []

    def read() -> Rows:
        try:
            rows = task.read(name, settings, True)
        except DataError as error:
            if error.errors is None or error.errors.has_bad_file:
                raise DataError(f"{error}\n{SKIP_HINT}" if isinstance(error, BadRowsError) else str(error)) from None
            errors.extend(error.errors)
            return Rows()
        return rows if isinstance(rows, Rows) else Rows(rows)

    source = locate(name)
    most = max(PART_CHARACTERS, source.stat().st_size // MOST_PARTS if source.is_file() else 0)
    lines: list[str] = []
    characters = 0
    for window in read_windows(name, read, WINDOW_ROWS, repeated):
        rows = window.rows
        reading.add(rows)
        reading.is_held |= window.is_held
        notes += _take_left_out(reading, rows)
        for row in rows:
            lines.append(encode_row(row))
            characters += len(lines[-1])
            if len(lines) == PART_ROWS or characters >= most:
                _write_part(reading, folder, lines)
                lines, characters = [], 0
        update(len(rows))
    if lines:
        _write_part(reading, folder, lines)
    if errors and (settings.data.bad_rows != "skip" or not reading.parts):
        try:
            errors.raise_if_any(BadRowsError)
        except BadRowsError as error:
            raise DataError(f"{error}\n{SKIP_HINT}" if settings.data.bad_rows != "skip" else str(error)) from None
    reading.num_left_out += len(errors.reasons)
    if count := reading.num_left_out:
        first = reading.first_left_out or min(errors.found)[1]
        notes.append(f"{count:,} of {sum(reading.parts) + count:,}{LEFT_OUT}{first}")
    reading.notes = merge_notes(notes)
    return reading


def _take_left_out(reading: Reading, rows: Rows) -> list[str]:
    """Count the rows that a window left out; return its other notes."""
    if not rows.left_out:
        return rows.notes
    reading.num_left_out += len(rows.left_out)
    for note in rows.notes:
        if LEFT_OUT in note:
            reading.first_left_out = reading.first_left_out or note.partition(LEFT_OUT)[2].partition("; and ")[0]
    return [note for note in rows.notes if LEFT_OUT not in note]


def _write_part(reading: Reading, folder: Path, lines: list[str]) -> None:
    write_text(part_file(folder, "rows", len(reading.parts), "jsonl"), lines)
    reading.parts.append(len(lines))


def merge_notes(notes: Iterable[str]) -> list[str]:
    """Return each note once; of notes that differ in numbers only the first, with the number of the others."""
    kinds: dict[str, dict[str, None]] = {}
    for note in notes:
        kinds.setdefault(_NUMBER.sub("#", note), {})[note] = None
    merged = []
    for found in kinds.values():
        more = f" (the same with other numbers in {len(found) - 1:,} more parts of the file)" if len(found) > 1 else ""
        merged.append(next(iter(found)) + more)
    return merged


def _find_repeated(reading: Reading, folder: Path) -> dict[str, int]:
    """Return {id: the first line with it} of the ids that several rows have."""
    hashes = np.array(reading.ids, dtype=np.uint64)
    in_order = np.sort(hashes)
    twice = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    if not twice:
        return {}
    lines: dict[str, list[int]] = {}
    files = (part_file(folder, "rows", number, "jsonl") for number in range(len(reading.parts)))
    for row, hashed in zip((row for file in files for row in iterate_rows(file)), hashes.tolist(), strict=True):
        if hashed in twice:
            lines.setdefault(row.id, []).append(row.line)
    return {name: found[0] for name, found in lines.items() if len(found) > 1}


def _check_scheme(reading: Reading) -> None:
    """Raise DataError where a part of a file of tags alone would be read in another scheme than the whole file."""
    if not reading.has_tags or len(reading.schemes) < 2:
        return
    whole = find_scheme(reading.pairs, reading.settings.own.tag_scheme)
    others = ", ".join(sorted(reading.schemes - {whole, "none"}))
    if others:
        raise DataError(
            f"{reading.settings.data.train}: its tags follow {whole}, and those of a part of it alone {others}: "
            f"token_classification.tag_scheme = {whole} reads all of it alike"
        )


# What each row is for


@dataclass
class Division:
    """The labels of the data, and what each row that was read is for."""

    labels: list[str]
    uses: np.ndarray  # (rows,) uint8: the bits TRAIN, HELD_OUT and SAMPLE; 0: left out
    notes: list[str]
    table: list[Row] = field(default_factory=list)  # a row of each label, which a part is checked beside


def divide(reading: Reading, seed: int, subset_size: int) -> Division:
    """Find and check the labels, and hold rows out, as read_training_data does; DataError for unknown labels."""
    task, settings, name = reading.task, reading.settings, reading.settings.data.train
    data = settings.data
    counts = np.bincount(np.array(reading.labels.codes, dtype=np.int64), minlength=len(reading.label_rows)).tolist()
    rows = LabelRows(reading.label_rows, counts) if reading.has_label_table else Rows(reading.label_rows)
    labels = task.find_labels(name, rows, settings)
    check_labels(task, name, rows, settings, labels)
    canonical = Rows(row.updated({}) for row in reading.label_rows)
    check_labels(task, name, canonical, settings, labels)
    place = {row.line: i for i, row in enumerate(canonical)}
    places = np.array([place.get(row.line, -1) for row in reading.label_rows], dtype=np.int64)
    num_rows = sum(reading.parts)
    codes = np.zeros(num_rows, dtype=np.int64)
    if reading.has_label_table:
        codes = places[np.array(reading.labels.codes, dtype=np.int64)]
    kept = np.flatnonzero(codes >= 0)
    uses = np.zeros(num_rows, dtype=np.uint8)
    if not data.validation:
        values = [str(row.values.get(data.label_column)) for row in canonical]
        chosen = codes[kept].tolist()
        is_stratified = task.stratify and reading.has_label_table
        if reading.has_label_table and task.split_labels is not no_split_labels:
            sets = task.split_labels(canonical, settings)
            to_cover = [sets[code] for code in chosen]
        else:
            known = [tuple(json.loads(text)) for text in reading.label_sets.names]
            to_cover = [known[code] for code in reading.label_sets.codes]
        groups = [*reading.groups]
        is_held_out = hold_out(
            len(kept),
            data.validation_fraction,
            seed,
            data.group_column,
            data.label_column if is_stratified else "",
            [groups[i] for i in kept.tolist()] if groups else [],
            [values[code] for code in chosen] if is_stratified else [],
            to_cover,
        )
        uses[kept[is_held_out]] = HELD_OUT
        kept = kept[~is_held_out]
    train = kept[sample_places(len(kept), data.max_train_examples, seed)]
    uses[train] = TRAIN
    uses[train[sample_places(len(train), subset_size, seed)[:subset_size]]] |= SAMPLE
    return Division(labels, uses, [*rows.notes], reading.label_rows if reading.has_label_table else [])


def apply_labels(task: Task, rows: list[Row], settings: TaskSettings, division: Division) -> list[Row]:
    """Write the labels that the rows mean as those of all rows of the file do; return the rows that are kept."""
    own = {id(row) for row in rows}
    beside = Rows([*(row.updated({}) for row in division.table), *rows])
    check_labels(task, settings.data.train, beside, settings, division.labels)
    return [row for row in cast("list[Row]", beside) if id(row) in own]
