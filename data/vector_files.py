"""Vectors as a file: .npy, a matrix of fp32 with the ids in a file beside it, or .parquet with ids and vectors.

A row is {"id": ..., "embedding": base64 of fp32 in little-endian order, or null}, with a "reason" where it is null. The
vector of such a row is NaN in .npy and null in .parquet. The rows are read several times, and never all in memory.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.writing import replace_file, to_json, write_text

ROWS_OF_GROUP = 8192  # of a .parquet file, held in memory while it is written
Rows = Callable[[], Iterable[dict[str, Any]]]  # which can be read more than once


def ids_file(path: Path) -> Path:
    """Return the file of the ids of a .npy: a line of JSON for each row, in its order."""
    return path.with_suffix(".ids.jsonl")


def write_npy(path: Path, rows: Rows) -> None:
    """Write the vectors as a matrix (N, D), and the ids beside it. Raises OSError."""
    count, width = 0, 0
    for row in rows():
        count, width = count + 1, width or (0 if row["embedding"] is None else len(_decode(row["embedding"])))
    missing = np.full(width, np.nan, dtype="<f4").tobytes()
    ids = ({name: row[name] for name in ("id", "reason") if name in row} for row in rows())
    write_text(ids_file(path), (to_json(entry, ensure_ascii=False) + "\n" for entry in ids))
    with replace_file(path) as temporary, temporary.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(stream, header)
        for row in rows():
            stream.write(missing if row["embedding"] is None else base64.b64decode(row["embedding"]))


def write_parquet(path: Path, rows: Rows) -> None:
    """Write the vectors as a table of id, embedding (a list of fp32) and reason. Raises OSError."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds = {"id": pyarrow.string(), "embedding": pyarrow.list_(pyarrow.float32()), "reason": pyarrow.string()}
    schema = pyarrow.schema(list(kinds.items()))
    with replace_file(path) as temporary, ParquetWriter(temporary, schema) as writer:
        for group in _groups(rows(), ROWS_OF_GROUP):
            columns = {name: [row.get(name) for row in group] for name in ("id", "reason")}
            vectors = [None if row["embedding"] is None else _decode(row["embedding"]) for row in group]
            writer.write_table(pyarrow.table(columns | {"embedding": vectors}, schema=schema))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {".npy": write_npy, ".parquet": write_parquet}


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def _groups(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in lists of `size`, the last one perhaps shorter."""
    iterator = iter(rows)
    while group := list(itertools.islice(iterator, size)):
        yield group
