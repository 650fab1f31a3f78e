"""Labels in the spellings that files have: one class where that is certain, else a warning or what would work."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.cases import Content, evaluation, predictions, run, settings_for, write_file

from data import DataError, Row, in_memory
from data.label_lists import parse_list_text
from data.label_spelling import canonical_label
from data.teacher import read_teacher
from engine.config import Config, ConfigError, DataSettings, override
from engine.tasks import TASKS, TaskSettings, TrainingData, read_training_data
from engine.validate import task_settings

CLASSES, SETS, SCORES = "text-classification", "multi-label-classification", "text-regression"
NFC, NFD = "caf\u00e9", "cafe\u0301"


def table(column: str, cells: list[str]) -> str:
    """Return a csv file with a text and a cell in each row."""
    stream = io.StringIO()
    csv.writer(stream).writerows([("text", column), *((f"meal {i}", cell) for i, cell in enumerate(cells))])
    return stream.getvalue()


def lines(column: str, cells: list[Any]) -> str:
    """Return a .jsonl file with a text and a cell in each row."""
    return "".join(json.dumps({"text": f"meal {i}", column: cell}) + "\n" for i, cell in enumerate(cells))


def read(task: str, folder: Path, train: Content, test: Content = "", **data: Any) -> TrainingData:
    """Read files as a run does, all rows of the training file also for validation."""
    suffix = ".jsonl" if isinstance(train, str) and train.startswith("{") else ".csv"
    train_file = str(write_file(folder / f"train{suffix}", train))
    test_suffix = ".jsonl" if isinstance(test, str) and test.startswith("{") else ".csv"
    test_file = str(write_file(folder / f"test{test_suffix}", test)) if test else ""
    settings = DataSettings(train=train_file, validation=train_file, test=test_file, **data)
    found = read_training_data(TASKS[task], TaskSettings(TASKS[task].columns.fill(settings)), 0)
    # Without what is said about duplicates, and about a training file that is the validation file too.
    notes = [note.removeprefix(f"{folder}/") for note in found.notes if note.startswith(f"{folder}/")]
    return found._replace(notes=notes)


def refusal(task: str, folder: Path, train: Content, test: Content = "", **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(task, folder, train, test, **data)
    return str(caught.value).replace(f"{folder}/", "")


def names(rows: list[Row], column: str = "label") -> list[Any]:
    return [row.values[column] for row in rows]


# One class or several


@pytest.mark.parametrize(
    ("cells", "classes", "note"),
    [
        ([1, 1.0, "1", 0], ["0", "1"], "'1.0' (1, first in line 2) is read as the label '1'"),
        ([True, "True", "TRUE", False], ["false", "true"], "'True' (1, first in line 2) is read as the label 'true'"),
        ([NFC, NFC, NFD, "tea"], [NFC, "tea"], f"{NFD!a} (1, first in line 3) is read as the label {NFC!a}"),
        (["a", "a", "\ufeffa", "b"], ["a", "b"], r"'\ufeffa' (1, first in line 3) is read as the label 'a'"),
        (["a", "\u00a0a ", "b"], ["a", "b"], r"'\xa0a ' (1, first in line 2) is read as the label 'a'"),
        (["New York", "New York", "New\u00a0 York", "b"], ["New York", "b"], r"'New\xa0 York' (1, first in line 3)"),
        (["a", "a", '"a"', "b"], ["a", "b"], "'\"a\"' (1, first in line 3) is read as the label 'a'"),
        (["zero\u200bwidth", "zerowidth", "zerowidth", "b"], ["b", "zerowidth"], "is read as the label 'zerowidth'"),
    ],
)
def test_spellings_that_certainly_mean_one_class(tmp_path, cells, classes, note):
    found = read(CLASSES, tmp_path, lines("label", cells))
    assert found.labels == classes
    assert len(found.notes) == 1
    assert note in found.notes[0]
    assert set(names(found.train)) == set(classes)


@pytest.mark.parametrize(
    ("cells", "warning"),
    [
        (["Good", "Good", "good", "bad"], "the classes 'Good' (2) and 'good' (1) differ in case only"),
        (
            ["ＡＢ", "AB", "b"],
            "the classes 'AB' (1) and 'ＡＢ' (1) differ in the width or form of their characters only",
        ),
        (["01", "1", "0"], "the classes '01' (1) and '1' (1) are the same number"),
        (["very_good", "very good", "b"], "the classes 'very good' (1) and 'very_good' (1) differ in case, spaces"),
        (["n/a", "NaN", "b"], "'NaN' (1), 'n/a' (1) is read as a class, but looks like a missing label"),
        (["Label", "b", "b"], "the class 'Label' (1) is the name of its column"),
        (["a,b", "a", "b"], "1 of 3 classes are several labels, such as 'a,b': run.task = \"multi-label"),
        ([f"meal number {i}" for i in range(30)], "column 'label' has 30 classes in 30 rows: data.label_column may"),
        (
            [f"{i / 8}" for i in range(30)] * 2,
            "column 'label' has 30 classes in 60 rows, all numbers: run.task = \"text-regression\"",
        ),
        (["A", "A-", "C", "C++", "very good", "-1", "1"], ""),
        (["Paris, France", "Lyon, France", "b"], ""),
    ],
)
def test_classes_that_look_wrong_are_warned_of(tmp_path, cells, warning):
    notes = read(CLASSES, tmp_path, table("label", cells)).notes
    assert len(notes) == bool(warning)
    assert not warning or f"train.csv: warning: {warning}" in notes[0]


def test_one_comparison_serves_every_place(tmp_path):
    """Labels declared, in a test file of another format, of a teacher, and in the file with the names of a model."""
    train = lines("label", [True, False, True])
    found = read(CLASSES, tmp_path, train, table("label", ["True", "FALSE"]), labels=("TRUE", "FALSE"))
    assert (found.labels, names(found.train), names(found.test)) == (
        ["TRUE", "FALSE"],
        ["TRUE", "FALSE", "TRUE"],
        ["TRUE", "FALSE"],
    )
    teacher = write_file(tmp_path / "teacher.jsonl", '{"id": "1", "logits": {"1.0": 2.5, "0": -1}}\n')
    assert read_teacher(str(teacher), ["1"], ["0", "1"]).tolist() == [[-1, 2.5]]
    assert canonical_label(1.0) == canonical_label("1") == canonical_label(1)
    assert len({canonical_label(name) for name in ("1", "01", "Good", "good", "1.10", "1.1", "A", "Ａ")}) == 8


def test_rows_with_unknown_labels_can_be_left_out(tmp_path):
    test = table("label", ["a", "-", "b", "-", "c"])
    with pytest.raises(DataError, match=r"unknown label '-' in 2 rows(.|\n)*\(data.bad_rows = \"skip\" leaves such"):
        read(CLASSES, tmp_path, table("label", ["a", "b"]), test)
    found = read(CLASSES, tmp_path, table("label", ["a", "b"]), test, bad_rows="skip")
    assert (names(found.test), found.labels) == (["a", "b"], ["a", "b"])
    assert any(
        note.endswith("3 of 5 rows left out, whose labels are unknown: '-' (2), 'c' (1)") for note in found.notes
    )
    none_known = table("label", ["x", "y"])
    assert "unknown label" in refusal(CLASSES, tmp_path, table("label", ["a", "b"]), none_known, bad_rows="skip")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", "b"], ["A"], "unknown label 'A'; the labels are 'a', 'b'; 'A' and 'a' differ in case only"),
        (
            ["01", "2"],
            ["1", "1"],
            "unknown label '1' in 2 rows; the labels are '01', '2'; '1' and '01' are the same num",
        ),
        (
            ["0", "1"],
            ["-1", "-1"],
            "unknown label '-1' in 2 rows; the labels are '0', '1'; -1 is often written where there",
        ),
        (["a", "b"], ["a, b"], """a label with a comma has quotes: data.labels = '["a, b", ...]'"""),
        (["neg", "pos"], ["1", "2"], "numbers are read as indices of the names if all are from 0 to 1"),
        (["a", "b"], ["p", "q", "r", "s", "p"], "test.csv:2: none of the labels is known: 'p' (2), 'q' (1), 'r' (1)"),
        ([f"c{i}" for i in range(1500)], ["x"], "'c0', 'c1', 'c10', 'c100', "),
    ],
)
def test_an_unknown_label_is_told_from_those_it_looks_like(tmp_path, train, test, message):
    error = refusal(CLASSES, tmp_path, table("label", train), table("label", test))
    assert message in error
    assert len(error) < 600


def test_whole_numbers_are_places_among_the_names(tmp_path):
    found = read(CLASSES, tmp_path, lines("label", [0, 1, 1]), table("label", ["1.0", "0"]), labels=("neg", "pos"))
    assert (names(found.train), names(found.test)) == (["neg", "pos", "pos"], ["pos", "neg"])
    assert found.notes == [
        "train.jsonl: the labels are whole numbers, read as indices of the label names, from 0: 0 is 'neg' (1), "
        "1 is 'pos' (2)",
        "test.csv: the labels are whole numbers, read as indices of the label names, from 0: 0 is 'neg' (1), "
        "1.0 is 'pos' (1)",
    ]
    assert names(read(CLASSES, tmp_path, lines("label", [5, 7]), labels=("7", "5")).train) == ["5", "7"]
    for cells in ([1, 2], [0, "neg"], [0, -1]):  # from 1, mixed, a sign
        assert "unknown label" in refusal(CLASSES, tmp_path, lines("label", cells), labels=("neg", "pos"))
    assert "unknown label '1'" in refusal(CLASSES, tmp_path, lines("label", [0, 1]), labels=("10", "20"))


def test_a_list_as_text_is_no_class(tmp_path):
    error = refusal(CLASSES, tmp_path, table("label", ["['a']", "[]", "[NOISE]", "a"]))
    assert error.split("\n")[:2] == [
        f"train.csv:{line}: a label should be one class, not a list as text, {cell!r}; "
        'run.task = "multi-label-classification" reads lists'
        for line, cell in ((2, "['a']"), (3, "[]"))
    ]
    found = read(CLASSES, tmp_path, table("label", ["['a']", "[NOISE]", "a", "a"]), bad_rows="skip")
    assert found.labels == ["[NOISE]", "a"]


def test_a_model_reads_the_labels_of_a_file_as_in_training(tmp_path, capsys):
    settings = settings_for(CLASSES, tmp_path, table("label", ["True", "False", "True", "False"] * 2), "train.csv")
    run(settings, capsys)
    other = write_file(tmp_path / "test.jsonl", lines("label", [True, False]))
    assert evaluation(settings["run.folder"], other)["examples"] == 2
    assert "'true' (1, first in line 1) is read as the label 'True'" in capsys.readouterr().out
    assert {row["label"] for row in predictions(settings["run.folder"], other)} <= {"True", "False"}
    assert (
        evaluation(settings["run.folder"], write_file(tmp_path / "places.csv", table("label", ["1"])))["examples"] == 1
    )
    assert "1 is 'True' (1)" in capsys.readouterr().out


# Several labels


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a"]', ["a"]),
        ("[]", []),
        ("{'a','b'}", ["a", "b"]),
        ("('a',)", ["a"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("[a, b c]", ["a", "b c"]),
        ('{a,"b, c"}', ["a", "b, c"]),
        ('["it\'s", "b"]', ["it's", "b"]),
        ("[0, 1]", [0, 1]),
        ("[0. 1. 0.]", ["0.", "1.", "0."]),
        ("set()", []),
        ("{'a': 1, 'b': 0}", {"a": 1, "b": 0}),
        ("(a, b)", None),
        ("['a', b'c'", None),
        ("a", None),
        ("", None),
    ],
)
def test_lists_as_programs_write_them(text, items):
    found = parse_list_text(text)
    assert sorted(found) == sorted(items) if isinstance(found, list) and text[0] == "{" else found == items


@pytest.mark.parametrize(
    ("cells", "labels", "note"),
    [
        (["['a', 'b']", "['a']", "[]"], [["a", "b"], ["a"], []], "has 3 lists as text, read as such, first in line 2"),
        (
            ["gut，schnell", "gut、langsam", "gut；langsam"],
            [["gut", "schnell"], ["gut", "langsam"]],
            "every row has the",
        ),
        (["a,,b", "b;", "c"], [["a", "b"], ["b"], ["c"]], "has 2 cells with an empty label, which is left out"),
        (["a,b,a", "b", "c"], [["a", "b"], ["b"], ["c"]], "has 1 cell with a label twice, which counts once"),
        (["{'a': 1, 'b': 0}", "b"], [["a"], ["b"]], "has 1 list as text, read as such, first in line 2"),
        (["good, Good", "b"], [["good", "Good"], ["b"]], "the classes 'Good' (1) and 'good' (1) differ in case only"),
        (["True,b", "true", "true"], [["true", "b"], ["true"]], "'True' (1, first in line 2) is read as the label"),
        (["on/off", "on", "off"], [["on/off"], ["on"]], "1 of 3 labels contain '/', such as 'on/off': data."),
        (["a|b", "c|d"], [["a|b"], ["c|d"]], "labels contain '|', such as 'a|b': data.label_separator = \"|\" would"),
    ],
)
def test_cells_with_several_labels(tmp_path, cells, labels, note):
    found = read(SETS, tmp_path, table("labels", cells))
    assert names(found.train, "labels")[: len(labels)] == labels
    assert note in "\n".join(found.notes)


@pytest.mark.parametrize(
    ("separator", "cells"),
    [("|", ["a|b", "a", "a|c"]), ("\t", ["a\tb", "a", "b"]), (r"\t", ["a\tb", "a", "b"]), (" ", ["a  b", "a", "c"])],
)
def test_a_separator_of_ones_own(tmp_path, separator, cells):
    text = table("labels", cells)
    if separator != " ":
        shown = "|" if separator == "|" else r"\t"
        assert f'data.label_separator = "{shown}" splits them' in refusal(SETS, tmp_path, text)
        assert read(SETS, tmp_path, text, label_separator=",").labels == sorted(cells, key=lambda cell: cell.strip())
    assert names(read(SETS, tmp_path, text, label_separator=separator).train, "labels")[0] == ["a", "b"]
    settings = {"run.task": CLASSES, "data.train": "x", "data.label_separator": separator}
    with pytest.raises(ConfigError, match="has no effect on text-classification"):
        task_settings(override(Config(), settings), TASKS[CLASSES])


def test_rows_of_zeros_and_ones_need_names(tmp_path):
    for cells in (["[0, 1, 1]", "[1, 0, 0]"], ["0 1 1", "1 0 0"], ["0,1,1", "1,0,0"]):
        text = table("labels", cells)
        assert "data.labels should name the 3 labels" in refusal(SETS, tmp_path, text)
        found = read(SETS, tmp_path, text, labels=("x", "y", "z"))
        assert names(found.train, "labels") == [["y", "z"], ["x"]]
        assert "has 3 numbers 0 and 1 in each row" in found.notes[-1]
        assert "one for each of the 2 labels" in refusal(SETS, tmp_path, text, labels=("x", "y"))
    found = read(SETS, tmp_path, lines("labels", [[0, 2], [1], []]), labels=("x", "y", "z"))  # places
    assert names(found.train, "labels") == [["x", "z"], ["y"], []]


@pytest.mark.parametrize(
    ("cells", "labels", "hint"),
    [
        (["a|b", "a"], ("a", "b"), "unknown label 'a|b'; the labels are 'a', 'b'; data.label_separator = \"|\" splits"),
        (["a b", "a"], ("a", "b"), 'data.label_separator = " " splits it'),
        ([[{"label": "a"}, {"label": "b"}]], (), 'data.label_column = "labels.label" reads them'),
        ([[{"id": 3, "name": "a"}]], (), 'data.label_column = "labels.name" reads them'),
    ],
)
def test_a_refused_cell_names_the_setting_that_reads_it(tmp_path, cells, labels, hint):
    assert hint in refusal(SETS, tmp_path, lines("labels", cells), labels=labels)
    setting, _, value = hint[hint.index("data.") :].partition(" = ")
    data = {setting.removeprefix("data."): value.split('"')[1]}
    found = read(SETS, tmp_path, lines("labels", cells), labels=labels, **data)
    assert names(found.train, data.get("label_column", "labels"))[0][-1:] == ["b" if len(cells[0]) > 1 else "a"]


def test_items_of_lists_that_are_several_labels(tmp_path):
    cells = [["a,b"], ["a"], ["b"]]
    assert "as 'a,b': data.label_separator = \",\" would split" in read(SETS, tmp_path, lines("labels", cells)).notes[0]
    found = read(SETS, tmp_path, lines("labels", cells), label_separator=",")
    assert (names(found.train, "labels"), found.notes) == ([["a", "b"], ["a"], ["b"]], [])
    cells = [["a|b", 1], ["a"], ["b"]]
    found = read(SETS, tmp_path, lines("labels", cells), label_separator="|")
    assert names(found.train, "labels") == [["a", "b", "1"], ["a"], ["b"]]


def test_one_column_for_each_label(tmp_path):
    rows = [{"text": f"meal {i}", "salty": i % 2, "sweet": i > 1, "id": i} for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert 'data.labels = "salty,sweet" reads a column of 0 and 1 for each label' in refusal(SETS, tmp_path, text)
    found = read(SETS, tmp_path, text, labels=("sweet", "salty"))
    assert names(found.train, "labels") == [[], ["salty"], ["sweet"], ["sweet", "salty"]]
    assert found.notes[0].endswith("no column 'labels'; the labels are read from the columns 'sweet', 'salty'")
    as_csv = "text,salty,sweet\nx,-1,0\ny,1.0,False\n"
    assert "column 'salty' should be 0 or 1, as it is a label of data.labels; this is '-1'" in refusal(
        SETS, tmp_path, as_csv, labels=("salty", "sweet")
    )
    found = read(SETS, tmp_path, as_csv, labels=("salty", "sweet"), bad_rows="skip")
    assert names(found.train, "labels") == [["salty"]]
    settings = TaskSettings(TASKS[SETS].columns.fill(DataSettings(labels=("salty", "sweet"))))
    assert TASKS[SETS].read(str(write_file(tmp_path / "new.csv", as_csv)), settings, False).notes == []
    error = refusal(SETS, tmp_path, "text,Salty,Sweet\nx,1,0\n", labels=("salty", "sweet"))
    assert error.endswith('(data.labels = "Salty,Sweet" reads a column of 0 and 1 for each label)')
    assert "no column 'labels'" in refusal(SETS, tmp_path, as_csv, labels=("salty", "bitter"))


# Scores


@pytest.mark.parametrize(
    ("cells", "scores"),
    [
        (["4,5", "3"], [4.5, 3]),
        (["1.234,5", "1,500"], [1234.5, 1.5]),
        (["1,234.5", "1,500", "1,234,567"], [1234.5, 1500, 1234567]),
        (["1 500", "1\u00a0500,5", "2'000"], [1500, 1500.5, 2000]),
        (["\u22121", '"2.5"', "\ufeff3"], [-1, 2.5, 3]),
        (["0,500", ",5"], [0.5, 0.5]),
    ],
)
def test_numbers_with_separators_are_scores(tmp_path, cells, scores):
    assert names(read(SCORES, tmp_path, table("score", cells)).train, "score") == scores


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["1,500", "2,250"],
            "'1,500' in 'score' is unclear: its comma or point may be decimal or stand between thousands",
        ),
        (["2,5", "1.500"], "'1.500' in 'score' is unclear"),
        (["2,5", "1,500.5", "1,500"], "'1,500' in 'score' is unclear"),
        (["4/5", "1"], "not '4/5'; write the number alone, without % or /"),
        (["85%", "1"], "without % or /"),
        (["n/a", "1"], "not 'n/a'; the score is missing"),
        ([True, 1], 'not True; run.task = "text-classification" learns true and false'),
    ],
)
def test_scores_that_are_not_certain_are_refused(tmp_path, cells, message):
    content = table("score", cells) if isinstance(cells[0], str) else lines("score", cells)
    assert message in refusal(SCORES, tmp_path, content)
    if len(cells) == 2 and "unclear" not in message:
        assert names(read(SCORES, tmp_path, content, bad_rows="skip").train, "score") == [1]


def test_labels_of_rows_in_memory(tmp_path):
    with in_memory(rows=[{"text": "x", "label": True}, {"text": "y", "label": "False"}]) as given:
        settings = DataSettings(train=given["rows"], validation=given["rows"])
        found = read_training_data(TASKS[CLASSES], TaskSettings(TASKS[CLASSES].columns.fill(settings)), 0)
    assert found.labels == ["False", "true"]


def test_the_class_for_no_relation_is_no_missing_label(tmp_path):
    pair = {"text": "Ada met Bob", "subject": "Ada", "object": "Bob"}
    path = str(write_file(tmp_path / "train.jsonl", [pair | {"relation": name} for name in ("met", "NA")]))
    task = TASKS["relation-extraction"]
    for no_relation in ("no_relation", "NA"):
        values = {"run.task": "relation-extraction", "data.train": path, "data.validation": path}
        config = override(Config(), values | {"relation_extraction.no_relation_label": no_relation})
        notes = "\n".join(read_training_data(task, task_settings(config, task), 0).notes)
        assert ("looks like a missing label" in notes) == (no_relation != "NA")
