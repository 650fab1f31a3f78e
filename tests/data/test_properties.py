"""Random rows of every task in every format: rows in = rows out and left out, ids kept, texts equal, counts add up."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("pyarrow")
import pyarrow
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import Row, Rows, read_rows
from data.causal_lm import read_texts
from data.dialogue import read_dialogues
from data.formats.options import FileOptions
from data.formats.squad import read_questions
from data.relation_extraction import read_relations
from data.seq2seq import read_pairs
from data.token_classification import read_tagged

FEW = settings(max_examples=15, derandomize=True, deadline=None, database=None)

Values = dict[str, Any]

# Formats: each writes rows into a folder and returns the name to read, with the options that it needs.


def write_lines(folder: Path, rows: list[Values]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def write_array(folder: Path, rows: list[Values]) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def write_table(folder: Path, rows: list[Values], name: str = "rows.csv") -> Path:
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream, rows[0], delimiter="\t" if name.endswith("tsv") else ",", quoting=csv.QUOTE_ALL, lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    content = stream.getvalue().encode()
    (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    return folder / name


def write_parquet(folder: Path, rows: list[Values]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder: Path, rows: list[Values]) -> Path:
    """A folder as the library `datasets` saves it, in two files."""
    table = pyarrow.Table.from_pylist(rows)
    for i, part in enumerate((table.slice(0, len(rows) // 2), table.slice(len(rows) // 2))):
        with pyarrow.ipc.new_stream(folder / f"data-{i}.arrow", table.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{i}.arrow"} for i in (0, 1)]}))
    return folder


NESTED = {"jsonl": write_lines, "json": write_array, "parquet": write_parquet, "saved": write_saved}
FLAT: dict[str, Callable[[Path, list[Values]], Path]] = NESTED | {
    "csv": write_table,
    "tsv": lambda folder, rows: write_table(folder, rows, "rows.tsv"),
    "csv.gz": lambda folder, rows: write_table(folder, rows, "rows.csv.gz"),
}

# Texts: no control character but a line feed and a tab, no half of a surrogate pair, and a word in each.

CHARACTERS = st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters="\ufeff") | st.sampled_from(
    ' \n\t"\\,;'
)
TEXTS = st.builds("{}w{}".format, st.text(CHARACTERS, max_size=8), st.text(CHARACTERS, max_size=8))
LABELS = st.sampled_from(["a", "b", "好", "1"])
WORDS = st.lists(st.text("aé中😀", min_size=1, max_size=3), min_size=1, max_size=5)


@st.composite
def questions(draw: st.DrawFn) -> Values:
    context = draw(TEXTS)
    start = context.index("w")
    end = draw(st.integers(start + 1, len(context)))
    return {
        "question": draw(TEXTS),
        "context": context,
        "answers": {"text": [context[start:end]], "answer_start": [start]},
    }


@st.composite
def relations(draw: st.DrawFn) -> Values:
    subject, obj = draw(WORDS), draw(WORDS)
    text = " ".join([*subject, "w", *obj])
    start = len(text) - len(" ".join(obj))
    return {
        "text": text,
        "subject": {"start": 0, "end": len(" ".join(subject)), "type": "S"},
        "object": {"start": start, "end": len(text), "type": "O"},
        "relation": draw(LABELS),
    }


@st.composite
def sentences(draw: st.DrawFn) -> Values:
    words = draw(WORDS)
    return {"tokens": words, "tags": [draw(st.sampled_from(["O", "B-X"])) for _ in words]}


@st.composite
def dialogues(draw: st.DrawFn) -> Values:
    exchanges = [(draw(TEXTS), draw(TEXTS)) for _ in range(draw(st.integers(1, 3)))]
    roles = ("user", "assistant")
    return {"messages": [{"role": role, "content": turn[i]} for turn in exchanges for i, role in enumerate(roles)]}


def flat(*columns: str) -> st.SearchStrategy[Values]:
    return st.fixed_dictionaries({column: LABELS if column == "label" else TEXTS for column in columns})


# {reader: (how it reads a file, its rows, the column that is made empty to make a row bad, the formats)}.
READERS = {
    "rows": (lambda name, options: read_rows(name, ["text", "label"], options), flat("text", "label"), "", FLAT),
    "texts": (lambda name, options: read_texts(name, "text", options=options), flat("text", "more"), "text", FLAT),
    "pairs": (lambda name, options: read_pairs(name, "a", "b", options=options), flat("a", "b"), "b", FLAT),
    "questions": (lambda name, options: read_questions(name, options=options), questions(), "question", NESTED),
    "relations": (
        lambda name, options: read_relations(name, label="relation", options=options),
        relations(),
        "relation",
        NESTED,
    ),
    "tags": (lambda name, options: read_tagged(name, "tokens", "tags", options=options), sentences(), "tokens", NESTED),
    "dialogues": (
        lambda name, options: read_dialogues(name, "messages", True, options=options),
        dialogues(),
        "messages",
        NESTED,
    ),
}


def texts_of(row: Row, given: Values) -> list[Any]:
    """The values of the row that are texts in what was written, and the texts of turns."""
    if "messages" in given:
        return [turn.content for turn in row.values["messages"]]
    return [row.values[key] for key, value in given.items() if isinstance(value, str)]


def expected_texts(given: Values) -> list[Any]:
    if "messages" in given:
        return [turn["content"] for turn in given["messages"]]
    return [value for value in given.values() if isinstance(value, str)]


@pytest.mark.parametrize(
    ("reader", "format"), [(reader, format) for reader, (*_, formats) in READERS.items() for format in formats]
)
@FEW
@given(data=st.data())
def test_rows_in_are_rows_out_and_left_out(reader, format, data):
    read, strategy, empty, formats = READERS[reader]
    written = [dict(row) for row in data.draw(st.lists(strategy, min_size=2, max_size=6))]
    bad: set[int] = data.draw(st.sets(st.integers(1, len(written) - 1))) if empty else set()
    for i in bad:
        written[i][empty] = type(written[i][empty])()
    has_ids = data.draw(st.booleans())
    ids = [f"r{i * 7}" for i in range(len(written))] if has_ids else [str(i + 1) for i in range(len(written))]
    rows = [{"id": key} | row for key, row in zip(ids, written, strict=True)] if has_ids else written
    options = FileOptions(bad_rows="skip", quotes="yes" if format == "tsv" else "auto")
    with tempfile.TemporaryDirectory() as folder:
        found: Rows = read(str(formats[format](Path(folder), rows)), options)
    good = [i for i in range(len(rows)) if i not in bad]
    assert [row.id for row in found] == [ids[i] for i in good]
    assert [row.id for row in found.left_out] == [ids[i] for i in sorted(bad)]
    assert [texts_of(row, written[i]) for row, i in zip(found, good, strict=True)] == [
        expected_texts(written[i]) for i in good
    ]
    count = f"{len(bad):,} of {len(rows):,} rows left out: "
    assert sum(note.startswith(count) for note in found.notes) == bool(bad)
