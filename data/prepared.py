"""A folder of prepared data: encoded texts in shards, the rows that are held out, and last the manifest.

    manifest.json                what it was made from, and the shards with their sizes and checksums
    shard-00000.safetensors ...  the training examples (data/mapped.py); blocks-00000.safetensors ... of blocks of text
    validation.jsonl             the rows that are held out for validation, as they were read and checked
    sample.jsonl                 the training rows that eval.train_subset_size evaluates

Rows are needed beside their tokens, since metrics compare texts, words and answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from data.errors import DataError
from data.examples import TextExamples
from data.formats.answers import Answer
from data.formats.conversations import Turn
from data.formats.lines import locate
from data.formats.tar_index import TarMember
from data.mapped import Facts, MappedExamples, Part, Shard
from data.relation_extraction import Entity
from data.row import Row, Rows
from data.writing import replace_file, sha256_of, write_text

VERSION = 1  # of the format of the folder
MANIFEST, VALIDATION, SAMPLE = "manifest.json", "validation.jsonl", "sample.jsonl"
PLAN = "plan.json"  # what a folder is made from, as long as it is not finished
KIND = "__kind__"
KINDS = {kind.__name__: kind for kind in (Answer, Turn, Entity, tuple, TarMember, Path)}
AGAIN = "`python -m data.prepare` with the same recipe and folder makes it again"


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest, and how many elements it has of each unit of data.mapped.UNITS."""

    files: dict[str, int]  # {name: bytes}; a second one has the arrays of its blocks
    sha256: dict[str, str]  # of each file
    sizes: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """The origin of a folder, and its contents."""

    task: str
    settings: dict[str, Any]  # by which the examples were read and encoded
    seed: int
    tokenizer: str  # its checksum
    labels: list[str]
    source: dict[str, Any]  # the file: name, bytes
    code: str  # the checksum of the code that encoded them
    shards: list[ShardEntry]
    arrays: dict[str, tuple[str, list[int]]]  # as in MappedExamples
    num_rows: int  # that are trained on
    subset_size: int  # eval.train_subset_size
    notes: list[str]  # about the file
    encoding_notes: list[str]
    truncated: int
    label_counts: list[int] | None
    length_counts: list[int]
    largest: dict[str, int]
    longest_sequence: int
    num_empty: int
    first_empty: str
    are_blocks: bool = False
    fingerprint: str = ""  # of the examples, that of the file
    decoder_start_id: int = 0
    version: int = VERSION


class PreparedRows(Rows):
    """The training rows of a prepared folder: none of them in memory, but a sample to evaluate.

    An encoder opens the examples of the folder in their place.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        super().__init__(notes=manifest.notes)
        self.folder, self.manifest = folder, manifest
        self.sample = read_rows_file(folder / SAMPLE)

    def choose(self, count: int, seed: int) -> list[Row]:
        """Return the rows of eval.train_subset_size = `count`; DataError where the folder has others."""
        known = self.manifest
        if count and count != known.subset_size:
            raise DataError(
                f"eval.train_subset_size = {count}, but {self.folder} was prepared with {known.subset_size}, and "
                f"has no other rows: set {known.subset_size}, 0, or prepare another folder"
            )
        if count and seed != known.seed:
            raise DataError(f"run.seed = {seed}, but {self.folder} was prepared with {known.seed}")
        return self.sample[:count]

    def open(self, tokenizer: Tokenizer | None, decoder_start_id: int, labels: Sequence[str]) -> MappedExamples:
        """Return the examples, their classes in the order of `labels`; DataError where they do not fit the model."""
        known = self.manifest
        if tokenizer is None or checksum_of(tokenizer) != known.tokenizer:
            raise DataError(
                f"{self.folder} was prepared with another tokenizer than that of model.name: prepare another folder, "
                "or name the model whose tokenizer it was"
            )
        if decoder_start_id != known.decoder_start_id:
            raise DataError(
                f"the decoder's start token has the id {decoder_start_id}, but {self.folder} was prepared with "
                f"{known.decoder_start_id}"
            )
        facts, remap = self.describe(labels)
        return open_shards(self.folder, known, facts, remap)

    def describe(self, labels: Sequence[str]) -> tuple[Facts, np.ndarray | None]:
        """Return what is known of all examples, and the number in `labels` of each class of the folder.

        None: the classes have the same order. Raises DataError for other classes.
        """
        known = self.manifest
        if sorted(labels) != sorted(known.labels):
            raise DataError(f"the labels of the model are {list(labels)!r}, those of {self.folder} {known.labels!r}")
        remap = np.array([list(labels).index(name) for name in known.labels], dtype=np.int64)
        counts = None if known.label_counts is None else np.array(known.label_counts)[np.argsort(remap)]
        is_same_order = list(labels) == known.labels
        of_order = hashlib.sha256(json.dumps([known.fingerprint, list(labels)]).encode()).hexdigest()[:16]
        facts = Facts(
            fingerprint=known.fingerprint if is_same_order else of_order,
            notes=tuple(known.encoding_notes),
            truncated=known.truncated,
            label_counts=counts,
            length_counts=np.array(known.length_counts, dtype=np.int64),
            largest=known.largest,
            longest_sequence=known.longest_sequence,
            num_empty=known.num_empty,
            first_empty=known.first_empty,
        )
        return facts, None if is_same_order else remap


def open_shards(folder: Path, known: Manifest, facts: Facts, remap: np.ndarray | None) -> MappedExamples:
    """Return the examples of a folder. remap: as in MappedExamples."""
    return MappedExamples(
        open_parts(folder, known),
        known.arrays,
        facts,
        are_blocks=known.are_blocks,
        decoder_start_id=known.decoder_start_id,
        remap=remap,
    )


def open_parts(folder: Path, known: Manifest) -> list[Part]:
    """Return the shards of a folder; they are mapped when they are read first."""
    return [Part(Shard([folder / name for name in entry.files]), entry.sizes) for entry in known.shards]


def is_prepared(name: str) -> bool:
    """Return whether `name` is a folder of prepared data."""
    return (locate(name) / MANIFEST).is_file() if name and ":" not in name else False


def check_no_folder(name: str) -> None:
    """Raise DataError where `name`, which should be a file of rows, is a prepared folder, or an unfinished one."""
    if is_prepared(name):
        raise DataError(f"{name}: this is a prepared folder, which only data.train may be; name the file")
    if name and ":" not in name and (locate(name) / PLAN).is_file():
        raise DataError(
            f"{name}: this is a prepared folder that is not finished: give the same `python -m data.prepare` again"
        )


def read_source_name(name: str) -> str:
    """Return the file that a prepared folder was made from; "" for anything else."""
    return str(read_manifest(locate(name), check_shards=False).source["name"]) if is_prepared(name) else ""


def read_manifest(folder: Path, check_shards: bool = True) -> Manifest:
    """Return the manifest; DataError where it, or a shard, is missing or has another size than it says."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if values.get("version") != VERSION:
            raise DataError(
                f"{folder} has the format {values.get('version')!r} of prepared data, this version reads {VERSION}: "
                "prepare the file again"
            )
        known = Manifest(**values | {"shards": [ShardEntry(**entry) for entry in values["shards"]]})
    except FileNotFoundError:
        raise DataError(f"{folder} is no finished folder of prepared data: it has no {MANIFEST}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder / MANIFEST} is damaged: {error}; remove the folder, and prepare it again") from None
    for entry in known.shards if check_shards else ():
        for name, size in entry.files.items():
            _check_size(folder / name, size)
    return known


def _check_size(file: Path, size: int) -> None:
    """Raise DataError for a file that is not there, or has another size than the manifest says."""
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {AGAIN}") from None
    if found != size:
        raise DataError(f"{file} has {found:,} bytes, its manifest says {size:,}: it is damaged; {AGAIN}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes a folder one of prepared data."""
    write_text(folder / MANIFEST, [json.dumps(asdict(manifest), indent=1)])


def checksum_of(tokenizer: Any) -> str:
    """Return the checksum of a tokenizer, or of the preprocessing of images.

    How a text is truncated or padded is no part of it.
    """
    if not isinstance(tokenizer, Tokenizer):
        return hashlib.sha256(repr(tokenizer).encode()).hexdigest()
    values = json.loads(tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# Shards


def write_shard(file: Path, examples: TextExamples[Any]) -> dict[str, Any]:
    """Write the arrays of examples; return the ShardEntry's fields, and what the manifest says of all examples."""
    arrays, dtypes = _collect_arrays(examples)
    encoded = [name.encode(errors="surrogatepass") for name in examples.ids]
    arrays["id_offsets"] = np.cumsum([0, *map(len, encoded)])[:-1]
    arrays["id_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    lengths = np.diff(examples.offsets)
    empty = np.flatnonzero(lengths == 0)
    if examples.sequences is not None and len(empty):
        empty = np.unique(np.searchsorted(examples.sequences, empty, side="right") - 1)
    write_arrays(file, arrays)
    targets = examples.target_ids
    return {
        "files": {file.name: file.stat().st_size},
        "sha256": {file.name: sha256_of(file)},
        "sizes": {
            "examples": len(examples),
            "sequences": len(lengths),
            "tokens": len(examples.input_ids),
            "targets": 0 if targets is None else len(targets),
        },
        "arrays": dtypes,
        "truncated": examples.truncated,
        "encoding_notes": list(examples.notes),
        "length_counts": np.bincount(examples.lengths).tolist(),
        "longest_sequence": int(lengths.max(initial=0)),
        "largest": {
            name: int(values.max(initial=0))
            for name in ("input_ids", "token_type_ids", "target_ids")
            if (values := getattr(examples, name)) is not None
        },
        "num_empty": len(empty),
        "first_empty": examples.ids[int(empty[0])] if len(empty) else "",
    }


def _collect_arrays(examples: TextExamples[Any]) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, list[int]]]]:
    """Return the arrays of examples, and {name: (dtype when read, shape of an element)}, as in MappedExamples."""
    arrays: dict[str, np.ndarray] = {"lengths": examples.lengths}
    dtypes: dict[str, tuple[str, list[int]]] = {}
    own = ("input_ids", "token_type_ids", "token_labels", "continued_words", "labels", "markers", "target_ids")
    for name in own:
        values: np.ndarray | None = getattr(examples, name)
        if values is None:
            continue
        is_span = name == "labels" and values.ndim == 2 and values.dtype.kind == "i"
        dtypes["spans" if is_span else name] = (values.dtype.name, list(values.shape[1:]))
        if name != "token_type_ids" or values.any():  # most texts have a single type, 0
            arrays[name] = values
    for name in ("offsets", "target_offsets", "sequences"):
        values = getattr(examples, name)
        if values is not None:
            dtypes[name], arrays[name] = (values.dtype.name, []), values[:-1]
    return arrays, dtypes


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, whole numbers with 4 bytes, which are enough within a shard."""
    compact = {name: values.astype(np.int32) if values.dtype == np.int64 else values for name, values in arrays.items()}
    save_arrays(file, compact)


def save_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file as a whole. Raises OSError, as of a full disk, which safetensors has in its message."""
    try:
        with replace_file(file) as temporary:
            save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary)
    except SafetensorError as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None


# Rows


def write_rows_file(file: Path, rows: Iterable[Row]) -> int:
    """Write rows, with values of any type that a reader makes; return how many."""
    lines = [encode_row(row) for row in rows]
    write_text(file, lines)
    return len(lines)


def encode_row(row: Row) -> str:
    """Return a row as a line of a file of rows; DataError for a value that cannot be kept."""
    return json.dumps([row.id, row.line, _to_json(row.values)]) + "\n"


def read_rows_file(file: Path) -> list[Row]:
    """Return the rows of a file of write_rows_file; [] where there is none."""
    return list(iterate_rows(file)) if file.exists() else []


def iterate_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file of write_rows_file; DataError where it is damaged."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                yield Row(*json.loads(line, object_hook=_from_json))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file} is damaged: {error}; {AGAIN}") from None


def _to_json(value: Any) -> Any:
    kind = type(value)
    if kind in (str, int, float, bool) or value is None:
        return value
    if kind is list:
        return [_to_json(item) for item in value]
    if kind is dict and KIND not in value:
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return {KIND: "Path", "fields": [str(value.absolute())]}
    if kind.__name__ in KINDS and kind is KINDS[kind.__name__]:
        items = value if isinstance(value, tuple) else [getattr(value, field.name) for field in fields(value)]
        return {KIND: kind.__name__, "fields": [_to_json(item) for item in items]}
    shown = f"{value!r:.80}" if isinstance(value, str | bytes) else f"of the type {kind.__name__}"
    raise DataError(f"a value {shown} of a row cannot be kept in a prepared folder: train from the file")


def _from_json(value: dict[str, Any]) -> Any:
    if KIND not in value:
        return value
    kind: Any = KINDS[value[KIND]]
    return tuple(value["fields"]) if kind is tuple else kind(*value["fields"])
