"""Tables as text, .csv and .tsv -> records: delimiters, quotes, the header, and what programs leave in such files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import DataError, ErrorList
from data.formats.columns import describe_missing
from data.formats.json_files import Gaps, Records
from data.formats.lines import MAX_LINE, TextFile
from data.formats.options import FileOptions

DELIMITERS = {"csv": ",", "tsv": "\t"}
FASTTEXT = "they are a .tsv with a tab after each label, and the line label<tab>text above them"
_SENTENCE = re.compile(r"[.!?。！？]$|.{60}")
_NUMBER = re.compile(r"[-+]?[0-9]+([.,][0-9]+)?")
GUESSED = (";", "\t", ",", "|")  # tried where the header lacks the required columns

# (line, fields) of each record; [] for an empty line, None where an error has been added.
Fields = Iterator[tuple[int, list[str] | None]]
Lines = Iterator[tuple[int, str | None]]


def read_csv(path: Path, errors: ErrorList, required: Sequence[str], options: FileOptions) -> Records:
    """Yield the records of a table with commas, in which quotes enclose fields (RFC 4180)."""
    return _read_table(path, errors, required, options, "csv")


def read_tsv(path: Path, errors: ErrorList, required: Sequence[str], options: FileOptions) -> Records:
    """Yield the records of a table with tabs, in which a quote is a character: a tab cannot stand inside a field."""
    return _read_table(path, errors, required, options, "tsv")


@dataclass
class _Layout:
    """How the fields of a table are separated, and what was seen of it."""

    path: Path
    delimiter: str
    quotes: str  # data.quotes
    is_quoted: bool
    skip_spaces: bool = False  # behind a delimiter
    first: str = ""  # the first line, which is the header
    quoted_lines: list[int] = field(default_factory=list)  # of fields that begin and end with a quote
    num_fields: int = 0


def find_delimiter(options: FileOptions, format: str) -> str:
    """Return the delimiter of a table; DataError where data.delimiter is not one character."""
    given = {"\\t": "\t", "tab": "\t"}.get(options.delimiter, options.delimiter)
    if given and (len(given) != 1 or given in '"\r\n\0 '):
        raise DataError(
            f"data.delimiter = {options.delimiter!r} should be one character between fields, such as ';' or '\\t'"
        )
    return given or DELIMITERS[format]


def _read_table(path: Path, errors: ErrorList, required: Sequence[str], options: FileOptions, format: str) -> Records:
    """Yield the records below the header. Nothing is read below a header that cannot be used.

    Numbers count all records below the header, bad ones and empty lines too, so that none of them shifts an id.
    """
    is_quoted = options.quotes in ("yes", "backslash") or (options.quotes == "auto" and format == "csv")
    layout = _Layout(path, find_delimiter(options, format), options.quotes, is_quoted)
    lines = _open_table(layout, TextFile(path, options), errors, options)
    records = _split_quoted(layout, lines, errors) if is_quoted else _split_plain(layout, lines, errors)
    line, header = next(((line, fields) for line, fields in records if fields != []), (0, None))
    if header is None:
        errors.has_bad_file |= bool(errors)
        return
    names = _find_names(layout, line, header, required, options)
    layout.quoted_lines.clear()
    yield from _iterate_rows(layout, names, records, errors)
    if layout.quoted_lines:
        count = (
            f"{len(layout.quoted_lines):,} of {layout.num_fields:,} fields (the first in line {layout.quoted_lines[0]})"
        )
        what = 'begin and end with a quote; data.quotes = "yes" reads them as csv does, "no" as they are'
        errors.notes.append(f"{count} {what}")


def _iterate_rows(layout: _Layout, names: list[str], records: Fields, errors: ErrorList) -> Records:
    width, has_unnamed = len(names), "" in names
    empty, number, good = Gaps(), 0, 0
    wrong: list[tuple[int, int]] = []  # (line, number of fields)
    longer: list[int] = []  # lines with one more field, which is empty
    hint = _hint_at_width(layout, width)
    for line, fields in records:
        number += 1
        if fields is not None and not fields:
            empty.open.append(line)
            continue
        if empty.open:
            if width == 1:  # an empty line between others is an empty text
                yield from ((number - len(empty.open) + i, at, {names[0]: ""}) for i, at in enumerate(empty.open))
                empty.open.clear()
            empty.close()
        if fields is not None and len(fields) != width:
            if len(fields) == width + 1 and not fields[-1]:
                longer.append(line)
            else:
                wrong.append((line, len(fields)))
                errors.add(layout.path, line, f"{len(fields)} fields, the header has {width}{hint}")
                fields = None
        if fields is None:
            yield number, line, None
            continue
        good += 1
        values = dict(zip(names, fields, strict=False))  # not strict because of `longer`
        if has_unnamed:
            del values[""]
        yield number, line, values
    if has_unnamed:
        errors.notes.append("columns without a name, as pandas writes them for row numbers, are not read")
    layout.num_fields = good * width
    errors.notes += empty.describe()
    _add_wrong_widths(layout, width, wrong, longer, good, errors)


def _hint_at_width(layout: _Layout, width: int) -> str:
    if width > 1:
        return "; a field with the delimiter in it stands in quotes" if layout.is_quoted else ""
    other = _escape_delimiter(_other_delimiter(layout.delimiter))
    return f'; data.delimiter = "{other}" reads each line as one field'


def _add_wrong_widths(
    layout: _Layout, width: int, wrong: list[tuple[int, int]], longer: list[int], good: int, errors: ErrorList
) -> None:
    """Add the errors of records with an empty field too many; one for the file where all rows have the same fault.

    wrong: (line, number of fields) of records whose errors have been added.
    """
    if longer and len(longer) == good and not wrong:
        errors.notes.append("every row ends with a delimiter, which adds no column")
        longer = []
    hint = _hint_at_width(layout, width)
    all_wrong = [*wrong, *((line, width + 1) for line in longer)]
    if len(all_wrong) > 1 and good == len(longer) and len({count for _, count in all_wrong}) == 1:
        errors.remove({line for line, _ in wrong})
        reason = f"all {len(all_wrong):,} rows have {all_wrong[0][1]} fields, the header has {width}{hint}"
        errors.add(layout.path, all_wrong[0][0], reason, of_file=True)
        return
    for line in longer:
        errors.add(layout.path, line, f"{width + 1} fields, the header has {width}{hint}")


def _other_delimiter(delimiter: str) -> str:
    return "," if delimiter == "\t" else "\t"


def _escape_delimiter(delimiter: str) -> str:
    return "\\t" if delimiter == "\t" else delimiter


# The header


def _open_table(layout: _Layout, file: TextFile, errors: ErrorList, options: FileOptions) -> Lines:
    """Yield the lines from the header on, with the delimiter of a first line `sep=;`, which Excel writes, in `layout`.

    The first line is looked at before the others are split.
    """
    lines = file.lines(errors)
    for number, text in lines:
        if text == "":
            continue
        match = re.fullmatch(r'"?sep=(.)"?', text or "")
        if match and not layout.first:
            layout.delimiter = layout.delimiter if options.delimiter else match[1]
            errors.notes.append(f"the line {text!r} sets the delimiter, and is not a row")
            continue
        layout.first = layout.first or text or ""
        rest = layout.first.split(layout.delimiter)[1:]
        layout.skip_spaces = bool(rest) and all(name.startswith(" ") for name in rest)
        yield number, text
        if layout.first:
            break
    yield from lines


def _find_names(
    layout: _Layout, line: int, header: list[str], required: Sequence[str], options: FileOptions
) -> list[str]:
    """Return the names of the columns, "" for one that has none; DataError for a header that cannot be used."""
    names = header if set(required) <= set(header) else [name.strip() for name in header]
    missing = [column for column in dict.fromkeys(required) if column not in names]
    twice = [name for name in names if name and names.count(name) > 1]
    if missing:
        known = [name for name in names if name]
        hint = _find_hint(layout, header, required) or _hint_at_header(known, missing, options)
        reasons = [
            describe_missing(column, known, required, options, hint) for column in missing[: 1 if hint else None]
        ]
        raise DataError("\n".join(f"{layout.path}:{line}: {reason}" for reason in reasons))
    if twice:
        raise DataError(f"{layout.path}:{line}: the header names {twice[0]!r} twice")
    return names


def _find_hint(layout: _Layout, header: list[str], required: Sequence[str]) -> str:
    """Return the setting that would read the header as the columns that are needed, or as several; "" for none."""
    for other in GUESSED:
        names = [name.strip().strip('"') for name in layout.first.split(other)]
        fits = set(required) <= set(names) and other != layout.delimiter
        if fits or (len(header) == 1 and len(names) > 1 and other != layout.delimiter):
            return f'data.delimiter = "{_escape_delimiter(other)}" reads {", ".join(map(repr, names))}'
    if not layout.is_quoted and set(required) <= {name.strip().strip('"') for name in header}:
        return 'data.quotes = "yes" reads the quotes as csv does'
    return ""


def _hint_at_header(known: Sequence[str], missing: Sequence[str], options: FileOptions) -> str:
    """Return that the first line may not be the header: a field is a number or a sentence, or there are too few."""
    if any(name.startswith("__label__") for name in known):
        return f"the lines begin with labels as fastText writes them; {FASTTEXT}"
    is_row = any(_NUMBER.fullmatch(name) or _SENTENCE.search(name) for name in known)
    if (options.hint and not is_row) or (not is_row and len(known) >= len(missing)):
        return ""
    return "the first line should have the names of the columns; if it does not, write them in a line above it"


# Lines -> fields


def _split_plain(layout: _Layout, lines: Lines, errors: ErrorList) -> Fields:
    """Yield the fields of each line; quotes are characters, but those around whole fields are counted."""
    counts = layout.quotes == "auto"
    for number, text in lines:
        if not text:
            yield number, None if text is None else []
            continue
        fields = text.split(layout.delimiter)
        if counts and '"' in text:
            for value in fields:
                if len(value) > 1 and value[0] == '"' == value[-1]:
                    layout.quoted_lines.append(number)
            if reason := _describe_open_quote(layout, fields):
                hint = 'data.quotes = "yes" reads it as csv does, and "no" says that quotes are characters'
                errors.add(layout.path, number, f"{len(fields)} fields, {reason}: {hint}", of_file=True)
                yield number, None
                continue
        yield number, fields


def _describe_open_quote(layout: _Layout, fields: list[str]) -> str:
    """Return what shows a quoted line end, or a quoted delimiter, in a line of too few or too many fields; or ""."""
    width = len(layout.first.split(layout.delimiter))
    if len(fields) == width:
        return ""
    is_open = [field.startswith('"') and field.count('"') % 2 == 1 for field in fields]
    if len(fields) < width and is_open[-1]:
        return "the last with a quote that is not closed"
    closed = [i for i, field in enumerate(fields) if field.endswith('"') and field.count('"') % 2 == 1]
    if len(fields) > width and closed and any(is_open[: closed[-1]]):
        return "one with a quote that a later one closes"
    return ""


def _split_quoted(layout: _Layout, lines: Lines, errors: ErrorList) -> Fields:
    """Yield the fields of each record; a record has several lines where a quoted field holds a line end."""
    first_line, last_line, is_escaped, broken = 0, 0, False, list[int]()

    def texts() -> Iterator[str]:
        nonlocal first_line, last_line, is_escaped
        for number, text in lines:
            if text is None:
                broken.append(number)
                if not first_line:
                    continue
            last_line = number
            is_escaped = '\\"' in (text or "")
            first_line = first_line or number
            yield (text or "") + "\n"

    source = texts()
    try:
        head = next(source)  # sets the layout, too
    except StopIteration:
        yield from ((number, None) for number in broken)
        return
    first_line = 0

    def from_the_first() -> Iterator[str]:
        nonlocal first_line
        first_line = last_line
        yield head
        yield from source

    reader = csv.reader(
        from_the_first(),
        delimiter=layout.delimiter,
        strict=True,
        skipinitialspace=layout.skip_spaces,
        escapechar="\\" if layout.quotes == "backslash" else None,
    )
    csv.field_size_limit(MAX_LINE)
    while True:
        first_line = 0
        try:
            fields: list[str] | None = next(reader)
        except StopIteration:
            yield from ((number, None) for number in broken)
            return
        except csv.Error as error:
            fields = None
            reason = str(error).partition(" - ")[0]
            hint = "a field with a comma, quote or line end stands in quotes, a quote inside it is doubled"
            more = '; data.quotes = "no" reads quotes as characters'
            if is_escaped and layout.quotes != "backslash":
                more = '; data.quotes = "backslash" reads \\" as a quote inside a field'
            errors.add(layout.path, first_line, f"not csv: {reason}; {hint}{more}", of_file=last_line > first_line)
        if broken:
            yield from ((number, None) for number in broken if number < first_line)
            if broken[-1] > first_line:
                errors.reasons.setdefault(first_line, "a line of it cannot be read")
                fields = None
            broken.clear()
        yield first_line, fields
