"""Encoded texts in files, so that a later run on the same data need not encode it again: the setting data.cache.

A file is named by a checksum of all that its examples depend on: the rows as they were read, the tokenizer, the
settings and the code. So it is never out of date, and the folder can be deleted at any time. Rows are read and checked
in every run. A file is written under another name and then renamed, so that several processes can share a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from safetensors import SafetensorError
from tokenizers import Tokenizer

from data.causal_lm import LanguageModelRecord, PromptRecord
from data.errors import DataError
from data.examples import TextExamples
from data.loader import Examples
from data.masked_lm import FillRecord, MaskedRecord
from data.row import Row
from data.seq2seq import Seq2SeqRecord
from data.span_corruption import SpanRecord
from data.writing import replace_file

VERSION = "1"  # of the files
RECORDS = {
    record.__name__: record
    for record in (LanguageModelRecord, PromptRecord, Seq2SeqRecord, MaskedRecord, FillRecord, SpanRecord)
}
JSON = "values"  # the name of the array that holds all other values, as JSON


class DamagedError(Exception):
    """A file of a cache is not as it was written."""


def find_key(rows: Sequence[Row], tokenizer: Tokenizer, parts: Iterable[object], packages: Iterable[ModuleType]) -> str:
    """Return the checksum of all that encoded rows depend on.

    parts: the settings and other values; their text tells them apart. packages: those whose code encodes.
    """
    digest = hashlib.sha256()
    code = (
        file.read_bytes() for package in packages for file in sorted(Path(str(package.__file__)).parent.rglob("*.py"))
    )
    head = (VERSION, tokenizers.__version__, tokenizer.to_str(), *map(repr, parts))
    for part in (*(text.encode() for text in head), *code):
        digest.update(hashlib.sha256(part).digest())
    for row in rows:
        digest.update(repr((row.id, row.values)).encode(errors="surrogatepass"))
    return digest.hexdigest()


def notes_of(examples: Examples) -> list[str]:
    """Return the notes of examples, first what the cache did."""
    return [note for note in (getattr(examples, "cache_note", ""), *examples.notes) if note]


def read_examples(file: Path, tokenizer: Tokenizer) -> TextExamples[Any] | None:
    """Return the examples of a file, None where there is none.

    tokenizer: that of the run, for records that need one. Raises DamagedError, and DataError for a file that cannot be
    read.
    """
    try:
        arrays = safetensors.numpy.load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(f"not a safetensors file: {error}") from None
    except OSError as error:
        raise _refuse(file.parent, error) from None
    try:
        checksum = arrays.pop("checksum").tobytes()
        if checksum != _checksum(arrays):
            raise DamagedError("its checksum does not match")
        values = json.loads(arrays.pop(JSON).tobytes())
        name, record = values.pop("record"), None
        if name is not None:
            own: dict[str, Any] = {
                key.partition(".")[2]: arrays.pop(key) for key in list(arrays) if key.startswith("record.")
            }
            record = RECORDS[name](tokenizer=tokenizer, **own, **values.pop("of record"))
        notes = tuple(values.pop("notes"))
        return TextExamples(**{"labels": None} | arrays | values, notes=notes, record=record)
    except KeyError as error:
        raise DamagedError(f"it lacks {error}") from None


def write_examples(file: Path, examples: TextExamples[Any]) -> None:
    """Write examples, with a checksum; DataError where the folder cannot be written."""
    arrays, values = _separate(examples, leave_out=("record", "cache_note"))
    record = examples.record
    values["record"] = None if record is None else type(record).__name__
    if record is not None:
        own, values["of record"] = _separate(record, leave_out=("tokenizer",))
        arrays |= {f"record.{name}": array for name, array in own.items()}
    arrays[JSON] = np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)
    arrays["checksum"] = np.frombuffer(_checksum(arrays), dtype=np.uint8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as temporary:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            safetensors.numpy.save_file(contiguous, temporary)
    except (OSError, SafetensorError) as error:
        raise _refuse(file.parent, error) from None


def _separate(values: Any, leave_out: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return (the fields of a dataclass that are arrays, all others but None)."""
    named = {field.name: getattr(values, field.name) for field in fields(values) if field.name not in leave_out}
    arrays = {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in named.items() if name not in arrays and value is not None}


def _checksum(arrays: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.digest()


def _refuse(folder: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"data.cache = {str(folder)!r}: {reason}; choose another folder, or leave it out")
