"""Files read in windows: the same rows, ids, lines and rows left out as when they are read as a whole."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import pytest

from data import DataError, Row, Rows, read_rows
from data import windows as reading
from data.causal_lm import read_texts
from data.formats.options import FileOptions
from data.row import LeftOut
from data.token_classification import read_tagged
from data.windows import read_windows

SKIP = FileOptions(bad_rows="skip", accept_empty=True)


def rows_of(name: str) -> Rows:
    return read_rows(name, ["text"], SKIP)


def words_of(name: str) -> Rows:
    return read_tagged(name, "text", options=SKIP)


JSONL = ['{"text": "one", "more": 1}', "", '{"text": 2}', "{broken", '{"more": 3}', '{"text": "five", "id2": 5}'] * 3
CSV = ["text,more", "one,1", '"two\nlines",2', "three,3,3,3", "", "text,more", '"fo,ur",4', ",5", "six,6"]
CONLL = ["one O", "two B-X", "", "-DOCSTART- O", "", "three O", "", "four O", "five I-X extra", "", "six O", "", ""]
Case = tuple[str, str | bytes, Callable[[str], Rows]]
CASES: dict[str, Case] = {
    "jsonl": ("a.jsonl", "\n".join(JSONL), rows_of),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress("\n".join(JSONL).encode()), rows_of),
    "csv": ("a.csv", "\n".join(CSV), rows_of),
    "csv in UTF-16": (
        "a.csv",
        "\n".join(CSV).encode("utf-16"),
        lambda name: read_rows(name, ["text"], FileOptions(bad_rows="skip", accept_empty=True, encoding="utf-16")),
    ),
    "tsv": ("a.tsv", "\n".join(line.replace(",", "\t") for line in CSV if '"' not in line), rows_of),
    "json": ("a.json", json.dumps([{"text": str(i)} for i in range(9)]), rows_of),
    "conll": ("a.conll", "\n".join(CONLL), words_of),
    "words": (
        "a.txt",
        "\n".join(["Ann left .", "", "Bob\tstayed ."] * 3),
        lambda name: read_tagged(name, "text", options=FileOptions(format="text")),
    ),
    "lines": ("a.txt", "\ufeffone\n\ntwo\n \nthree\nfour\n", lambda name: read_texts(name, "text")),
}


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("name", CASES)
def test_windows_have_the_rows_of_the_whole_file(tmp_path, name, size):
    file_name, content, read = CASES[name]
    file = tmp_path / file_name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    whole = read(str(file))
    windows = list(read_windows(str(file), lambda: read(str(file)), size))
    assert [row for window in windows for row in window.rows] == list(whole)
    assert [row for window in windows for row in window.rows.left_out] == whole.left_out
    assert max(len(window.rows) for window in windows) <= size
    assert not any(window.is_held for window in windows)
    assert [window.is_last for window in windows] == [False] * (len(windows) - 1) + [True]
    assert reading._OPEN == {}
    assert read(str(file)) == whole  # as before


def test_parquet_is_read_in_windows_across_its_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [None if i == 7 else f"text {i}" for i in range(50)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    file = str(tmp_path / "a.parquet")
    whole, windows = rows_of(file), list(read_windows(file, lambda: rows_of(file), 11))
    assert [row for window in windows for row in window.rows] == list(whole)
    assert [row.line for window in windows for row in window.rows.left_out] == [8]
    assert len(windows) == 5


def test_other_readers_are_divided_with_rows_left_out_in_place(tmp_path):
    rows = Rows([Row(str(i), i) for i in (1, 2, 4, 5, 7)], left_out=[LeftOut(str(i), i, "bad") for i in (3, 6, 8)])
    windows = list(read_windows(str(tmp_path), lambda: rows, 2))
    found = [[*(r.line for r in w.rows), *(r.line for r in w.rows.left_out)] for w in windows]
    assert found == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert all(window.is_held for window in windows)


def test_a_window_of_long_texts_has_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_CHARACTERS", 100)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * 60}) + "\n" for _ in range(6)))
    assert [len(w.rows) for w in read_windows(str(file), lambda: rows_of(str(file)), 100)] == [2, 2, 2]


def test_ids_that_only_later_windows_have_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c", "id": "x"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: no id in 'id', which later rows have; data.id_column = \"\""):
        list(read_windows(str(file), lambda: rows_of(str(file)), 1))


def test_a_column_that_a_window_lacks_is_an_error_of_its_rows(tmp_path):
    """Elsewhere it is an error of the file, as the first window shows."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"{"text" if i < 4 else "txt"}": "a"}}\n' for i in range(8)))
    windows = list(read_windows(str(file), lambda: rows_of(str(file)), 2))
    assert [len(window.rows) for window in windows] == [2, 2, 0, 0]
    assert [row.line for window in windows for row in window.rows.left_out] == [5, 6, 7, 8]
    assert "no column 'text'" in windows[-1].rows.left_out[0].reason
