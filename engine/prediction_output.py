"""Where predictions go, a window of rows at a time: a file that is resumed after a crash, or a device or pipe.

A file of several windows is written as OUTPUT.partial, a line of JSON for each row, beside OUTPUT.partial.json, which
says what the predictions are made of and how much of the file is complete. Each window is on the disk before the next
one is predicted. Once the last window is complete, the file gets its own name, or is written as a table.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from data.notes import list_some
from data.table_writing import can_write, is_table, write_table
from data.writing import is_stream, open_stream, replace_file, to_json
from engine import cli
from engine.config import ConfigError
from engine.errors import TrainingError

SCHEMA = 1
Write = Callable[[Path, Callable[[], Iterable[dict[str, Any]]]], None]  # (file, rows, which can be read twice)
# What a name can promise, and is not written.
OTHER_FORMATS = (".npz", ".pt", ".safetensors", ".pkl", ".h5", ".xlsx", ".tsv", ".arrow", ".feather", ".gz", ".zip")
AGAIN = "the same command continues there"


class Output(Protocol):
    """Where windows of predictions go. num_windows, num_rows: those that are complete."""

    num_windows: int
    num_rows: int

    def append(self, lines: Sequence[str], notes: Iterable[str]) -> None: ...
    def finish(self) -> None: ...
    def describe(self) -> str: ...
    def notes(self) -> list[str]: ...


def check_format(output: Path, embeds: bool = False) -> None:
    """Raise ConfigError for a file of another format, one without its package, or .npy of what are no vectors."""
    if output.suffix.lower() in OTHER_FORMATS and not is_stream(output):
        more = ", .parquet or .npy" if embeds else " or .parquet"
        raise ConfigError(f"--output {str(output)!r}: {output.suffix} files are not written; name a .jsonl, .csv{more}")
    if output.suffix.lower() == ".npy" and not embeds:
        raise ConfigError(
            f"--output {str(output)!r}: a .npy file holds vectors, which --embeddings gives; name a .jsonl"
        )
    if is_table(output) and not can_write(output):
        raise ConfigError(
            f"--output {str(output)!r}: .parquet files need the package pyarrow: pip install pyarrow; or name a .jsonl"
        )


def open_output(
    output: Path, made_of: Mapping[str, Any], num_windows: int, stack: ExitStack, write: Write | None = None
) -> Output:
    """Return where the windows go. made_of: what the predictions are made of; all of it has to be equal to resume.

    write: writes all rows as a file of another format; None: by the end of the name a table, else lines of JSON.

    Raises ConfigError where the partial file of another run is there, or is in use.
    """
    if is_stream(output):
        return StreamOutput(output, stack)
    write = write or (write_table if is_table(output) else None)
    partial = PartialFile(output, write)
    if num_windows == 1 and not partial.state_file.exists():
        return WholeFile(output, write)
    partial.open(made_of, stack)
    return partial


def _failure(output: Path, error: OSError, kept: str = "") -> TrainingError:
    """Return the error of an output. kept: a phrase on what is kept of it."""
    return TrainingError(f"--output {str(output)!r} could not be written: {error.strerror or error}{kept}")


class Notes:
    """Sentences about the rows of each window; those that differ in numbers only are counted."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}  # {the sentence without its digits: [the first sentence, how many]}

    def add(self, notes: Iterable[str]) -> None:
        """Count the sentences of a part of the rows."""
        for note in notes:
            entry = self.found.setdefault("".join(c for c in note if not c.isdigit() and c not in ",."), [note, 0])
            entry[1] += 1

    def describe(self) -> list[str]:
        """Return each sentence once, with the number of others like it."""
        return [
            note
            if count == 1
            else f"{note} (in the first of {count:,} parts of the rows; the others differ in numbers only)"
            for note, count in self.found.values()
        ]


class WholeFile:
    """A file of a single window."""

    def __init__(self, path: Path, write: Write | None):
        self.path, self.num_windows, self.num_rows = path, 0, 0
        self._write = write
        self._notes = Notes()

    def append(self, lines: Sequence[str], notes: Iterable[str]) -> None:
        """Write the file. Raises TrainingError."""
        self._notes.add(notes)
        self.num_windows, self.num_rows = 1, len(lines)
        if self._write is None:
            cli.write_output(self.path, lines)
            return
        try:
            self._write(self.path, lambda: map(json.loads, lines))
        except OSError as error:
            raise _failure(self.path, error) from None

    def finish(self) -> None:
        """Do nothing: the file is complete."""

    def describe(self) -> str:
        """Return what is kept."""
        return "nothing was written"

    def notes(self) -> list[str]:
        """Return what is to be said about the rows."""
        return self._notes.describe()


class StreamOutput:
    """A device or pipe, which gets lines of JSON whatever its name, and cannot be resumed."""

    def __init__(self, path: Path, stack: ExitStack):
        self.path, self.num_windows, self.num_rows = path, 0, 0
        self._stack, self._notes = stack, Notes()
        self._stream: TextIO | None = None  # opened once there is something to write, as a pipe waits for its reader

    def append(self, lines: Sequence[str], notes: Iterable[str]) -> None:
        """Write the lines of a window. Raises TrainingError, and BrokenPipeError where the reader has ended."""
        try:
            if self._stream is None:
                self._stream = self._stack.enter_context(open_stream(self.path))
            self._stream.writelines(line + "\n" for line in lines)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _failure(self.path, error) from None
        self._notes.add(notes)
        self.num_windows, self.num_rows = self.num_windows + 1, self.num_rows + len(lines)

    def finish(self) -> None:
        """Do nothing: each window was flushed."""

    def describe(self) -> str:
        """Return what was written."""
        return f"the first {self.num_rows:,} rows were written"

    def notes(self) -> list[str]:
        """Return what is to be said about the rows."""
        return self._notes.describe()


class PartialFile:
    """The file that grows by windows, and the file with its state."""

    def __init__(self, output: Path, write: Write | None):
        target = Path(os.path.realpath(output))  # a link stays, and the file that it points to is written
        self.output, self.target, self._write = output, target, write
        self.lines_file = target.with_name(f"{target.name}.partial")
        self.state_file = target.with_name(f"{target.name}.partial.json")
        self.num_windows = self.num_rows = self.num_bytes = 0
        self._made_of: dict[str, Any] = {}
        self._notes = Notes()
        self._stream: FileIO | None = None

    def open(self, made_of: Mapping[str, Any], stack: ExitStack) -> None:
        """Lock the file, read its state, and cut what was written after the last complete window."""
        self._made_of = json.loads(to_json(made_of))
        try:
            # Not buffered: a buffer would be written again when it is closed, also after an error.
            descriptor = os.open(self.lines_file, os.O_RDWR | os.O_CREAT, 0o666)
            self._stream = stack.enter_context(FileIO(descriptor, "r+"))
            self._lock(self._stream)
            size = os.fstat(descriptor).st_size
            if size:  # else it has got its own name since, or was deleted
                self._continue(self._read_state(), size)
            stack.callback(self._remove_if_empty)
            self._stream.truncate(self.num_bytes)
            self._stream.seek(self.num_bytes)
            self._write_state(0, 0, 0)
        except OSError as error:
            raise self._explain(error) from None

    @property
    def _way_out(self) -> str:
        return f"delete {self.lines_file.name} and {self.state_file.name}, or name another --output"

    def _lock(self, stream: FileIO) -> None:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{self.lines_file} is being written by another process: name another --output") from None

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self.state_file.read_bytes())
            if state["schema"] == SCHEMA and isinstance(state["made_of"], dict):
                return dict(state)
        except FileNotFoundError:
            raise ConfigError(f"{self.lines_file} has no {self.state_file.name} beside it: {self._way_out}") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        raise ConfigError(f"{self.state_file} cannot be read, or is of another version: {self._way_out}")

    def _continue(self, state: dict[str, Any], size: int) -> None:
        """Take the counts of a state; ConfigError where it is of other predictions."""
        before, now = state["made_of"], self._made_of
        if differing := [name for name in now if before.get(name) != now[name]]:
            shown = [
                name if name.startswith("the ") else f"{name} = {before.get(name)!r:.60}, not {now[name]!r:.60}"
                for name in differing
            ]
            raise ConfigError(
                f"{self.lines_file} has the first {state['rows']:,} rows of other predictions, which differ in "
                f"{list_some(shown, 3)}: repeat their command to complete them; or {self._way_out}"
            )
        if size < state["bytes"]:
            raise ConfigError(f"{self.lines_file} is shorter than {self.state_file.name} says: {self._way_out}")
        self.num_windows, self.num_rows, self.num_bytes = state["windows"], state["rows"], state["bytes"]
        self._notes.found = state["notes"]

    def append(self, lines: Sequence[str], notes: Iterable[str]) -> None:
        """Append the lines of a window, and flush them to the disk, before the state says so. Raises TrainingError."""
        if self._stream is None:
            raise ValueError("append before open")
        content = memoryview("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
        self._notes.add(notes)
        try:
            left = content
            while left:
                left = left[self._stream.write(left) :]
            os.fsync(self._stream.fileno())
            self._write_state(1, len(lines), len(content))
        except OSError as error:
            raise self._explain(error) from None

    def _write_state(self, num_windows: int, num_rows: int, num_bytes: int) -> None:
        """Write the state with so many more windows, rows and bytes."""
        windows, rows, size = self.num_windows + num_windows, self.num_rows + num_rows, self.num_bytes + num_bytes
        state = {"schema": SCHEMA, "windows": windows, "rows": rows, "bytes": size}
        with replace_file(self.state_file) as temporary:
            text = to_json(state | {"made_of": self._made_of, "notes": self._notes.found}, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        self.num_windows, self.num_rows, self.num_bytes = windows, rows, size

    def finish(self) -> None:
        """Give the file its own name, or write it as a table. Raises TrainingError; the partial file is kept then."""
        try:
            if self._write is not None:
                self._write(self.output, self._rows)
                self.lines_file.unlink()
            else:
                os.replace(self.lines_file, self.target)
            self.state_file.unlink()
        except OSError as error:
            raise self._explain(error) from None

    def _rows(self) -> Iterator[dict[str, Any]]:
        with self.lines_file.open(encoding="utf-8", newline="\n") as stream:
            yield from map(json.loads, stream)

    def _remove_if_empty(self) -> None:
        if not self.num_windows:
            self.lines_file.unlink(missing_ok=True)
            self.state_file.unlink(missing_ok=True)

    def _explain(self, error: OSError) -> TrainingError:
        return _failure(self.output, error, f"; {self.describe()}")

    def describe(self) -> str:
        """Return what is kept."""
        if not self.num_windows:
            return "nothing is kept"
        return f"the predictions of the first {self.num_rows:,} rows are kept in {self.lines_file}; {AGAIN}"

    def notes(self) -> list[str]:
        """Return what is to be said about the rows."""
        return self._notes.describe()
