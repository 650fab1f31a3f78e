"""engine.new: the recipes that it writes can be trained on, for every task; what is guessed, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.task_data import write

from data import Row, read_rows
from data.formats.options import FileOptions
from engine import commands, new, new_choices, train
from engine.config import ConfigError, read_recipe
from engine.errors import USER_ERRORS
from engine.new_columns import describe_columns, guess_columns, is_id
from engine.new_reading import guess_reading
from engine.tasks import TASKS

ROOT = Path(new.__file__).parent.parent
GOOD, BAD = ("a wonderful warm film", "great acting", "I liked it"), ("dull", "far too long a film", "there is no plot")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_csv(name: str, rows: list[list[str]]) -> None:
    with open(name, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def reviews(header: list[str], count: int = 60) -> list[list[str]]:
    rows = [[f"{(GOOD, BAD)[i % 2][i % 3]} {'very ' * (i % 7)}{i}", ("pos", "neg")[i % 2]] for i in range(count)]
    return [header, *rows] if header else rows


@pytest.mark.parametrize("task", TASKS)
def test_recipe_of_every_task_passes_a_dry_run(task, tmp_path, capsys):
    """The rows and the model of support/task_data.py, of which only the files are named."""
    known = write(task, tmp_path)
    given = [f"--data={known['data.train']}", f"--model={known['model.name']}", "--model.init=scratch"]
    assert new.main([task, *given, "--run.device=cpu", "--output=mine.toml"]) == 0
    config = read_recipe("mine.toml")
    assert (config.run.task, config.data.train, config.run.folder) == (task, known["data.train"], "runs/mine")
    assert config.eval.metric in TASKS[task].metrics
    assert train.main(["mine.toml", "--dry-run"]) == 0
    assert "1 rank" in capsys.readouterr().out


def test_other_columns_are_guessed_said_and_trained_on(capsys):
    write_csv("mine.csv", reviews(["What they wrote", "Verdict"]))
    assert new.main(["text-classification", "--data=mine.csv", "--loop"]) == 0
    said, text = capsys.readouterr().out, Path("my_recipe.toml").read_text(encoding="utf-8")
    config = read_recipe("my_recipe.toml")
    assert (config.data.text_column, config.data.label_column) == ("What they wrote", "Verdict")
    assert 'data.label_column = "Verdict": guessed: 2 distinct values' in said
    assert 'label_column = "Verdict"  # guessed: 2 distinct values' in text
    assert "# 54 rows to train on, 6 to validate on.\n# Labels: neg 27, pos 27." in text
    assert config.model.name == new_choices.MINILM
    loop = Path("my_loop.py").read_text(encoding="utf-8")
    assert loop.replace("my_loop.py", "-m engine.train") == Path(train.__file__).read_text(encoding="utf-8")
    assert "python my_loop.py my_recipe.toml  " in said


def test_texts_that_minilm_cannot_spell_get_a_shape_that_can():
    words = "这部电影好看", "演员的表演", "太无聊了", "完全没有意义"
    rows = [["，".join(words[(i + k) % 4] for k in range(1 + i % 5)), ("好", "差")[i % 2]] for i in range(40)]
    write_csv("mine.csv", [["评论", "情感"], *rows])
    text, notes = new.make_recipe(new.parse(["text-classification", "--data=mine.csv"]))
    model = tomllib.loads(text)["model"]
    assert model == {"name": new_choices.BYTES, "init": "scratch"}
    assert any("random weights" in note for note in notes)


def write_lines(name: str, lines: list[str], encoding: str = "utf-8") -> None:
    Path(name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


CHINESE = [f"{'很好看，' * (i % 5)}这部电影 {i};{('好', '差')[i % 2]}" for i in range(40)]
GERMAN = [f"{'sehr ' * (i % 5)}schön, {i};{('gut', 'schlecht')[i % 2]}" for i in range(40)]
READINGS = {  # {file: (header, lines, encoding, what is guessed)}
    "a.csv": ("评论;情感", CHINESE, "gb18030", {"data.encoding": "gb18030", "data.delimiter": ";"}),
    "b.csv": ("text;label", GERMAN, "cp1252", {"data.encoding": "cp1252", "data.delimiter": ";"}),
    "c.csv": ("text;label", GERMAN, "utf-16", {"data.encoding": "utf-16", "data.delimiter": ";"}),
    "d.csv": ("text|label", [x.replace(";", "|") for x in GERMAN], "utf-8", {"data.delimiter": "|"}),
    "e.tsv": ("Kommentar,Urteil", ["ja,gut", "nein,schlecht"] * 5, "utf-8", {"data.delimiter": ","}),
}


@pytest.mark.parametrize("name", READINGS)
def test_encodings_and_delimiters_are_guessed(name):
    header, lines, encoding, expected = READINGS[name]
    write_lines(name, [header, *lines], encoding)
    guesses = guess_reading(name, FileOptions())
    assert {key: guess.value for key, guess in guesses.items()} == expected
    given = FileOptions(encoding=encoding, delimiter=expected["data.delimiter"])
    assert guess_reading(name, given) == {}
    assert len(read_rows(name, header.split(given.delimiter), given)) == len(lines)


def test_usual_files_are_read_as_they_are():
    """One damaged line makes a file of UTF-8 no file of another encoding."""
    write_lines("a.csv", ["text,label", *["schön,gut"] * 3])
    write_lines("b.csv", ["text;with,label", "a;b,c"])
    Path("c.csv").write_bytes("text,label\nschön,gut\nschön,gut\n".encode() + b"sch\xf6n,gut\n")
    write_lines("d.jsonl", ['{"a;b": 1}'])
    for name in ("a.csv", "b.csv", "c.csv", "d.jsonl", "no.csv", "."):
        assert guess_reading(name, FileOptions()) == {}, name


def test_a_recipe_has_how_its_file_is_read():
    write_lines("mine.csv", ["评论;情感", *CHINESE], "gb18030")
    tree = tomllib.loads(new.make_recipe(new.parse(["text-classification", "--data=mine.csv"]))[0])
    assert tree["data"]["encoding"] == "gb18030"
    assert tree["data"]["delimiter"] == ";"
    assert (tree["data"]["text_column"], tree["data"]["label_column"]) == ("评论", "情感")


def test_given_settings_are_written_as_given():
    write_csv("mine.csv", reviews(["a", "b"]))
    given = ["--data.label_column=b", "--train.epochs=1", "--optim.lr=7e-5", "--data.max_length=9"]
    text, _ = new.make_recipe(new.parse(["text-classification", "--data=mine.csv", *given]))
    tree = tomllib.loads(text)
    assert tree["train"]["epochs"] == 1
    assert tree["optim"]["lr"] == 7e-5
    assert tree["data"]["max_length"] == 9


def of(**columns: list[Any]) -> list[Row]:
    count = len(next(iter(columns.values())))
    return [Row(str(i), i, {name: values[i] for name, values in columns.items()}) for i in range(count)]


LONG = [f"{'many ' * (i % 9)}words of a long text {i}" for i in range(30)]
SHORT = [f"{'few ' * (i % 4)}{i}" for i in range(30)]
FEW = [("yes", "no", "maybe")[i % 3] for i in range(30)]
SPANS = [[{"start": 0, "end": 1, "label": "X"}]] * 30
COLUMNS = {
    "longest text": ("text-classification", of(a=SHORT, b=LONG, c=FEW), {"text": "b", "label": "c"}),
    "usual name": (
        "text-classification",
        of(review=SHORT, b=LONG, x=FEW, stars=FEW),
        {"text": "review", "label": "stars"},
    ),
    "pair": (
        "text-classification",
        of(premise=LONG, hypothesis=SHORT, y=FEW),
        {"text": "premise", "text_pair": "hypothesis", "label": "y"},
    ),
    "ids": ("causal-lm", of(id=LONG, number=list(range(30)), x=SHORT), {"text": "x"}),
    "numbers": ("text-regression", of(a=LONG, b=[str(i / 7) for i in range(30)]), {"text": "a", "label": "b"}),
    "words": (
        "token-classification",
        of(w=[text.split() for text in LONG], t=[["O"] * len(text.split()) for text in LONG]),
        {"text": "w", "label": "t"},
    ),
    "spans": ("token-classification", of(a=LONG, b=SPANS), {"text": "a", "label": "b"}),
    "order": ("translation", of(xx=SHORT, yy=LONG), {"text": "xx", "label": "yy"}),
    "longer": ("summarization", of(xx=SHORT, yy=LONG), {"text": "yy", "label": "xx"}),
    "questions": (
        "question-answering",
        of(a=LONG, b=[f"{text}?" for text in SHORT], c=SPANS),
        {"text": "b", "text_pair": "a", "label": "c"},
    ),
    "members": (
        "text-classification",
        of(meta=[{"id": str(i), "by": "x"} for i in range(30)], a=[{"en": LONG[i], "mood": FEW[i]} for i in range(30)]),
        {"text": "a.en", "label": "a.mood"},
    ),
    "languages": (
        "translation",
        of(translation=[{"de": SHORT[i], "en": LONG[i]} for i in range(30)]),
        {"text": "translation.en", "label": "translation.de"},
    ),
    "ids of another name": (
        "text-classification",
        of(customer_id=[str(900 + i) for i in range(30)], a=LONG, c=FEW),
        {"text": "a", "label": "c", "id": "customer_id"},
    ),
    "ids that repeat": (
        "text-classification",
        of(a=LONG, c=FEW, userId=[str(i // 3) for i in range(30)]),
        {"text": "a", "label": "c"},
    ),
    "Chinese ids": (
        "text-classification",
        of(客户编号=[*range(30)], 内容=LONG, 标签=FEW),
        {"text": "内容", "label": "标签", "id": "客户编号"},
    ),
    "images": ("image-classification", of(a=[f"{i}.JPG" for i in range(30)], b=FEW), {"text": "a", "label": "b"}),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_are_guessed_by_name_and_content(case):
    task, rows, expected = COLUMNS[case]
    columns = TASKS[task].columns
    names = {role: getattr(columns, role) or "" for role in ("text", "text_pair", "label")}
    guesses = guess_columns(task, names, {}, "id", rows)
    assert {key: guess.column for key, guess in guesses.items()} == {
        f"data.{role}_column": name for role, name in expected.items()
    }


def test_columns_that_are_as_usual_are_not_guessed():
    names = {"text": "text", "text_pair": "", "label": "label"}
    assert guess_columns("text-classification", names, {}, "id", of(text=SHORT, other=LONG, label=FEW, x=FEW)) == {}
    only = guess_columns("text-classification", names, {"label": "x"}, "id", of(a=SHORT, label=FEW, x=FEW))
    assert list(only) == ["data.text_column"]


def test_a_column_of_nulls_is_no_column():
    assert [column.name for column in describe_columns(of(a=[None] * 30, b=FEW, c=[""] * 30))] == ["b"]


def test_classes_are_not_offered_as_texts_where_texts_repeat():
    rows = of(said=[f"{'very ' * (i % 2)}good {i % 5}" for i in range(30)], mood=FEW)
    guess = guess_columns("text-classification", {"text": "text", "label": "label"}, {}, "id", rows)["data.text_column"]
    assert (guess.column, "mood" in guess.why) == ("said", False)


def test_names_of_ids_end_as_words_do():
    assert [name for name in ("id", "user_id", "userId", "编号", "valid", "covid", "Bid", "MADRID") if is_id(name)] == [
        "id",
        "user_id",
        "userId",
        "编号",
    ]


def test_a_given_column_of_ids_stays():
    assert "data.id_column" not in guess_columns("causal-lm", {"text": "text"}, {}, "", of(my_id=[*range(30)], x=LONG))


MISTAKES = {
    "no data": (["text-classification"], r"--data is missing"),
    "no task": (["--data=mine.csv"], r"name one task, of text-classification"),
    "unknown task": (["text-clasification", "--data=mine.csv"], r"did you mean 'text-classification'"),
    "Hugging Face's task": (["NER", "--data=mine.csv"], r"TASK 'NER': that is 'token-classification' here"),
    "no file of words": (["token-classification", "--data=other.txt"], r"other.txt: no such file"),
    "no file": (["text-classification", "--data=other.csv"], r"other.csv: no such file"),
    "unknown setting": (["text-classification", "--data=mine.csv", "--optim.lrr=1"], r"did you mean 'optim.lr'"),
    "no recipe": (["text-classification", "--data=mine.csv", "--output=x.txt"], r"ends with .toml"),
    "no folder": (["text-classification", "--data=mine.csv", "--output=no/x.toml"], r"there is no folder 'no'"),
    "exists": (["text-classification", "--data=mine.csv", "--output=old.toml"], r"old.toml exists: --force overwrites"),
    "no header": (["text-classification", "--data=rows.csv"], r"the first line of the file seems to be a row"),
    "other task": (["text-regression", "--data=mine.csv"], r"no column 'score'"),
    "no model": (
        ["text-classification", "--data=mine.csv", "--model=./none"],
        r"model.name = './none': no such folder",
    ),
    "no labels": (
        ["text-classification", "--data=texts.csv"],
        r"no column 'label', and no other has a few values that repeat, as classes do; the columns are 'text': "
        "--data.label_column names one, masked-lm and causal-lm learn from texts without labels",
    ),
    "numbers": (["text-classification", "--data=grades.csv"], r"names one, text-regression learns numbers, masked-lm"),
    "multi-task": (["multi-task", "--data=mine.csv"], r"'multi-task'"),
    "empty": (["text-classification", "--data=empty.csv"], r"empty.csv"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(case):
    write_csv("mine.csv", reviews(["text", "label"]))
    write_csv("rows.csv", reviews([]))
    write_csv("texts.csv", [["text"], *[row[:1] for row in reviews([])]])
    write_csv("grades.csv", [["text", "grade"], *[[row[0], str(i / 7)] for i, row in enumerate(reviews([]))]])
    Path("empty.csv").touch()
    Path("old.toml").write_text("kept")
    before = sorted(Path().iterdir())
    argv, sentence = MISTAKES[case]
    with pytest.raises(USER_ERRORS, match=re.escape(sentence).replace(r"\.", ".")):
        new.main(argv)
    assert sorted(Path().iterdir()) == before
    assert Path("old.toml").read_text() == "kept"


def test_force_overwrites_and_a_loop_is_kept_without_it():
    write_csv("mine.csv", reviews(["text", "label"]))
    Path("my_loop.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"my_loop.py exists"):
        new.main(["text-classification", "--data=mine.csv", "--loop"])
    assert not Path("my_recipe.toml").exists()
    assert new.main(["text-classification", "--data=mine.csv", "--loop", "--force"]) == 0
    assert Path("my_loop.py").read_text() != "mine"


def test_lengths_cover_99_percent_within_the_limit():
    assert new_choices.choose_length([10] * 99 + [500], 512, ()).value == 16
    assert new_choices.choose_length(list(range(1, 101)), 512, ()).value == 104
    assert new_choices.choose_length([10] * 96 + [400] * 4, 512, ()).value == 16  # those few cost too much
    long = new_choices.choose_length([600] * 10, 512, ("windows",))
    assert long.value == 512
    assert 'long_texts = "windows"' in long.why


def test_rates_fall_with_the_size_and_few_rows_get_more_epochs():
    sizes = (20_000_000, 110_000_000, 340_000_000)
    rates = [new_choices.choose_learning_rate(size, "bert", "sequence-classification", "pretrained") for size in sizes]
    assert [rate.value for rate in rates] == [1e-4, 3e-5, 1e-5]
    lora = [
        new_choices.choose_learning_rate(size, "bert", "sequence-classification", "pretrained", 8) for size in sizes
    ]
    assert [rate.value for rate in lora] == [1e-3, 3e-4, 1e-4]
    assert new_choices.choose_learning_rate(sizes[0], "bert", "sequence-classification", "scratch", 8).value == 1e-3
    few, many = (new_choices.choose_steps(rows, 32, "pretrained") for rows in (200, 100_000))
    assert few["train.epochs"].value == 20
    assert many["train.epochs"].value == 3
    assert (few["eval.every_steps"].value, many["eval.every_steps"].value) == (0, 500)


def test_rare_classes_are_watched_by_f1():
    metrics = TASKS["text-classification"].metrics
    assert new_choices.choose_metric(metrics, (), [50, 50]).value == "accuracy"
    assert new_choices.choose_metric(metrics, (), [95, 5]).value == "f1"


# Files as people have them


def write_awkward_files() -> None:
    """Write a small file of each kind into the current folder."""
    texts = [f"{'very ' * (i % 6)}{(GOOD, BAD)[i % 2][i % 3]} {i}" for i in range(40)]
    signs = [("pos", "neg")[i % 2] for i in range(40)]
    write_lines(
        "chinese.csv", ["评论,情感", *[line.replace(";", ",").replace("，", " ") for line in CHINESE]], "gb18030"
    )
    write_lines("semicolon.csv", ["Kommentar;Urteil", *GERMAN])
    rows = [{"meta": {"id": i}, "a": {"en": texts[i], "fr": texts[i][::-1], "mood": signs[i]}} for i in range(40)]
    write_lines("nested.jsonl", [json.dumps(row) for row in rows])
    write_lines(
        "names.conll",
        [
            line
            for text in texts
            for line in [*(f"{word} {'B-X' if word == 'film' else 'O'}" for word in text.split()), ""]
        ],
    )
    answers = [{"text": "film", "answer_start": text.index("film")} for text in texts if "film" in text]
    contexts = [text for text in texts if "film" in text]
    squad = [
        {"context": text, "qas": [{"id": str(i), "question": "What?", "answers": [answers[i]]}]}
        for i, text in enumerate(contexts)
    ]
    Path("squad.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": squad}]}))
    for i in range(8):
        folder = Path("images", ("cat", "dog")[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 40), (20 * i, 200, 90)).save(folder / f"{i}.png")
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": text[::-1]}] for text in texts]
    Path("sharegpt.json").write_text(json.dumps([{"conversations": turn} for turn in turns]))
    write_csv("one.csv", [["text"], *[[text] for text in texts]])
    write_csv("unlabelled.csv", [["title", "body"], *[[text[-9:], text] for text in texts]])
    write_csv("three.csv", [["text", "label"], *[[texts[i], signs[i]] for i in range(3)]])
    write_csv(
        "many.csv", [["text", "label"], *[[f"{text} {k}", f"code {k % 400}"] for k, text in enumerate(texts * 20)]]
    )


BYTES = (f"--model={new_choices.BYTES}", "--model.init=scratch")
AWKWARD = {  # {file: (task, settings, columns of the recipe; or the sentence)}
    "chinese.csv": ("text-classification", BYTES, ["评论", "情感"]),
    "semicolon.csv": ("text-classification", BYTES, ["Kommentar", "Urteil"]),
    "nested.jsonl": ("translation", (), ["a.en", "a.fr"]),
    "names.conll": ("token-classification", BYTES, ["", ""]),
    "squad.json": ("question-answering", BYTES, ["", ""]),
    "images": ("image-classification", (), ["", ""]),
    "sharegpt.json": ("dialogue", (), ["", ""]),
    "one.csv": ("causal-lm", (), ["", ""]),
    "unlabelled.csv": ("text-classification", BYTES, "no other has a few values that repeat"),
    "three.csv": ("text-classification", BYTES, ["", ""]),
    "many.csv": ("text-classification", BYTES, ["", ""]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_files_give_a_recipe_that_trains_or_a_sentence(name, capsys):
    """Without --model where a shape is shipped for the task. Parquet: the same rows as .csv (tests/data/formats)."""
    write_awkward_files()
    task, settings, expected = AWKWARD[name]
    argv = [task, f"--data={name}", *settings, "--run.device=cpu"]
    if isinstance(expected, str):
        with pytest.raises(USER_ERRORS, match=expected):
            new.main(argv)
        return
    assert new.main(argv) == 0
    data = read_recipe("my_recipe.toml").data
    assert [data.text_column, data.label_column] == expected
    short = ["--train.max_steps=1", "--checkpoint.keep=best", "--optim.warmup_steps=0"]
    assert train.main(["my_recipe.toml", *short]) == 0
    assert "all steps done" in capsys.readouterr().out


# Console scripts


def test_console_scripts_are_functions_that_run_modules():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {f"finetune-{name}": f"engine.commands:{name}" for name in commands.MODULES}
    for name, module in commands.MODULES.items():
        assert callable(getattr(commands, name))
        assert find_spec(module) is not None, module


@pytest.mark.slow
@pytest.mark.parametrize("name", commands.MODULES)
def test_console_scripts_have_help_and_exit_codes(name):
    call = [sys.executable, "-c", f"from engine.commands import {name}; {name}()"]
    done = subprocess.run([*call, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"engine.{name}" in done.stdout
    done = subprocess.run([*call, "--no.such.option=1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
