"""Questions with choices: the forms of public data sets, labels in every spelling, and what is wrong with a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from data import DataError, Rows, in_memory
from data.formats.choices import find_right_choice, read_choice_list, read_choices
from data.formats.options import FileOptions

OTHERS = ["a cat", "a dog"]
FORMS = {  # name of the file -> (its content, context, question, choices, label)
    "swag.csv": (
        [{"sent1": "He opens it.", "sent2": "He", "ending0": "sits.", "ending1": "eats.", "ending2": "", "label": "1"}],
        ("He opens it.", "He", ["sits.", "eats."], 1),
    ),
    "hellaswag.jsonl": (
        {"ind": 4, "ctx_a": "A man sits.", "ctx_b": "then he", "endings": ["stands.", "eats."], "label": "0"},
        ("A man sits.", "then he", ["stands.", "eats."], 0),
    ),
    "race.jsonl": (
        {"example_id": "high1", "article": "Long.", "question": "It is _ .", "options": OTHERS, "answer": "B"},
        ("Long.", "It is _ .", OTHERS, 1),
    ),
    "csqa.jsonl": (
        {"question": "What barks?", "choices": {"label": ["A", "B"], "text": OTHERS}, "answerKey": "B"},
        ("", "What barks?", OTHERS, 1),
    ),
    "arc.jsonl": (
        {
            "question": {
                "stem": "What barks?",
                "choices": [{"label": "1", "text": "a cat"}, {"label": "2", "text": "a dog"}],
            },
            "answerKey": "2",
        },
        ("", "What barks?", OTHERS, 1),
    ),
    "openbook.jsonl": (
        {"question_stem": "It barks:", "choices": {"text": OTHERS, "label": ["A", "B"]}, "answerKey": "A"},
        ("", "It barks:", OTHERS, 0),
    ),
    "plain.jsonl": (
        {"context": "It barks.", "question": "What is it?", "choices": OTHERS, "label": 1},
        ("It barks.", "What is it?", OTHERS, 1),
    ),
    "list.csv": (
        [{"context": "It barks.", "question": "What?", "choices": "['a cat', 'a dog']", "label": "a dog"}],
        ("It barks.", "What?", OTHERS, 1),
    ),
    "keys.jsonl": (
        {"question": "What barks?", "options": {"A": "a cat", "B": "a dog"}, "answer": "B"},
        ("", "What barks?", OTHERS, 1),
    ),
}


def write(path: Path, content: object) -> Path:
    if isinstance(content, list) and path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, content[0].keys())
            writer.writeheader()
            writer.writerows(content)
    elif isinstance(content, list) and path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content) + "\n")
    return path


def read(path: Path | str, **options: object) -> Rows:
    return read_choices(str(path), **options)


@pytest.mark.parametrize("name", FORMS)
def test_rows_of_public_data_sets(tmp_path, name):
    content, (context, question, choices, label) = FORMS[name]
    path = write(tmp_path / name, content)
    expected = {"context": context, "question": question, "choices": choices}
    assert read(path)[0].values == expected | {"label": label}
    assert read(path, label="")[0].values == expected
    rows = content if isinstance(content, list) else [content]
    with in_memory(rows=[dict(row) for row in rows]) as names:
        assert read(names["rows"])[0].values == expected | {"label": label}


RACE = {
    "article": "Long.",
    "questions": ["What?", "It is _ ."],
    "options": [OTHERS, ["x", "y", "z"]],
    "answers": ["A", "C"],
}
OF_RACE = [("Long.", "What?", OTHERS, 0), ("Long.", "It is _ .", ["x", "y", "z"], 2)]
C3 = [
    [["女：你好。", "男：好。"], [{"question": "谁？", "choice": ["女", "男"], "answer": "男"}], "1-7"],
    [["书很好。"], [{"question": "什么好？", "choice": ["书", "人"], "answer": "书"}] * 2, "1-8"],
]


def test_a_folder_of_race(tmp_path):
    for name in ("high/2.txt", "middle/1.txt"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, RACE)
    rows = read(tmp_path)
    assert [row.id for row in rows] == ["high/2.txt-1", "high/2.txt-2", "middle/1.txt-1", "middle/1.txt-2"]
    assert [tuple(row.values.values()) for row in rows] == OF_RACE * 2
    assert len({row.line for row in rows}) == 4
    assert [tuple(row.values.values()) for row in read(tmp_path / "high/2.txt")] == OF_RACE
    (tmp_path / "high/2.txt").write_text('{"article"')
    with pytest.raises(DataError, match=r"2\.txt: the file: .*not JSON"):
        read(tmp_path)
    assert len(read(tmp_path, options=FileOptions(bad_rows="skip"))) == 2
    for name in ("high", "middle"):
        (tmp_path / name).rename(tmp_path / {"high": "dev", "middle": "train"}[name])
    with pytest.raises(DataError, match="it has the splits dev, train; name one of these folders"):
        read(tmp_path)


def test_lines_with_several_questions(tmp_path):
    others = [{"answers": ["A"]}, {"answers": ["A", "D"]}, {"options": 5}, {"questions": []}]
    path = write(tmp_path / "race.jsonl", [RACE, *(RACE | changes for changes in others)])
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).split("\n") == [
        f"{path}: line 2: 2 questions, and answers is no list of that length",
        f"{path}: line 3, question 2: label 'D' is none of the 3 choices, A to C",
        f"{path}: line 4: 2 questions, and options is no list of that length",
        f"{path}: line 5: 0 questions, and options is no list of that length",
    ]
    rows = read(path, options=FileOptions(bad_rows="skip"))
    assert [row.id for row in rows] == ["1-1", "1-2", "3-1"]
    assert [row.id for row in rows.left_out] == ["2", "3-2", "4", "5"]


@pytest.mark.parametrize("indent", [None, 1])
def test_the_lists_of_c3(tmp_path, indent):
    path = tmp_path / "c3.json"
    path.write_text(json.dumps(C3, ensure_ascii=False, indent=indent), encoding="utf-8")
    rows = read(path, group="same_context")
    assert [row.id for row in rows] == ["1-7-1", "1-8-1", "1-8-2"]
    assert rows[0].values["context"] == rows[0].values["same_context"] == "女：你好。\n男：好。"
    assert [row.values["label"] for row in rows] == [1, 0, 0]
    assert "3 rows have the text of the right choice as label" in rows.notes
    path.write_text(json.dumps([C3[0], [["text"]]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"c3\.json: text 2: should be \[lines of a text, questions, id\]"):
        read(path)


GOOD = {"context": "c", "question": "q", "choices": ["x", "y", "z"], "label": 0}
FAULTS = [
    (
        {"label": 3},
        "label 3 is none of the 3 choices, numbered from 0 to 2; multiple_choice.first_label = 1 counts from",
    ),
    ({"label": 4}, "label 4 is none of the 3 choices, numbered from 0 to 2"),
    ({"label": -1}, "-1 marks rows without a label, as in SWAG's test file"),
    ({"label": "E"}, "label 'E' is none of the 3 choices, A to C"),
    ({"label": None}, "no label: null"),
    ({"label": "w w"}, "label 'w w' is none of the 3 choices, nor a number or a letter"),
    ({"label": True}, "no label: true"),
    ({"choices": ["x", " ", "z"]}, "choice 2 of 3 is empty"),
    ({"choices": ["x"]}, "one choice; a row needs two or more"),
    ({"choices": []}, "no choices; a row needs two or more"),
    ({"choices": ["x", "x", "x"]}, "all 3 choices are equal"),
    ({"choices": ["x", "y", "x"]}, "the right choice, 'x', is there twice"),
    ({"choices": "x or y"}, "'choices' should be a list of choices, not 'x or y'"),
    ({"choices": ["x", ["y"]]}, r"a choice in 'choices' should be text, not ['y']"),
    ({"choices": {"label": ["A"], "text": ["x", "y"]}}, "'choices' has 2 texts and 1 labels"),
    ({"choices": {"label": ["A", "B"], "text": ["x", "y"]}, "label": "C"}, "label 'C' is none of the 2 choices, A, B"),
    ({"choices": {"label": 5, "text": ["x", "y"]}}, "the labels in 'choices' should be a list, not 5"),
    ({"choices": [{"label": "A", "text": "x"}, {"label": "A", "text": "y"}], "label": "A"}, "is the key of 2 choices"),
    ({"label": "9" * 5000}, "is none of the 3 choices, nor a number or a letter"),
    ({"context": "", "question": " "}, "'question' is empty"),
    ({"context": 5}, "'context' should be text, not 5"),
    ({"choices": ["B", "A"], "label": "A"}, "label 'A' is the letter of one choice and the text of another"),
]


def test_f13_all_faults_of_a_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.errors.ErrorList.SHOWN", 99)
    monkeypatch.setattr("data.errors.ErrorList.SHOWN_OF_KIND", 99)
    path = write(tmp_path / "a.jsonl", [GOOD, *(GOOD | changes for changes, _ in FAULTS)])
    with pytest.raises(DataError) as error:
        read(path)
    found = str(error.value).split("\n")
    assert len(found) == len(FAULTS)
    for i, (message, (_, reason)) in enumerate(zip(found, FAULTS, strict=True), start=2):
        assert message.startswith(f"{path}:{i}: ")
        assert reason in message
    rows = read(path, options=FileOptions(bad_rows="skip"))
    assert [row.id for row in rows] == ["1"]
    assert len(rows.left_out) == len(FAULTS)


def test_notes_count_what_was_guessed(tmp_path):
    rows = [GOOD, GOOD | {"choices": ["x", "y", "y"]}, GOOD | {"question": "is _ ?"}, GOOD | {"label": "y"}]
    assert read(write(tmp_path / "a.jsonl", rows)).notes == [
        "1 row has two equal choices, both wrong",
        "1 row has the text of the right choice as label",
        "1 row has a blank, _, in the question, where each choice is read",
    ]
    content, _ = FORMS["swag.csv"]
    assert read(write(tmp_path / "swag.csv", content)).notes == [
        "read by the names of its columns: the context in 'sent1', the question in 'sent2', "
        "the choices in 'ending0' to 'ending2'",
        "1 row has fewer choices than columns: the last ones are empty",
    ]


def test_columns_that_a_file_lacks(tmp_path):
    row = {"story": "c", "q": "q", "right": "x", "wrong": "y", "label": 1}
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(
        DataError, match=r"no column 'choices'; the columns are .*; multiple_choice\.choice_columns names"
    ):
        read(path)
    choices = ("right", "wrong")
    with pytest.raises(DataError, match=r"no column 'question'.*the columns are"):
        read(path, choices=choices)
    with pytest.raises(DataError, match=r"no column 'tale'"):
        read(path, choices=choices, context="tale", question="q")
    with pytest.raises(DataError, match=r"no column 'gold'"):
        read(path, choices=choices, context="story", label="gold")
    expected = {"story": "c", "q": "q", "choices": ["x", "y"], "label": 0}
    assert read(path, choices=choices, context="story", question="q", first_label=1)[0].values == expected


@pytest.mark.parametrize(
    ("value", "keys", "expected"),
    [(1, [], 1), ("1", [], 1), (1.0, [], 1), ("b", [], 1), (" B ", [], 1), ("two", [], 1), ("2", ["1", "2", "3"], 1)],
)
def test_the_right_choice_in_every_spelling(value, keys, expected):
    assert find_right_choice(value, ["one", "two", "three"], keys, 0)[0] == expected


def test_numbers_are_choices_too():
    assert read_choice_list([3, 4.5, "x"], "choices") == (["3", "4.5", "x"], [])
    assert find_right_choice(1, ["1", "2"], [], 0) == (1, False)  # a number is a place, not a text
