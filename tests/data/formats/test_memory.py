"""Rows in memory: every reader takes them as it takes a file, with the same rows, examples and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import DataError, Row, read_rows
from data.causal_lm import read_texts
from data.dialogue import Turn, read_dialogues
from data.formats.memory import in_memory
from data.formats.options import FileOptions
from data.formats.squad import Answer, read_questions
from data.image_classification import encode_images, read_images
from data.image_preprocessing import Preprocessing
from data.relation_extraction import Entity, read_relations
from data.seq2seq import read_pairs
from data.teacher import read_teacher
from data.token_classification import read_tagged


def reason(rows: list[Any], read: Any) -> str:
    with in_memory(some_rows=rows) as names, pytest.raises(DataError) as caught:
        read(names["some_rows"])
    return str(caught.value)


def values_of(rows: list[Row]) -> list[Any]:
    return [(row.id, row.line, row.values) for row in rows]


# Rows


def test_rows_and_dicts_are_read_with_ids_and_numbers():
    rows = [Row(text="a", label="x"), {"text": "b", "label": 1}, Row("mine", 7, {"text": "c", "label": True})]
    with in_memory(train_rows=rows) as names:
        assert names == {"train_rows": "memory:train_rows"}
        found = read_rows(names["train_rows"], ["text"])
    assert values_of(found) == [
        ("1", 1, {"text": "a", "label": "x"}),
        ("2", 2, {"text": "b", "label": 1}),
        ("mine", 3, {"text": "c", "label": True}),
    ]
    assert (rows[0].id, rows[0].line) == ("", 0)


def test_ids_come_from_their_column():
    with in_memory(rows=[{"key": 4, "text": "a"}, Row(key="b", text="b")]) as names:
        assert [row.id for row in read_rows(names["rows"], ["text"], FileOptions(id_column="key"))] == ["4", "b"]


def test_values_of_numpy_are_those_of_json():
    row = {"a": np.int64(3), "b": np.float32(0.5), "c": np.array(["x", "y"]), "d": (1, 2), "e": math.nan, "f": np.nan}
    with in_memory(rows=[row | {"text": "t"}]) as names:
        found = read_rows(names["rows"], ["text"])[0].values
    assert found == {"a": 3, "b": 0.5, "c": ["x", "y"], "d": [1, 2], "e": None, "f": None, "text": "t"}
    assert type(found["a"]) is int


def test_the_format_of_a_recipe_does_not_matter():
    rows = [{"text": "a", "label": "x"}]
    with in_memory(rows=rows) as names:
        for format in ("auto", "csv", "tsv", "parquet"):
            assert read_rows(names["rows"], ["text"], options=FileOptions(format=format))[0].values == rows[0]
        for format in ("auto", "text"):
            assert read_texts(names["rows"], "text", options=FileOptions(format=format))[0].values == rows[0]


def test_reading_changes_no_row_of_the_caller():
    rows = [{"messages": ["a", "b"]}, Row(messages=["c", "d"])]
    with in_memory(rows=rows) as names:
        first, second = (values_of(read_dialogues(names["rows"], "messages", True)) for _ in range(2))
    assert first == second
    assert (rows[0], rows[1].values) == ({"messages": ["a", "b"]}, {"messages": ["c", "d"]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"other": "a"}, "no column 'text'; this row has 'other'"),
        ({"text": None}, "column 'text' is null"),
        ({"text": math.nan}, "column 'text' is null"),
        ({"text": "a\0"}, "a NUL character in 'text'"),
        ({"text": "a", "more": ["\ud800"]}, "\\ud800 is half of a surrogate pair, not a character"),
        ("a text", "a row should be a Row, or a dict of columns, not 'a text'"),
        ({"text": "b", "id": "1"}, "the id '1' is that of line 1 too"),
    ],
)
def test_f13_a_bad_row_is_named_by_its_number(row, expected):
    good = {"text": "fine", "id": "1"} if "id" in row else {"text": "fine"}
    assert reason([good, row], lambda name: read_rows(name, ["text"])).startswith(f"some_rows:2: {expected}")


def test_no_rows_and_rows_that_are_gone():
    assert reason([], lambda name: read_rows(name, ["text"])) == "memory:some_rows: no rows"
    with in_memory(rows=[{"text": "a"}]) as names:
        pass
    with pytest.raises(DataError, match="memory:rows: these rows are not in memory any more; give them again"):
        read_rows(names["rows"], ["text"])


def test_inner_rows_of_the_same_name_hide_the_outer_ones():
    with in_memory(rows=[{"text": "outer"}]) as names:
        with in_memory(rows=[{"text": "inner"}]):
            assert read_rows(names["rows"], ["text"])[0].values == {"text": "inner"}
        assert read_rows(names["rows"], ["text"])[0].values == {"text": "outer"}


# Every reader: the rows of a file and of memory are the same, and so are rows that a reader made, read again.

MESSAGES = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}
MESSAGES["messages"].append({"role": "assistant", "content": "b"})
QUESTION = {"question": "Where?", "context": "In Ulm.", "answers": {"text": ["Ulm"], "answer_start": [3]}}
RELATION = {"text": "Bill left Ulm", "subject": {"start": 0, "end": 4, "type": "P"}, "object": "Ulm", "relation": "r"}
READERS = {
    "texts": (lambda name: read_texts(name, "text"), [{"text": "a"}, {"text": "b"}]),
    "dialogues": (lambda name: read_dialogues(name, "messages", True), [MESSAGES, {"messages": ["a", "b"]}]),
    "pairs": (lambda name: read_pairs(name, "a", "b"), [{"a": "x", "b": "y"}]),
    "questions": (read_questions, [QUESTION, QUESTION | {"answers": [{"text": "In", "answer_start": 0}]}]),
    "relations": (lambda name: read_relations(name, label="relation"), [RELATION]),
    "words": (lambda name: read_tagged(name, "tokens", "tags"), [{"tokens": ["In", "Ulm"], "tags": ["O", "B-L"]}]),
    "spans": (
        lambda name: read_tagged(name, "tokens", "tags"),
        [{"tokens": "In Ulm.", "tags": [{"start": 3, "end": 6, "label": "L"}]}],
    ),
}


@pytest.mark.parametrize(("read", "rows"), READERS.values(), ids=READERS)
def test_memory_and_a_file_give_the_same_rows(tmp_path, read, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_file = read(str(path))
    with in_memory(rows=rows, again=from_file) as names:
        assert values_of(read(names["rows"])) == values_of(from_file)
        assert values_of(read(names["again"])) == values_of(from_file)


def test_values_that_a_reader_made_are_read_again():
    with in_memory(
        dialogues=[{"messages": [Turn("user", "a"), Turn("assistant", "b")]}],
        questions=[QUESTION | {"answers": [Answer("Ulm", 3)]}],
        relations=[RELATION | {"object": Entity(10, 13, "L")}],
    ) as names:
        assert read_dialogues(names["dialogues"], "messages", True)[0].values["messages"][1].content == "b"
        assert read_questions(names["questions"])[0].values["answers"] == [Answer("Ulm", 3)]
        assert read_relations(names["relations"])[0].values["object"] == Entity(10, 13, "L")


def test_formats_of_files_do_not_matter_to_any_reader():
    with in_memory(pairs=[{"a": "x", "b": "y"}], questions=[QUESTION], words=[{"tokens": "In Ulm"}]) as names:
        assert read_pairs(names["pairs"], "a", "b", options=FileOptions(format="parallel"))[0].values == {
            "a": "x",
            "b": "y",
        }
        assert read_questions(names["questions"], options=FileOptions(format="squad"))[0].values["answers"] == [
            Answer("Ulm", 3)
        ]
        for format in ("conll", "word/tag", "text"):
            assert read_tagged(names["words"], "tokens", options=FileOptions(format=format))[0].values["tokens"] == [
                "In",
                " Ulm",
            ]


BAD = {
    "texts": ({"text": " "}, "'text' is empty"),
    "dialogues": ({"messages": ["a"]}, "the last turn is the user's; it should be the assistant's, to learn from"),
    "pairs": ({"a": "x", "b": 3}, "'b' should be text, not 3"),
    "questions": (QUESTION | {"answers": [{"text": "x", "answer_start": 0}]}, "the context has 'I' at 0"),
    "relations": (RELATION | {"object": "Rome"}, "the object 'Rome' is not in the text"),
    "words": ({"tokens": ["a"], "tags": []}, "1 word in 'tokens', and 0 tags in 'tags'"),
}


@pytest.mark.parametrize(("kind", "bad"), BAD.items(), ids=BAD)
def test_f13_every_reader_names_the_row(kind, bad):
    read, good = READERS[kind]
    row, expected = bad
    assert reason([good[0], row], read).startswith(f"some_rows:2: {expected}")


def test_logits_of_a_teacher_in_memory():
    with in_memory(teacher=[{"id": "b", "logits": [1, 2]}, {"id": "a", "logits": {"y": 4, "x": 3}}]) as names:
        assert read_teacher(names["teacher"], ["a", "b"], ["x", "y"]).tolist() == [[3, 4], [1, 2]]


# Images

PREPROCESSING = Preprocessing((8, 8), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3, tokens=5)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_images_in_memory_are_encoded_as_files_are(tmp_path):
    image = Image.fromarray(pixels(12, 10, 3))
    image.save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,label\na.png,x\n")
    expected = encode_images(read_images(str(tmp_path / "list.csv")), PREPROCESSING, labels=["x"]).batch([0])
    for value in (image, pixels(12, 10, 3), tmp_path / "a.png", str(tmp_path / "a.png")):
        with in_memory(rows=[{"path": value, "label": "x"}]) as names:
            examples = encode_images(read_images(names["rows"]), PREPROCESSING, labels=["x"])
        batch = examples.batch([0])
        assert batch.pixel_values.equal(expected.pixel_values)
        assert batch.labels.equal(expected.labels)


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (9, 9, 3), (9, 9, 4)])
def test_arrays_of_one_to_four_channels_are_images(shape):
    with in_memory(rows=[{"path": pixels(*shape), "label": "x"}]) as names:
        examples = encode_images(
            read_images(names["rows"], options=FileOptions(format="folder")), PREPROCESSING, labels=["x"]
        )
    assert examples.batch([0]).pixel_values.shape == (1, 3, 8, 8)


def test_the_fingerprint_depends_on_the_pixels():
    found = []
    for image in (pixels(9, 9), pixels(9, 9), pixels(9, 9) + 1):
        with in_memory(rows=[{"path": image, "label": "x"}]) as names:
            found.append(encode_images(read_images(names["rows"]), PREPROCESSING, labels=["x"]).fingerprint())
    assert (found[0] == found[1], found[0] == found[2]) == (True, False)


def test_f13_bad_images_in_memory_are_named_or_left_out(tmp_path):
    Path(tmp_path / "broken.png").write_bytes(b"no image")
    values = [
        pixels(9, 9),
        pixels(9, 9).astype(float),
        pixels(2, 9, 9),
        pixels(0, 4),
        pixels(1, 200),
        3,
        str(tmp_path / "broken.png"),
        str(tmp_path / "none.png"),
    ]
    rows = [{"path": value, "label": "x"} for value in values]
    lines = reason(rows, read_images).split("\n")
    starts = [
        "some_rows:2: an array of float64, shape (9, 9), should be uint8, (height, width) or",
        "some_rows:3: an array of uint8, shape (2, 9, 9), should be",
        "some_rows:4: an empty image",
        "some_rows:5: 200 x 1 pixels: one side is over 100 times the other",
        "some_rows:6: should be a Pillow image, an array of uint8 or a path, not 3",
        f"some_rows:7: {tmp_path}/broken.png: not an image of a kind that is read",
        f"some_rows:8: {tmp_path}/none.png: no such file",
    ]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * len(starts)
    with in_memory(some_rows=rows) as names:
        left = read_images(names["some_rows"], options=FileOptions(bad_rows="skip"))
    assert [row.id for row in left] == ["1"]
    assert "7 of 8 rows left out" in left.notes[-1]


def test_labels_of_images_in_memory_are_checked():
    rows = [{"path": pixels(9, 9), "label": "x"}, {"path": pixels(9, 9), "label": ""}]
    assert reason(rows, read_images) == "some_rows:2: the label in 'label' is empty"
    with in_memory(some_rows=[{"path": pixels(9, 9)}]) as names:
        assert len(read_images(names["some_rows"], label="")) == 1
