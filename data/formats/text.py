"""Files of plain text: a text a line, or two files whose lines belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.errors import DataError, ErrorList
from data.formats.lines import COMPRESSED, clean_lines, locate
from data.formats.options import FileOptions
from data.notes import count_of
from data.row import Row
from data.windows import open_source


def read_lines(name: str, column: str, errors: ErrorList, options: FileOptions = FileOptions()) -> list[Row]:
    """Return a row for each line that is not empty; ids are the numbers of the lines, whichever of them are empty.

    Bad lines are added to `errors`. DataError for a file that cannot be read or has no lines.
    """
    source = open_source(name)
    errors.notes += options.name_unused(["delimiter", "quotes"])
    try:
        rows = list(source.take(lambda errors: _rows_of_lines(name, column, errors, options), errors))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    source.num_rows += len(rows)
    if not source.num_rows and not errors:
        raise DataError(f"{name}: no lines of text")
    return rows


def _rows_of_lines(name: str, column: str, errors: ErrorList, options: FileOptions) -> Iterator[Row]:
    num_empty = 0
    for line, content in clean_lines(locate(name), errors, options):
        if content.strip():
            yield Row(str(line), line, {column: content})
        else:
            num_empty += 1
    if num_empty:
        errors.notes.append(f"{count_of(num_empty, 'empty line')} left out; ids are the numbers of the lines")


def read_parallel(
    name: str, suffixes: Sequence[str], errors: ErrorList, options: FileOptions = FileOptions()
) -> list[Row]:
    """Return a row for each line number of the files NAME.suffix; the suffixes are the columns, ids the line numbers.

    A bad line of one file is added to `errors`, and neither file has a row for it. DataError for a file that cannot be
    read, and where the files have different numbers of lines.
    """
    texts: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    errors.notes += options.name_unused(["delimiter", "quotes"])
    for suffix in suffixes:
        path = _find_parallel(name, suffix)
        bad_lines = ErrorList()
        try:
            texts[suffix] = dict(clean_lines(path, bad_lines, options))
        except FileNotFoundError:
            files = " and ".join(f"{name}.{suffix}" for suffix in suffixes)
            hint = f", so that the name is '{Path(name).with_suffix('')}' here" if locate(name).is_file() else ""
            raise DataError(f"{path}: no such file; data.format = 'parallel' reads {files}{hint}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        counts[f"{name}.{suffix}"] = max([*texts[suffix], *bad_lines.reasons], default=0)
        errors.extend(bad_lines)
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise DataError(f"{found} lines: line n of one belongs to line n of the other, so they must be equal")
    lines = range(1, max(counts.values()) + 1)
    if not lines:
        raise DataError(f"{name}.{suffixes[0]}: no lines")
    complete = [line for line in lines if all(line in found for found in texts.values())]
    return [Row(str(line), line, {suffix: found[line] for suffix, found in texts.items()}) for line in complete]


def _find_parallel(name: str, suffix: str) -> Path:
    """Return the path of one of two parallel files, which may be compressed."""
    path = Path(f"{locate(name)}.{suffix}")
    packed = (path.with_name(path.name + ending) for ending in COMPRESSED)
    return path if path.exists() else next((other for other in packed if other.exists()), path)
