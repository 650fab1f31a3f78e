"""Pairs of a text and what to write for it: rows, parallel files, and encoded examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data import DataError, Row
from data.formats.options import FileOptions
from data.seq2seq import read_pairs


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Pairs


def test_rows_need_a_source_and_a_target_that_are_not_empty(tmp_path):
    rows = [
        {"text": "a b", "summary": "c"},
        {"text": "", "summary": "c"},
        {"text": "a", "summary": "  "},
        {"text": 5, "summary": "c"},
        {"text": "a"},
        {"text": "a", "summary": ["c"]},
    ]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_pairs(str(path), "text", "summary")
    reasons = [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]
    assert reasons == [
        "2: 'text' is empty",
        "3: 'summary' is empty",
        "4: 'text' should be text, not 5",
        "5: no column 'summary'; this row has 'text'",
        "6: 'summary' should be text, not ['c']",
    ]
    assert len(read_pairs(str(write_rows(path, rows[:1])), "text", "")) == 1  # to predict, no target is needed


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables_are_read_as_rows_are(kind, tmp_path):
    comma = {"csv": ",", "tsv": "\t"}[kind]
    (tmp_path / f"pairs.{kind}").write_text(f"source{comma}target\na b{comma}一二\n", encoding="utf-8")
    (row,) = read_pairs(str(tmp_path / f"pairs.{kind}"), "source", "target")
    assert (row.values["source"], row.values["target"]) == ("a b", "一二")


def write_parallel(folder: Path, en: bytes, zh: bytes) -> str:
    (folder / "corpus.en").write_bytes(en)
    (folder / "corpus.zh").write_bytes(zh)
    return str(folder / "corpus")


def test_parallel_files_are_read_line_by_line(tmp_path):
    name = write_parallel(tmp_path, "a b\r\nc\u2028d\n".encode(), "一二\n三".encode())
    rows = read_pairs(name, "en", "zh", options=FileOptions(format="parallel"))
    assert rows == [Row("1", 1, {"en": "a b", "zh": "一二"}), Row("2", 2, {"en": "c\u2028d", "zh": "三"})]
    assert read_pairs(name, "en", "", options=FileOptions(format="parallel")) == [
        Row("1", 1, {"en": "a b"}),
        Row("2", 2, {"en": "c\u2028d"}),
    ]


@pytest.mark.parametrize(
    ("en", "zh", "reason"),
    [
        (b"a\nb\n", b"c\n", r"corpus\.en has 2 and .*corpus\.zh has 1 lines: line n"),
        (b"a\n\nb", b"c\nd\ne", r"corpus\.en:2: 'en' is empty$"),
        (b"a\nb\n", b"c\n \n", r"corpus\.zh:2: 'zh' is empty$"),
        (b"a\n\xff\n", b"c\nd\n", r"corpus\.en:2: not UTF-8 at byte 0"),
        (b"a\nb\n", b"a word\0 and more\nd\n", r"corpus\.zh:1: a NUL character"),
        (b"", b"", r"corpus\.en: no lines"),
    ],
)
def test_parallel_files_of_different_length_are_an_error(en, zh, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        read_pairs(write_parallel(tmp_path, en, zh), "en", "zh", options=FileOptions(format="parallel"))


def test_missing_parallel_file_is_named(tmp_path):
    name = write_parallel(tmp_path, b"a\n", b"b\n")
    with pytest.raises(DataError, match=r"corpus\.fr: no such file; .* reads .*corpus\.en and .*corpus\.fr$"):
        read_pairs(name, "en", "fr", options=FileOptions(format="parallel"))
