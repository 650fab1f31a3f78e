"""Parquet files -> rows as of any other kind of file, and what is said of bad ones (F13) and without pyarrow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from data import DataError, read_rows
from data.formats.options import FileOptions
from data.formats.parquet import BATCH_ROWS
from data.formats.values import MAX_TEXT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(folder: Path, **columns: object) -> str:
    """A file of these columns, lists or pyarrow arrays, in row groups of 700."""
    pq.write_table(pa.table(columns), folder / "file.parquet", row_group_size=700, write_page_checksum=True)
    return str(folder / "file.parquet")


def errors_of(name: str, required=("text", "label"), **options) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_rows(name, required, **options)
    return str(caught.value).replace(name, "FILE").split("\n")


def test_rows_keep_their_types_and_are_numbered_from_one(tmp_path):
    texts = ["中文，句子", "🎉👩‍👩‍👧", "two\nlines", "tab\there", "\ufeffinside"]
    name = write(tmp_path, text=texts, label=[1, 2, 3, 4, 5], score=[0.5] * 5, tags=[["a", "b"], [], ["c"], [], []])
    rows = read_rows(name, ["text", "label"])
    assert [row.values["text"] for row in rows] == texts
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert [row.id for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[0].values == {"text": texts[0], "label": 1, "score": 0.5, "tags": ["a", "b"]}


def test_ids_come_from_their_column_and_categories_are_text(tmp_path):
    name = write(tmp_path, id=["x", "y"], text=["a", "b"], label=pa.array(["p", "q"]).dictionary_encode())
    assert [(row.id, row.values["label"]) for row in read_rows(name, ["label"])] == [("x", "p"), ("y", "q")]
    name = write(tmp_path, id=["x", "x"], text=["a", "b"])
    assert errors_of(name, ["text"])[0].startswith("FILE:2: the id 'x' is that of line 1 too")


@pytest.mark.parametrize("count", [1, BATCH_ROWS - 1, BATCH_ROWS, BATCH_ROWS + 1, 3 * BATCH_ROWS + 7])
def test_every_row_is_read_once_in_order(tmp_path, count):
    name = write(tmp_path, text=[f"t{i}" for i in range(count)])
    assert [row.values["text"] for row in read_rows(name, ["text"])] == [f"t{i}" for i in range(count)]


def test_a_file_may_say_its_format_in_the_recipe_only(tmp_path):
    Path(write(tmp_path, text=["a"])).rename(tmp_path / "rows.bin")
    assert len(read_rows(str(tmp_path / "rows.bin"), ["text"], options=FileOptions(format="parquet"))) == 1


def test_f13_bad_rows_are_reported_together_with_their_number(tmp_path):
    count = BATCH_ROWS + 5
    texts: list[bytes | None] = [b"fine"] * count
    texts[1], texts[2], texts[3], texts[BATCH_ROWS + 1] = b"a\0b", None, b"x" * (MAX_TEXT + 1), b"caf\xe9"
    label = [1.0] * count
    label[BATCH_ROWS + 2] = np.nan
    assert errors_of(write(tmp_path, text=unchecked(texts), label=label)) == [
        "FILE:2: a NUL character in 'text'",
        "FILE:3: column 'text' is null",
        "FILE:4: 1,000,001 characters in 'text'; at most 1,000,000 are read",
        f"FILE:{BATCH_ROWS + 2}: not UTF-8 at byte 3 of a text (0xe9)",
        f"FILE:{BATCH_ROWS + 3}: column 'label' is null",
    ]


def unchecked(texts: list[bytes | None]):
    """A column of text whose bytes nobody has looked at, as other writers make them."""
    raw = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_columns_that_are_absent_or_twice_are_named(tmp_path):
    assert errors_of(write(tmp_path, text=["a"], klass=["x"])) == [
        "FILE: no column 'label'; the columns are 'text', 'klass'; did you mean 'klass'?"
    ]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "file.parquet")
    assert errors_of(str(tmp_path / "file.parquet"), ["text"]) == ["FILE: two columns are named 'text'"]


def test_no_rows_no_file_and_a_folder(tmp_path):
    assert errors_of(write(tmp_path, text=pa.array([], pa.string())), ["text"]) == ["FILE: no rows"]
    assert errors_of(str(tmp_path / "none.parquet")) == ["FILE: no such file"]
    (tmp_path / "parts.parquet").mkdir()
    assert errors_of(str(tmp_path / "parts.parquet"))[0].startswith("FILE: this is a folder")


def test_a_damaged_file_is_refused(tmp_path):
    path = Path(write(tmp_path, text=[f"word {i * i}" for i in range(2_000)]))
    whole = path.read_bytes()
    for length in [0, 3, 4, 100, len(whole) // 2, len(whole) - 5, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert errors_of(str(path), ["text"])[0].startswith("FILE: not a parquet file that can be read: "), length
    flipped = bytearray(whole)
    flipped[200] ^= 0x40  # inside the first page of data, whose checksum tells
    path.write_bytes(bytes(flipped))
    assert errors_of(str(path), ["text"])[0].startswith("FILE: not a parquet file that can be read: ")


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    name = write(tmp_path, text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (message,) = errors_of(name, ["text"])
    assert message.startswith("FILE: parquet files need the package pyarrow: pip install")
