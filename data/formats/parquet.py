"""Tables of Apache Arrow -> records: .parquet, .arrow, folders of shards, and folders that `datasets` saved.

They are read with pyarrow, an optional package. A row's number from 1 takes the place of its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.columns import describe_missing
from data.formats.features import LabelNames, read_label_names
from data.formats.json_files import Records
from data.formats.lines import MAX_PACKING, MAX_WHOLE
from data.formats.options import FileOptions
from data.formats.values import to_json_value, unreadable_reason

BATCH_ROWS = 1_000  # read at a time
SUFFIXES = (".parquet", ".arrow", ".feather")
METADATA = b"huggingface"  # the key of the schema's metadata under which Hugging Face's library describes columns
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.\w+")


def read_parquet(path: Path, errors: ErrorList, required: Sequence[str], options: FileOptions) -> Records:
    """Yield the records of a .parquet or .arrow file, or of a folder that is_table_folder knows.

    - Values keep their type: text, whole numbers, floats, lists. NaN is null, since pandas writes missing numbers so.
      Other types become those of JSON (to_json_value); categories become their values.
    - Numbers of classes become names where the file has them in its metadata, as Hugging Face's library writes it.
    - A row that cannot be in a text file (bad UTF-8, a NUL) is added to `errors`.

    DataError for a file that cannot be read.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: {path.suffix.lstrip('.') or 'arrow'} files need the package pyarrow: pip install pyarrow; "
            "or save the table as .jsonl"
        ) from None
    number = 0
    labels: LabelNames | None = None
    features = _saved_features(path)
    for file in find_files(path):
        try:
            with closing(_read_batches(file)) as batches:
                schema = next(batches)
                odd = _check_columns(path, schema, required, options)
                if labels is None:
                    labels = read_label_names(features or _described_features(schema))
                    errors.notes += labels.describe(required)
                for batch in batches:
                    for values in _iterate_rows(batch):
                        number += 1
                        yield number, number, _clean(path, number, values, odd, labels, tuple(required), errors)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, SystemError) as error:
            if isinstance(error, FileNotFoundError | DataError):
                raise
            reason = " ".join(str(error).split()).removesuffix(".")
            kind = "parquet" if file.suffix == ".parquet" else "table"
            raise DataError(f"{file}: not a {kind} file that can be read: {reason}") from None


def _clean(
    path: Path,
    number: int,
    values: dict[str, Any] | UnicodeDecodeError,
    odd: frozenset[str],
    labels: LabelNames,
    required: tuple[str, ...],
    errors: ErrorList,
) -> dict[str, Any] | None:
    """Return a row with values of JSON and names of classes; None where an error was added."""
    if isinstance(values, UnicodeDecodeError):
        byte = values.object[values.start]
        errors.add(path, number, f"not UTF-8 at byte {values.start} of a text ({byte:#04x})")
        return None
    for column in odd:
        values[column] = to_json_value(values[column])
    reason = labels.replace_numbers(values) or unreadable_reason(values, required)
    if reason:
        errors.add(path, number, reason)
        return None
    return {name: None if value != value else value for name, value in values.items()}


# Files and folders


def is_table_folder(path: Path) -> bool:
    """Return whether a folder is a data set that was saved to disk, or has shards of a table."""
    return path.is_dir() and ((path / "state.json").is_file() or _is_dictionary(path) or bool(_list_shards(path)))


def _is_dictionary(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _list_shards(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith((".", "_")))


def find_files(path: Path) -> list[Path]:
    """Return the files of a table: itself, or those of a folder in their order. DataError for several tables."""
    if not path.is_dir():
        return [path]
    if _is_dictionary(path):
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        known = ", ".join(str(path / split) for split in splits) or "none"
        raise DataError(f"{path}: a folder of several data sets; name one of them: {known}")
    if (path / "state.json").is_file():
        state = _read_description(path / "state.json")
        try:
            return [path / entry["filename"] for entry in state["_data_files"]]
        except (KeyError, TypeError):
            raise DataError(f"{path / 'state.json'}: names no data files") from None
    files = _list_shards(path)
    if len({file.suffix for file in files}) > 1:
        raise DataError(f"{path}: a folder of tables in several formats; name one of its files")
    shards = [match.groups() for file in files if (match := _SHARD.fullmatch(file.name))]
    names = sorted({name for name, _, _ in shards})
    if shards and (len(shards) < len(files) or len(names) > 1):
        raise DataError(
            f"{path}: a folder of several tables ({', '.join(map(repr, names))}); put the files of one in a folder"
        )
    if shards and len(files) != int(shards[0][2]):
        raise DataError(f"{path}: has {len(files)} of the {int(shards[0][2])} files of {names[0]!r}")
    return files


def _saved_features(path: Path) -> dict[str, Any]:
    """Return the features in the dataset_info.json of a folder; {} without one."""
    file = path / "dataset_info.json"
    found = _read_description(file).get("features") if path.is_dir() and file.is_file() else None
    return found if isinstance(found, dict) else {}


def _read_description(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _described_features(schema: Any) -> dict[str, Any]:
    """Return the features in the metadata of a schema; {} where there are none."""
    try:
        found = json.loads((schema.metadata or {}).get(METADATA, b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# Arrow


def _read_batches(path: Path) -> Generator[Any, None, None]:
    """Yield the schema, and then the batches of a file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        head = stream.read(8)
        stream.seek(0)
        if path.suffix in (".arrow", ".feather") and not head.startswith(b"PAR1"):
            if head.startswith(b"ARROW1"):
                reader = pyarrow.ipc.open_file(stream)
                yield reader.schema
                yield from map(_validated, map(reader.get_batch, range(reader.num_record_batches)))
            else:
                reader = pyarrow.ipc.open_stream(stream)
                yield reader.schema
                yield from map(_validated, reader)
        else:
            file = ParquetFile(stream, page_checksum_verification=True)
            _check_size(path, file.metadata)
            yield file.schema_arrow
            yield from file.iter_batches(batch_size=BATCH_ROWS)


def _validated(batch: Any) -> Any:
    """Return a batch of an .arrow file; ArrowInvalid if its parts point outside of it, which would end the process."""
    batch.validate(full=True)
    return batch


def _check_size(path: Path, metadata: Any) -> None:
    """Raise DataError for a file that unpacks to far more than tables do; a constant column packs without limit."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    unpacked = max(sum(group.total_byte_size for group in groups), 8 * metadata.num_rows)
    if unpacked > max(MAX_WHOLE, MAX_PACKING * path.stat().st_size):
        raise DataError(f"{path}: unpacks to {unpacked:,} bytes, over {MAX_PACKING} times its size; save it as .jsonl")


def _check_columns(path: Path, schema: Any, required: Sequence[str], options: FileOptions) -> frozenset[str]:
    """Return the columns whose values are not all those of JSON; DataError where a required one is missing."""
    columns = schema.names
    for column in required:
        if column not in columns and column.partition(".")[0] not in columns:
            raise DataError(f"{path}: {describe_missing(column, _list_members(schema), required, options)}")
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}")
    return frozenset(field.name for field in schema if not _is_plain(field.type))


def _list_members(schema: Any) -> list[str]:
    """Return the names of the columns, and dotted names of members in the place of those that hold objects."""
    import pyarrow.types as types

    names = []
    for field in schema:
        is_object = types.is_struct(field.type)
        names += [f"{field.name}.{member.name}" for member in field.type] if is_object else [field.name]
    return names


def _is_plain(kind: Any) -> bool:
    """Return whether values of an Arrow type are text, numbers, or lists or objects of them."""
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_float64(kind) or types.is_float32(kind)
    return bool(is_text or is_number or types.is_boolean(kind) or types.is_null(kind))


def _iterate_rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield each row of a pyarrow batch, or the error of a text that is not UTF-8, which parquet does not check."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(len(batch)):
        try:
            yield from batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield error
