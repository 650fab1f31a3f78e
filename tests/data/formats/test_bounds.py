"""Files that are too large, or pretend to be: refused before they are in memory."""

import gzip
import json
import lzma
import os
import tracemalloc

import pytest

from data.errors import DataError, ErrorList
from data.formats import lines
from data.formats.conll import read_conll
from data.formats.rows import read_rows
from data.formats.text import read_lines

READERS = {
    "jsonl": lambda path: read_rows(path, ["text"]),
    "json": lambda path: read_rows(path, ["text"]),
    "csv": lambda path: read_rows(path, ["text"]),
    "tsv": lambda path: read_rows(path, ["text"]),
    "txt": lambda path: read_lines(path, "text", ErrorList()),
    "conll": lambda path: list(read_conll(lines.locate(path), "", "", True, ErrorList(), lines.FileOptions())),
}
BEGINS = {"jsonl": '{"text": "', "json": '[{"text": "', "csv": 'text\n"', "tsv": "text\n", "txt": "", "conll": ""}


@pytest.mark.parametrize("format", READERS)
def test_a_file_without_line_ends_is_not_read_whole(tmp_path, format):
    """Five gigabytes, which take no room on the disk after the first megabyte."""
    path = tmp_path / f"endless.{format}"
    path.write_text(BEGINS[format] + "x" * 2_000_000)
    os.truncate(path, 5 << 30)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"without a line end|too many for a file that is read as a whole") as caught:
        READERS[format](str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert peak < 100e6


@pytest.mark.parametrize("pack", [gzip, lzma])
def test_a_packed_file_that_grows_without_end_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(lines, "MAX_WHOLE", 4 << 20)
    path = tmp_path / f"bomb.tsv.{'gz' if pack is gzip else 'xz'}"
    path.write_bytes(pack.compress(b"text\n" + (b"a" * 10_000 + b"\n") * 800))
    with pytest.raises(DataError, match="unpacks to more than 200 times its size; unpack it, and name a file in it"):
        read_rows(str(path), ["text"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_json_and_utf_16_are_read_up_to_the_limit(tmp_path, monkeypatch, encoding, pack):
    """A file of one line is read as a whole, up to the limit and not beyond it."""
    options = lines.FileOptions(encoding="" if encoding == "utf-8" else encoding)
    path = tmp_path / ("file.json" if pack is bytes else "file.json.gz")
    content = json.dumps([{"text": str(i) * 9} for i in range(9)]).encode(encoding)
    path.write_bytes(pack(content))
    monkeypatch.setattr(lines, "CHUNK", 50)
    monkeypatch.setattr(lines, "MAX_WHOLE", len(content))
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 60)
    assert len(read_rows(str(path), ["text"], options)) == 9
    monkeypatch.setattr(lines, "MAX_WHOLE", len(content) - 1)
    with pytest.raises(DataError, match=r"more than|without a line end") as caught:
        read_rows(str(path), ["text"], options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_lines_are_the_same_however_they_are_read(tmp_path, monkeypatch, end, chunk):
    texts = ["first", "", "zwölf", " ", "\u2028 x", "", "end"]
    (tmp_path / "a.txt").write_bytes(end.join(texts).encode() + end.encode())
    file = lines.TextFile(tmp_path / "a.txt")
    monkeypatch.setattr(lines, "CHUNK", chunk)
    assert [text for _, text in file.lines(ErrorList())] == texts


def test_a_pipe_without_a_writer_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PIPE_SECONDS", 0.01)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe.jsonl: a pipe into which nothing was written in 0.01 s"):
        read_rows(str(tmp_path / "pipe.jsonl"), ["text"])


def test_endless_devices_are_refused(monkeypatch):
    monkeypatch.setattr(lines, "MAX_WHOLE", 1 << 20)
    with pytest.raises(DataError, match="more than 1,048,576 bytes, too many"):
        read_lines("/dev/zero", "text", ErrorList())


def test_a_parquet_file_of_a_constant_column_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2_000_000, pyarrow.string())}), path)
    monkeypatch.setattr("data.formats.parquet.MAX_WHOLE", 1 << 20)
    with pytest.raises(DataError, match="bytes, over 200 times its size"):
        read_rows(str(path), ["text"])


# What the fuzzer (tests/faults/fuzz_readers.py) found


def test_an_arrow_file_that_points_outside_is_a_sentence(tmp_path):
    """Offsets of a text beyond its bytes ended the process."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["a", "bc"]})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    offsets = b"\0\0\0\0\1\0\0\0\3\0\0\0"
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, b"\0\0\0\0\xff\xff\xff\x7f\3\0\0\0"))
    with pytest.raises(DataError, match="not a table file that can be read"):
        read_rows(str(tmp_path / "a.arrow"), ["text"])


def test_a_bad_line_of_fixed_spaces_is_a_sentence(tmp_path):
    """Its guessed encoding shows no character other than a space."""
    (tmp_path / "a.txt").write_bytes(b"a\xa0\n" + "caf\xe9 \n".encode("cp1252") * 9)
    with pytest.raises(DataError, match="not UTF-8 at byte 1 of the line"):
        read_lines(str(tmp_path / "a.txt"), "text", ErrorList())


def test_a_long_value_is_not_shown_whole(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tscore\n" + "x" * 100_000 + "\tlow\n" + "a\t" + "y" * 100_000 + "\n")
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "a.tsv"), ["text", "z" * 100_000])
    assert len(str(caught.value)) < 1_100
