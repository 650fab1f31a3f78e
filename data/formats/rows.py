"""Files of rows, whatever their format -> rows with the columns that a task needs, and with ids.

Every bad row is reported as `file:line: reason`, all of them before training starts. What is wrong with the whole file,
such as a column that no row has, is one error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import MEMORY, DataError, ErrorList
from data.formats.annotations import flatten_label_studio, is_label_studio
from data.formats.columns import describe_missing, find_null, list_nested, name_all, resolve
from data.formats.json_files import Records, read_json
from data.formats.lines import NOT_READ, locate, read_first_line, suffix_of
from data.formats.memory import is_in_memory, read_memory
from data.formats.options import FileOptions
from data.formats.parquet import is_table_folder, read_parquet
from data.formats.tables import FASTTEXT, read_csv, read_tsv
from data.row import Row, Rows
from data.windows import Source, open_source

Reader = Callable[[Path, ErrorList, Sequence[str], FileOptions], Records]
READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".json": read_json,
    ".ndjson": read_json,
    ".arrow": read_parquet,
    ".feather": read_parquet,
}
PANDAS_INDEX = "__index_level_0__"  # a column that pandas adds to parquet files
KEPT = "<kept>"  # an internal column: FileOptions.kept, as the file has them; no file has this column


def read_rows(
    name: str,
    required: Sequence[str],
    options: FileOptions = FileOptions(),
    errors: ErrorList | None = None,
) -> Rows:
    """Return the rows of a file, a folder of tables, or rows in memory; all have the `required` columns.

    - options.format: jsonl, csv, tsv or parquet; auto: by the ending of the name, of which .gz, .bz2 and .xz are no
      part. Rows in memory have no format. json is read by its content (json_files.py), folders by parquet.py.
    - A column may be dotted, `translation.en`, for a member of an object. A column of that very name comes first.
    - Ids come from options.id_column where the file has it. They must be unique, since predictions are matched by id.
      Without the column, ids are numbers from 1, of the lines in .jsonl and else of the records. Bad records and empty
      lines count, so that they shift no id.
    - Values keep their JSON type; in csv and tsv they are strings.

    Columns of the file that are neither required nor in options.settings are noted as not read.
    errors: bad lines are added to it, for a caller with further checks, who settles them. Without it, raises one
    DataError with all, or leaves them out, as options.bad_rows says.
    Raises DataError at once for a file that cannot be read at all, and for a column that no row has.
    """
    path, collected = locate(name), errors is not None
    errors = ErrorList() if errors is None else errors
    source = open_source(name)
    rows: list[Row] = []
    lacking: list[Row] = []  # a required column
    columns = source.columns  # of all rows
    repeated: list[int] = []  # lines that repeat the header
    wanted = dict.fromkeys([*required, options.id_column, *options.settings])
    dotted = [column for column in wanted if "." in column]
    width, value, column = 0, None, ""
    try:
        for row in source.take(lambda errors: _read_records(name, required, errors, options), errors):
            values = row.values
            if len(values) != width:  # rows with as many columns nearly always have the same ones
                width = len(values)
                columns.update(dict.fromkeys(values))
            if dotted:
                _add_dotted(values, dotted)
            for column in required:
                value = values.get(column)
                if value is None:
                    lacking.append(row)
                    columns.update(dict.fromkeys(values))
                    break
            else:
                if isinstance(value, str) and len(value) == len(column) and _is_header(values):
                    repeated.append(row.line)
                else:
                    rows.append(row)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if not source.num_rows:
        _check_absent(path, rows, lacking, required, list(columns), options)
    if options.id_column not in ("", "id", *columns) and (rows or lacking):
        errors.notes.append(f"no column {options.id_column!r} (data.id_column): the ids are numbers from 1")
    _assign_ids(path, rows, lacking, options.id_column, errors, source)
    is_only = len(lacking) == 1 and not rows and not source.num_rows
    _add_lacking(path, lacking, required, options, errors, is_only)
    source.num_rows += len(rows)
    if not source.num_rows and not errors:
        raise DataError(f"{name}: no rows")
    _note_repeated_header(repeated, errors)
    for row in rows if options.kept else ():
        row.values[KEPT] = {column: row.values[column] for column in options.kept if column in row.values}
    if not is_in_memory(name):
        _note_unread_columns(columns, wanted, errors)
    if collected:
        return Rows(rows)
    return errors.settle(rows, options)


def _note_repeated_header(lines: Sequence[int], errors: ErrorList) -> None:
    """Add a note on the rows that repeat the header and are left out, if there are any."""
    if lines:
        more = "another row repeat" if len(lines) == 2 else f"{len(lines) - 1:,} more rows repeat"
        what = f"this and {more}" if len(lines) > 1 else "this row repeats"
        place = f"{errors.unit or 'line'} {lines[0]}"
        errors.notes.append(f"{place}: {what} the names of the columns, as in joined files: left out")


def _note_unread_columns(columns: Iterable[str], wanted: Iterable[str], errors: ErrorList) -> None:
    """Add a note with the columns of a file that are not `wanted`, if there are any; a dotted name reads its object."""
    read = {part for column in wanted for part in (column, column.partition(".")[0])} | {PANDAS_INDEX}
    if unread := [column for column in columns if column not in read]:
        errors.notes.append(f"columns that are not read: {name_all(unread)}")


def _read_records(name: str, required: Sequence[str], errors: ErrorList, options: FileOptions) -> Iterator[Row]:
    return read_memory(name, errors) if is_in_memory(name) else _read_file(name, required, errors, options)


def _read_file(name: str, required: Sequence[str], errors: ErrorList, options: FileOptions) -> Iterator[Row]:
    path, format = locate(name), options.format
    suffix = suffix_of(path)
    reader = READERS.get(suffix if format == "auto" else f".{format}")
    if is_table_folder(path):
        reader = read_parquet
    elif path.is_dir():
        raise DataError(f"{name}: this is a folder; name a file, with one of the endings {', '.join(READERS)}")
    if reader is None and format != "auto":
        raise DataError(f"{name}: data.format = {format!r} is not a format of rows; use one of {', '.join(READERS)}")
    if reader is None and suffix in NOT_READ:
        raise DataError(f"{name}: this is {NOT_READ[suffix]}")
    if reader is None and path.exists():
        hint = _guess_format(path, options)
        raise DataError(f"{name}: unknown kind of file {suffix!r}; use one of {', '.join(READERS)}{hint}")
    if reader is None:
        raise DataError(f"{name}: no such file")
    unused = ["delimiter", "quotes"] if reader not in (read_csv, read_tsv) else []
    errors.notes += options.name_unused([*unused, *(["encoding"] if reader is read_parquet else [])])
    for number, line, values in reader(path, errors, required, options):
        if values is None:
            errors.broken[line] = str(number)
            continue
        try:
            yield Row(str(number), line, flatten_label_studio(values, required) if is_label_studio(values) else values)
        except DataError as error:  # of a task of Label Studio
            errors.add(path, line, str(error))
            errors.broken[line] = str(number)


def _guess_format(path: Path, options: FileOptions) -> str:
    """Return the data.format that a file of another name seems to have, by its first line, as the end of a message."""
    first = read_first_line(path, options).lstrip()
    if first.startswith("__label__"):
        return f"; its lines begin with labels as fastText writes them; {FASTTEXT}"
    signs = {"jsonl": "{[", "tsv": "\t", "csv": ",;|"}
    for format, characters in signs.items():
        if any(character in (first[:1] if format == "jsonl" else first) for character in characters):
            return f'; its first line looks like {format}: data.format = "{format}" reads it'
    return ""


def _is_header(values: dict[str, Any]) -> bool:
    """Return whether a row repeats the names of its columns, in any case. A single column could have it as a text."""
    return len(values) > 1 and all(
        isinstance(value, str) and value.strip().casefold() == column.casefold() for column, value in values.items()
    )


def _add_dotted(values: dict[str, Any], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in values and (value := resolve(values, column)) is not None:
            values[column] = value


def _check_absent(
    path: Path, rows: list[Row], lacking: list[Row], required: Sequence[str], columns: list[str], options: FileOptions
) -> None:
    """Raise one DataError for the columns that no row has, or in which every row has null."""
    if rows or not lacking:
        return
    where = str(path).removeprefix(MEMORY)
    absent = [column for column in dict.fromkeys(required) if all(row.values.get(column) is None for row in lacking)]
    known = list_nested(columns, (row.values for row in lacking[:100]))
    reasons = [
        f"{where}: column {column!r} is null in every row"
        if column in columns
        else f"{where}: {describe_missing(column, known, required, options)}"
        for column in absent
    ]
    if absent and len(lacking) > 1:
        raise DataError("\n".join(reasons))


def _add_lacking(
    path: Path, lacking: list[Row], required: Sequence[str], options: FileOptions, errors: ErrorList, is_only: bool
) -> None:
    """Add an error for each row that lacks a required column, which other rows have. A text that is null is empty.

    is_only: the row is the only one of its file, so its column may have another name.
    """
    for row in lacking:
        errors.broken[row.line] = row.id
        column = next(column for column in required if row.values.get(column) is None)
        if null := find_null(row.values, column):
            is_text = options.settings.get(column, "").startswith("data.text")
            errors.add(path, row.line, f"column {null!r} is null", is_empty=is_text)
        elif is_only:
            known = list_nested(row.values, [row.values])
            errors.add(path, row.line, describe_missing(column, known, required, options))
        else:
            found = ", ".join(map(repr, dict.fromkeys(list_nested(row.values, [row.values])))) or "no columns"
            errors.add(path, row.line, f"no column {column!r}; this row has {found}")


def _assign_ids(
    path: Path, rows: list[Row], lacking: list[Row], column: str, errors: ErrorList, source: Source
) -> None:
    """Take the ids from `column` if any row has it; then every row must have one. No two rows may have the same id.

    source: of the rows, of which others may have been read before.
    """
    has_column = source.has_ids or any(column in row.values for row in rows)
    if has_column and source.line_without_id:
        reason = f'no id in {column!r}, which later rows have; data.id_column = "" takes row numbers'
        errors.add(path, source.line_without_id, reason, of_file=True)
    source.has_ids, source.line_without_id = has_column, 0 if has_column or not rows else rows[0].line
    lines = dict(source.repeated)
    for row in rows:
        if has_column:
            value = row.values.get(column)
            if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
                found = f"not {value!r}" if column in row.values else "this row has none"
                reason = f"an id in {column!r} should be text or a number, {found}"
                errors.add(path, row.line, f'{reason}; data.id_column = "" takes row numbers')
                continue
            row.id = str(value)
        elif not row.id:  # of a row in memory, whose line is its number
            row.id = str(row.line)
        if lines.get(row.id, row.line) != row.line:
            hint = 'data.id_column names another column; data.id_column = "" takes row numbers'
            place = errors.unit or "line"
            errors.add(path, row.line, f"the id {row.id!r} is that of {place} {lines[row.id]} too; {hint}")
        else:
            lines[row.id] = row.line
    for row in lacking:
        value = row.values.get(column)
        row.id = str(value) if isinstance(value, str | int | float) and value != "" else row.id or str(row.line)
