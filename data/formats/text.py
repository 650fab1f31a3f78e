"""Files of plain text: a text a line, or two files whose lines belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError, ErrorList
from data.formats.rows import clean_lines, locate
from data.row import Row


def read_lines(name: str, column: str, errors: ErrorList) -> list[Row]:
    """Return a row for each line that is not empty; ids are the numbers of the rows.

    Bad lines are added to `errors`. DataError for a file that cannot be read or has no lines.
    """
    rows: list[Row] = []
    try:
        for line, content in clean_lines(locate(name), errors):
            if content.strip():
                rows.append(Row(str(len(rows) + 1), line, {column: content}))
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not rows and not errors:
        raise DataError(f"{name}: no lines of text")
    return rows


def read_parallel(name: str, suffixes: Sequence[str]) -> list[Row]:
    """Return a row for each line number of the files NAME.suffix; the suffixes are the columns, ids the line numbers.

    DataError for a file that cannot be read, for bad lines, and where the files have different numbers of lines.
    """
    errors = ErrorList()
    texts: dict[str, list[str]] = {}
    for suffix in suffixes:
        path = Path(f"{locate(name)}.{suffix}")
        try:
            texts[suffix] = [text for _, text in clean_lines(path, errors)]
        except FileNotFoundError:
            files = " and ".join(f"{name}.{suffix}" for suffix in suffixes)
            raise DataError(f"{path}: no such file; data.format = 'parallel' reads {files}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    errors.raise_if_any()  # before the lines are counted, since a bad line is not among them
    counts = {f"{name}.{suffix}": len(lines) for suffix, lines in texts.items()}
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise DataError(f"{found} lines: line n of one belongs to line n of the other, so they must be equal")
    rows = [
        Row(str(i), i, dict(zip(suffixes, lines, strict=True)))
        for i, lines in enumerate(zip(*texts.values(), strict=True), start=1)
    ]
    if not rows:
        raise DataError(f"{name}.{suffixes[0]}: no lines")
    return rows
