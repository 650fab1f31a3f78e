"""engine.predict --keep: predictions carry columns of their rows, whatever the format and the windows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from support.runs import run_training, tiny_config, write_reviews

from data.table_writing import find_kinds, flatten
from engine import predict
from engine.config import ConfigError, DataSettings, ImageClassificationSettings, TokenClassificationSettings
from engine.kept_columns import as_plain, find_columns, keep
from engine.tasks import TASKS, TaskSettings, read_file

KEPT = {"text", "label", "meta.year", "absent"}


@pytest.fixture(scope="module")
def run(checkpoint_folder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("kept") / "run"
    run_training(tiny_config(checkpoint_folder, reviews, folder, {"train.max_steps": 1, "eval.every_steps": 1}))
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """12 rows, one without a text; one has a column that the others lack."""
    file = write_reviews(tmp_path_factory.mktemp("rows") / "in.jsonl", 12)
    found = [json.loads(line) | {"meta": {"year": 2000 + i}} for i, line in enumerate(file.read_text().splitlines())]
    found[3]["text"] = ""
    found[7]["label"] = "a, \"b\"\n'c'"
    found[9]["absent"] = [1, {"x": None}]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file, found


def predicted(run: str, source: Path, output: Path, *more: str) -> Path:
    command = [run, "--input", str(source), "--output", str(output), "--run.device=cpu", *more]
    assert predict.main(command) == 0
    return output


def test_each_prediction_has_the_columns_of_its_row(run, rows, tmp_path, capsys):
    """The right label stands beside the predicted one, and predictions are those without --keep."""
    file, source = rows
    names = "text, label,meta.year,absent,label"
    kept = predicted(run, file, tmp_path / "kept.jsonl", "--keep", names)
    printed = capsys.readouterr().out
    plain = predicted(run, file, tmp_path / "plain.jsonl")
    assert "columns that are not read" not in printed
    assert "columns that are not read: 'meta', 'absent'" in capsys.readouterr().out
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for line, row, other in zip(lines, source, plain.read_text().splitlines(), strict=True):
        assert list(line)[:3] == ["id", "input", "label"]
        values = line.pop("input")
        assert line == json.loads(other)
        expected = {"text": row["text"], "label": row["label"], "meta.year": row["meta"]["year"]}
        expected["absent"] = row.get("absent")
        assert values == (expected if row["text"] else dict.fromkeys(KEPT))


def test_tables_and_windows_have_the_same_values(run, rows, tmp_path):
    file, source = rows
    options = ("--keep=text,label,meta.year", "--window=5")
    whole = predicted(run, file, tmp_path / "a.csv", options[0]).read_bytes()
    assert predicted(run, file, tmp_path / "b.csv", *options).read_text().count("input.label") == 1
    with (tmp_path / "b.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [row["input.label"] for row in found] == [row["label"] if row["text"] else "" for row in source]
    assert [row["input.text"] for row in found] == [row["text"] for row in source]
    assert whole.splitlines()[0] == (tmp_path / "b.csv").read_bytes().splitlines()[0]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--keep=lable"],
            "has no column 'lable'; did you mean 'label'?; its columns are 'id', 'text', 'label', 'meta'",
        ),
        (["--keep=text,"], "--keep = 'text,' should be columns with commas between them, as in --keep text,label"),
        (["--keep=text", "--embeddings", "--output=x.npy"], ".npy files of vectors have no more columns"),
    ],
)
def test_a_mistake_is_one_sentence(run, rows, tmp_path, monkeypatch, more, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "load_trained", lambda *_: pytest.fail("the model was loaded before"))
    output = [] if "--output=x.npy" in more else ["--output=x.jsonl"]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        predict.main([run, "--input", str(rows[0]), *output, "--run.device=cpu", *more])
    assert not any(tmp_path.iterdir())


def test_an_interrupted_command_with_other_columns_is_refused(run, rows, tmp_path, monkeypatch):
    """What is kept is part of what the predictions are made of; the same command continues to the same bytes."""
    output, command = tmp_path / "out.jsonl", ("--keep=label", "--window=5")
    expected = predicted(run, rows[0], tmp_path / "whole.jsonl", *command).read_bytes()
    with monkeypatch.context() as patch:
        calls = iter([None, None])
        original = predict.with_left_out
        patch.setattr(predict, "with_left_out", lambda *arguments: (next(calls), original(*arguments))[1])
        with pytest.raises((StopIteration, RuntimeError)):
            predicted(run, rows[0], output, *command)
    with pytest.raises(ConfigError, match=r"differ in --keep = 'label', not 'text'"):
        predicted(run, rows[0], output, "--keep=text", "--window=5")
    assert predicted(run, rows[0], output, *command).read_bytes() == expected


def test_labels_can_be_kept_where_columns_have_no_names(tmp_path):
    """The tags of words a line have the name of data.label_column, and so have the folders of images."""
    (tmp_path / "a.conll").write_text("Ulm B-PLACE\n. O\n\nAnna O\n")
    (tmp_path / "a.txt").write_text("Ulm/B-PLACE ./O\nAnna/O\n")
    own = TokenClassificationSettings()
    for name, format in (("a.conll", "auto"), ("a.txt", "word/tag")):
        data = DataSettings(format=format, text_column="tokens", label_column="ner")
        rows = read_file(TASKS["token-classification"], str(tmp_path / name), TaskSettings(data, own), False)
        assert not any("ner" in row.values for row in rows)
        settings = TaskSettings(data, own, kept=("ner",))
        rows = read_file(TASKS["token-classification"], str(tmp_path / name), settings, False)
        assert [row.values["ner"] for row in rows] == [["B-PLACE", "O"], ["O"]]
        assert [*find_columns(name, rows, ["ner"])] == ["tokens", "ner"]
    (tmp_path / "images/red").mkdir(parents=True)
    for path in ("images/red/1.png", "images/2.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / path)
    data = DataSettings(text_column="path", label_column="class")
    settings = TaskSettings(data, ImageClassificationSettings(), kept=("class",))
    rows = read_file(TASKS["image-classification"], str(tmp_path / "images"), settings, False)
    assert {row.id: row.values["class"] for row in rows} == {"2.png": None, "red/1.png": "red"}
    assert [*find_columns("images", rows, ["class"])] == ["path", "class"]


def test_what_is_kept_is_as_in_the_file(tmp_path):
    """Also where the reader splits a text into words, or takes off the reply that is to be predicted."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Ulm  is", "messages": messages}) + "\n")
    for task, column, own in (
        ("token-classification", "text", TokenClassificationSettings()),
        ("dialogue", "messages", None),
    ):
        settings = TaskSettings(DataSettings(text_column=column), own, kept=(column,))
        (row,) = read_file(TASKS[task], str(tmp_path / "a.jsonl"), settings, False)
        expected = {"text": "Ulm  is", "messages": messages}[column]
        assert keep({"id": row.id}, row.values, [column])["input"] == {column: expected} != {column: row.values[column]}
        assert not any(name.startswith("<") for name in find_columns("a.jsonl", [row], [column]))


def test_a_missing_object_makes_no_column_of_its_own():
    rows = [{"meta": {"year": {"a": 1}}, "x": None}, {"meta": None}, {"meta": {"year": None}}]
    assert find_kinds(map(flatten, rows)) == {"meta.year.a": "int", "x": "", "reason": ""}
    assert find_kinds(map(flatten, [*rows, {"meta": "none"}])).keys() == {"meta", "meta.year.a", "x", "reason"}


def test_values_are_as_json_can_have_them():
    from datetime import date

    assert as_plain({1: (date(2026, 1, 2), Path("a/b.png")), "x": None}) == {"1": ["2026-01-02", "a/b.png"], "x": None}
    with pytest.raises(TypeError):
        as_plain({"bytes": b"\x89PNG"})
    assert keep({"id": "1", "label": "a"}, {"label": "b"}, ()) == {"id": "1", "label": "a"}
