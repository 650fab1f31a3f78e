"""Settings: their sources, conversion and writing, and the answers to mistakes."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from engine import config as configs
from engine.config import (
    Config,
    ConfigError,
    DropoutSettings,
    OptimSettings,
    check,
    override,
    parse,
    read_recipe,
    split_arguments,
    to_short_toml,
    to_toml,
)
from engine.config import schema as settings
from engine.config.hf_names import HF_NAMES, HF_TASKS
from engine.config.renamed import RENAMED
from engine.tasks import TASKS, Columns

USAGE = "usage"
ALL = settings.all_settings(Config())
RUNNABLE = override(Config(), {"model.name": "somewhere", "data.train": "rows.tsv"})


def recipe(tmp_path, text: str, name: str = "mine.toml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


def recipe_error(tmp_path, body: str) -> str:
    return error_of(read_recipe, recipe(tmp_path, f"schema = 2\n{body}"))


# sources of values


def test_defaults_then_the_recipe_then_the_command_line(tmp_path):
    path = recipe(
        tmp_path,
        'schema = 2\n[model]\nname = "m"\n[data]\ntrain = "t.tsv"\n[optim]\nlr = 1e-4\nlr_schedule = "cosine"\n',
    )
    config = parse([path, "--optim.lr=0.5", "--train.max_steps", "7"], USAGE)
    assert config.optim.beta1 == Config().optim.beta1
    assert config.optim.lr_schedule == "cosine"
    assert config.optim.lr == 0.5
    assert config.train.max_steps == 7
    assert parse([path], USAGE).optim.lr == 1e-4


def test_the_default_recipe_is_read_without_a_name():
    assert parse([], USAGE) == read_recipe(configs.DEFAULT_RECIPE)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--optim.lr", "1e-3"], "optim.lr", 1e-3),
        (["--optim.lr", "2"], "optim.lr", 2.0),
        (["--train.global-batch-size", "8"], "train.global_batch_size", 8),
        (["--train.max_steps=1_000"], "train.max_steps", 1000),
        (["--train.tf32"], "train.tf32", True),
        (["--train.tf32", "False"], "train.tf32", False),
        (["--train.tf32", "movie_reviews"], "train.tf32", True),  # the next argument is the recipe
        (["--train.tf32", "--optim.lr=1"], "train.tf32", True),
        (["--train.micro_batch_size", "auto"], "train.micro_batch_size", "auto"),
        (["--train.micro_batch_size=16"], "train.micro_batch_size", 16),
        (["--run.plugins=a.py,b.py"], "run.plugins", ("a.py", "b.py")),
        (["--resume"], "run.resume", "yes"),
        (["--resume=auto"], "run.resume", "auto"),
        (["--resume", "auto"], "run.resume", "auto"),
        (["--dry_run"], "run.dry_run", True),
        (["--dry-run", "false"], "run.dry_run", False),
        (["--dry-run"], "run.dry_run", True),
        (["--dry-run", "--show-all"], "run.show_all", True),
        (["--model.dropout.hidden=0.1"], "model.dropout.hidden", 0.1),
        (["--model.dropout.all", "none"], "model.dropout.all", None),
        (["--model.dropout.all="], "model.dropout.all", None),
        (["--data.test="], "data.test", ""),
        (["--data.labels=no, yes"], "data.labels", ("no", "yes")),
        (["--data.labels="], "data.labels", ()),
        (['--data.labels=["a, b", "c"]'], "data.labels", ("a, b", "c")),
        (["--data.labels", "['a, b', 3]"], "data.labels", ("a, b", "3")),
        (["--data.labels=[]"], "data.labels", ()),
        (['--data.labels="a, b", c'], "data.labels", ("a, b", "c")),
        (['--data.labels=a, 5" disk'], "data.labels", ("a", '5" disk')),
        (["--data.labels=[x], y"], "data.labels", ("[x]", "y")),
        (["--data.text_column=--x=y"], "data.text_column", "--x=y"),
        (["--optim.lr=1", "--optim.lr=2"], "optim.lr", 2.0),  # the last value counts
        (["--optim.lr=2", "--optim.lr", "1"], "optim.lr", 1.0),
    ],
)
def test_forms_of_an_option(argv, key, value):
    assert settings.get(parse(argv, USAGE), key) == value


def test_a_negative_number_is_a_value():
    assert split_arguments(["--optim.lr", "-1", "--run.seed=-2"]) == ([], {"optim.lr": "-1", "run.seed": "-2"})
    assert error_of(parse, ["--optim.lr", "-1"], USAGE) == "optim.lr = -1.0 must be >= 0"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run.folder", "--resume"], "--run.folder needs a value: --run.folder=VALUE"),
        (["--run.folder"], "--run.folder needs a value: --run.folder=VALUE"),
        (["--dryrun"], "unknown option --dryrun; did you mean '--dry-run'?"),
        (["--hlep"], "unknown option --hlep; did you mean '--help'?"),
        (["--quiet"], "unknown option --quiet; did you mean '--log.level=quiet'?"),
        (["--cuda"], "unknown option --cuda; did you mean '--run.device=cuda'?"),
        (["--optim.lr"], "--optim.lr needs a value: --optim.lr=VALUE; --help optim.lr says what it is"),
        (["--optim.lr", "=", "3e-5"], "--optim.lr = 3e-5: leave out the spaces around =, as in --optim.lr=3e-5"),
        (["--optim.lr", "="], "--optim.lr = : leave out the spaces around =, as in --optim.lr=VALUE"),
        (["optim.lr=3e-5"], "'optim.lr=3e-5' is a setting: give it as --optim.lr=3e-5"),
        (["optim.lr", "3e-5"], "'optim.lr' is a setting: give it as --optim.lr=VALUE"),
        (["\u2013optim.lr=3e-5"], "'\u2013optim.lr=3e-5' begins with a dash that is no hyphen: type --optim.lr=3e-5"),
        (["-optim.lr=3"], "unknown option '-optim.lr=3'; a setting is given as --section.key=value; --help optim.lr"),
        (["--optim.lr:3e-5"], "unknown option --optim.lr:3e-5; did you mean '--optim.lr'?"),
        (["--optim.lr=3e-5,"], "optim.lr = '3e-5,' should be a finite number"),
        (["--train.tf32", "maybe"], "recipe 'maybe' cannot be read (No such file or directory): name a .toml file or"),
        (
            ["moive_reviews"],
            "recipe 'moive_reviews' cannot be read (No such file or directory); did you mean 'movie_re",
        ),
        (
            ["movie-reviews.toml"],
            "recipe 'movie-reviews.toml' cannot be read (No such file or directory); did you mean ",
        ),
        (
            ["text-classification"],
            "recipe 'text-classification' is a task: its recipes are chinese_sentiment, few_revi",
        ),
        (["/"], "recipe '/' is a folder: name a .toml file in it"),
        ([""], "recipe '' cannot be read"),
        (["--output", "x"], "--output is an option of engine.evaluate, engine.predict, engine.export, engine.report"),
        (["--input=x"], "--input is an option of engine.predict, not a setting"),
        (["--vary=optim.lr=1,2"], "--vary is an option of engine.study, not a setting"),
        (["--data", "my.csv"], "'data' is a section, not a setting; it has data.train"),
        (["--version"], "unknown option --version"),
        (["--epochs", "3"], "unknown setting 'epochs'; did you mean 'train.epochs'?"),
        (["-r"], "unknown option '-r'; a setting is given as --section.key=value"),
        (["--"], "unknown option '--'; a setting is given as --section.key=value"),
        (["--=3"], "unknown option '--=3'; a setting is given as --section.key=value"),
        (["a.toml", "b.toml"], "one recipe at a time, not 'a.toml' and 'b.toml'"),
        (["--train.lr", "1e-4"], "unknown setting 'train.lr'; did you mean 'optim.lr'?"),
        (["--lr=1e-4"], "unknown setting 'lr'; did you mean 'optim.lr'?"),
        (["--optim.amsgrad=true"], "unknown setting 'optim.amsgrad'; optim has name, lr, weight_decay, "),
        (["--trian.epochs=1"], "unknown setting 'trian.epochs'; did you mean 'train.epochs'?"),
        (
            ["--train.global_bach_size=1"],
            "unknown setting 'train.global_bach_size'; did you mean 'train.global_batch_size'?",
        ),
        (["--TRAIN.epochs=1"], "unknown setting 'TRAIN.epochs'; did you mean 'train.epochs'?"),
        (["--train.batch_size=1"], "--train.batch_size is now --train.global_batch_size"),
        (
            ["--train.batch-size", "1", "--data.text"],
            "--train.batch_size is now --train.global_batch_size\n--data.text is",
        ),
        (["--batch_size=1"], "unknown setting 'batch_size'; did you mean 'train.global_batch_size'?"),
        (["--model.dropout=0.1"], "'model.dropout' is a section, not a setting; it has model.dropout.all, model."),
        (["--model.dropout.hiden=0.1"], "unknown setting 'model.dropout.hiden'; did you mean 'model.dropout.hidden'?"),
        (["--x.y=1"], "unknown setting 'x.y'; sections are run, model, model.dropout, model.lora"),
        (["--optim.lr="], "optim.lr = '' should be a finite number"),
        (["--train.global_batch_size="], "train.global_batch_size = '' should be a whole number"),
        (["--train.tf32="], "train.tf32 = '' should be true or false"),
        (["--run.folder="], "run.folder is empty: name a folder for this run"),
    ],
)
def test_a_wrong_command_line_says_what_would_work(argv, message):
    assert error_of(parse, argv, USAGE).startswith(message)


# values


@pytest.mark.parametrize(
    ("key", "toml", "message"),
    [
        ("train.global_batch_size", "3.5", "3.5 should be a whole number"),
        ("train.global_batch_size", "1e3", "1000.0 should be a whole number"),
        ("train.global_batch_size", "true", "True should be a whole number"),
        ("train.global_batch_size", "[3]", "[3] should be a whole number"),
        ("train.global_batch_size", '"many"', "'many' should be a whole number"),
        ("train.micro_batch_size", '"many"', "'many' should be a whole number or auto"),
        ("train.micro_batch_size", "2.5", "2.5 should be a whole number or auto"),
        ("train.micro_batch_size", "true", "True should be a whole number or auto"),
        ("train.micro_batch_size", '""', "'' should be a whole number or auto"),
        ("run.seed", str(2**63), f"{2**63} should be a whole number"),
        ("optim.lr", "false", "False should be a finite number"),
        ("optim.lr", '"fast"', "'fast' should be a finite number"),
        ("optim.lr", "nan", "nan should be a finite number"),
        ("optim.lr", "-inf", "-inf should be a finite number"),
        ("optim.lr", '"inf"', "'inf' should be a finite number"),
        ("optim.lr", '"none"', "'none' should be a finite number"),
        ("optim.lr", "1" + "0" * 400, "should be a finite number"),
        ("model.dropout.all", "true", "True should be a finite number or none"),
        ("model.dropout.all", '"some"', "'some' should be a finite number or none"),
        ("model.dropout.all", "nan", "nan should be a finite number or none"),
        ("train.tf32", "1", "1 should be true or false"),
        ("train.tf32", '"yes"', "'yes' should be true or false"),
        ("run.folder", "3", "3 should be text"),
        ("run.folder", "2020-01-01", "datetime.date(2020, 1, 1) should be text"),
        ("data.labels", "3", "3 should be a list of texts"),
        ("data.labels", "[true]", "[True] should be a list of texts"),
        ("data.labels", '[["a"]]', "[['a']] should be a list of texts"),
        ("train.precision", '"bf61"', "'bf61': choose from fp32, bf16, fp16; did you mean 'bf16'?"),
        ("train.precision", '"BF16"', "'BF16': choose from fp32, bf16, fp16; did you mean 'bf16'?"),
        ("model.pooling", '"max"', "'max': choose from '', cls, mean"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path, key, toml, message):
    section, _, name = key.rpartition(".")
    error = recipe_error(tmp_path, f"[{section}]\n{name} = {toml}\n")
    assert error.startswith(f"recipe {tmp_path / 'mine.toml'}: {key} = ")
    assert message in error


@pytest.mark.parametrize("text", ['["a, b", c]', '"a, b', '"a"b,c', "[a, b]", "[1.5]", "[true]", '["a"]\nb = ["c"]'])
def test_a_list_whose_quotes_or_brackets_are_wrong_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse([f"--data.labels={text}"], USAGE)
    assert str(caught.value) == f'data.labels = {text!r} should be a list of texts, as a,b or \'["a, b", "c"]\''


def test_text_that_no_recipe_could_hold_is_refused():
    """The shell gives a file name that is not UTF-8 as lone surrogates, which cannot be saved."""
    assert error_of(override, Config(), {"run.folder": "runs/\udcff"}).endswith("should be text in valid Unicode")


def test_whole_numbers_are_numbers_and_names_are_texts(tmp_path):
    config = read_recipe(
        recipe(tmp_path, "schema = 2\n[optim]\nlr = 1\n[data]\nlabels = [0, ' one ']\ntext_column = 2\n")
    )
    assert config.data.text_column == "2"
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.data.labels == ("0", "one")


def test_every_unknown_or_wrong_setting_is_reported_at_once(tmp_path):
    error = recipe_error(tmp_path, '[optim]\nlr = "x"\nbeta3 = 1\n[train]\nepochs = 1\nglobal_batch_size = "y"\n')
    assert len(error.splitlines()) == 3
    for name in ("optim.lr", "optim.beta3", "train.global_batch_size"):
        assert name in error


@pytest.mark.parametrize("key", [key for key, declared in ALL.items() if declared.metadata["within"]])
def test_every_range_is_enforced_and_its_default_lies_within(key):
    within = ALL[key].metadata["within"]
    check(RUNNABLE)
    outside = {"> 0": (0, -1), ">= 0": (-1,), "in [0, 1)": (-0.1, 1), "in [0, 1]": (-0.1, 1.1)}
    outside |= {"in (0, 1]": (0, 1.1), "in [0, 180]": (-1, 181), "in [0, 1000]": (-1, 1001)}
    outside |= {"in [0, 10000]": (-1, 10_001), "in [-10, 10]": (-11, 11)}
    whole = {"in [0, 1]": (-1, 2)} if ALL[key].type == "int" else {}
    for value in (outside | whole)[within]:
        error = error_of(check, override(RUNNABLE, {key: value}))
        assert f"{key} = {settings.get(override(Config(), {key: value}), key)} must be {within}" in error


CONTRADICTIONS = [
    ({"model.name": ""}, ["model.name"]),
    ({"data.train": ""}, ["data.train"]),
    ({"model.sha256": "abc"}, ["model.sha256 = 'abc'"]),
    ({"data.validation_fraction": 0}, ["data.validation_fraction = 0.0", "data.validation"]),
    ({"data.validation_fraction": 1}, ["data.validation_fraction = 1.0", "data.validation"]),
    ({"data.group_column": "g", "data.validation": "v.tsv"}, ["data.group_column", "data.validation"]),
    ({"data.labels": ("a", "a")}, ["data.labels = ['a', 'a']"]),
    ({"data.labels": ("a",)}, ["data.labels = ['a']"]),
    ({"train.micro_batch_size": 1, "train.micro_batch_tokens": 1}, ["micro_batch_size", "micro_batch_tokens"]),
    (
        {"train.micro_batch_size": "auto", "train.micro_batch_tokens": 9},
        ["train.micro_batch_size = auto", "train.micro_batch_tokens = 9", "give one of them"],
    ),
    ({"generate.do_sample": True, "generate.num_beams": 4}, ["generate.do_sample", "generate.num_beams = 4"]),
    ({"train.epochs": 0}, ["train.epochs = 0.0", "train.max_steps = 0"]),
    ({"optim.warmup_steps": 1.5}, ["optim.warmup_steps = 1.5"]),
    ({"optim.decay_steps": 2.5}, ["optim.decay_steps = 2.5"]),
    ({"model.init": "scratch", "model.head_init": "reset"}, ["model.init", "model.head_init"]),
]


@pytest.mark.parametrize(("values", "named"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_named(values, named):
    error = error_of(check, override(RUNNABLE, values))
    assert len(error.splitlines()) == 1
    for part in named:
        assert part in error


def test_all_contradictions_are_reported_at_once():
    values = {
        "optim.beta1": 1,
        "train.epochs": 0,
        "optim.warmup_steps": 1.5,
        "data.labels": ("a", "a"),
        "log.every_steps": 0,
    }
    error = error_of(check, override(RUNNABLE, values))
    assert len(error.splitlines()) == len(values)
    for key in values:
        assert key in error


def test_a_validation_file_makes_the_fraction_irrelevant():
    check(override(RUNNABLE, {"data.validation": "v.tsv", "data.validation_fraction": 0}))


# recipes


@pytest.mark.parametrize("path", sorted(configs.RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    config = read_recipe(path.stem)
    check(config)
    assert config == read_recipe(str(path))
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"^# Command: .*torchrun -m engine.train {path.stem}$", text, re.MULTILINE)
    assert re.search("^# Measured: .*[0-9]", text, re.MULTILINE)
    keys = re.findall(r"^\[([a-z0-9_.]+)\]$", text, re.MULTILINE)
    assert keys == [section for section in settings.sections(Config()) if section in keys], "the order of --help"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr = 1\n", "no schema; put `schema = 2` in its first line"),
        ("schema = 0\n", "schema = 0; it should be `schema = 2`"),
        ("schema = true\n", "schema = True; it should be `schema = 2`"),
        ('schema = "1"\n', "schema = '1'; it should be `schema = 2`"),
        ("schema = 3\n", "schema = 3 is newer than this version, which reads 2: install a newer one"),
        ("schema = 2\n[optim]\nlr =\n", "Invalid value (at line 3, column 5)"),
        ("schema = 2\n[optim]\nlr = 1\nlr = 2\n", "Cannot overwrite a value (at line 4"),
        ("schema = 2\nbatch_size = 3\n", "unknown setting 'batch_size'; did you mean 'train.global_batch_size'?"),
        (
            "schema = 2\noptim = 3\n",
            "'optim' is a section, not a setting; it has optim.name, optim.lr, optim.weight_decay",
        ),
        ("schema = 2\n[run.task]\nname = 1\n", "unknown setting 'run.task.name'; did you mean"),
        ("schema = 2\n[optm]\n", "unknown section [optm]; did you mean 'optim'?; sections are run, model"),
        ("schema = 2\n[optm]\nlr = 1\n", "unknown setting 'optm.lr'; did you mean 'optim.lr'?"),
        ("schema = 2\n[misc]\nx = 1\n", "unknown setting 'misc.x'; sections are run, model"),
        ("schema = 2\n[[optim]]\nlr = 1\n", "'optim' is a section, not a setting"),
        ("schema = 2\n[run]\nfolder = " + "[" * 5000, ""),
    ],
)
def test_p20_a_recipe_that_cannot_be_read_says_why(tmp_path, text, message):
    error = error_of(read_recipe, recipe(tmp_path, text))
    assert error.startswith(f"recipe {tmp_path / 'mine.toml'}: ")
    assert message in error


def test_a_recipe_that_does_not_exist(tmp_path):
    shipped = ", ".join(configs.shipped_recipes())
    assert f"name a .toml file or one of {shipped}" in error_of(read_recipe, "zzz")
    assert "did you mean 'movie_reviews'?" in error_of(read_recipe, "movie_review")
    assert "did you mean 'movie_reviews'?" in error_of(read_recipe, "movie_reviews.toml")
    assert "is a folder: name a .toml file in it" in error_of(read_recipe, str(tmp_path))
    mine = recipe(tmp_path, "schema = 2\n")
    assert f"did you mean {mine!r}?" in error_of(read_recipe, mine.replace("mine", "mien"))
    (tmp_path / "run" / "best").mkdir(parents=True)
    inside = recipe(tmp_path / "run" / "best", "schema = 2\n", "recipe.toml")
    assert f"is a run folder: its recipe is {inside}; --resume" in error_of(read_recipe, str(tmp_path / "run"))
    data = recipe(tmp_path, "text,label\n", "rows.csv")
    assert f"python -m engine.new TASK --data {data} writes one" in error_of(read_recipe, data)
    (tmp_path / "binary.toml").write_bytes(b"schema = 2 # \xff")
    assert "utf-8" in error_of(read_recipe, str(tmp_path / "binary.toml"))


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes("\ufeffschema = 2\r\n[optim]\r\nlr = 0.5\r\n".encode())
    assert read_recipe(str(path)).optim.lr == 0.5


@pytest.mark.parametrize(
    "toml", ["[model.dropout]\nhidden = 0.2", "[model]\ndropout.hidden = 0.2", "model.dropout.hidden = 0.2"]
)
def test_a_nested_section_in_each_spelling_of_toml(tmp_path, toml):
    assert read_recipe(recipe(tmp_path, f"schema = 2\n{toml}\n")).model.dropout == DropoutSettings(hidden=0.2)


ODD = [
    "",
    " spaces ",
    "none",
    "true",
    "3",
    "quotes \" and ' and \\ backslash \\n",
    "lines\r\nand\ttabs\x00\x01\x1f\x7f\x80\u2028",
    "naïve 日本語 🤖 e\u0301",
    "# no comment [nor] = section",
    '"""',
]


@pytest.mark.parametrize("text", ODD)
def test_a_written_recipe_reads_back_as_the_same(tmp_path, text):
    values = {"model.name": text, "data.labels": (text.strip(), "other, with a comma"), "model.dropout.drop_path": 0.3}
    values |= {"optim.lr": 1e-29, "optim.eps": 0.1 + 0.2, "run.seed": 2**63 - 1, "train.tf32": True}
    values["train.micro_batch_size"] = "auto"
    config = override(Config(), values)
    for written in (to_toml(config), to_short_toml(config)):
        assert read_recipe(recipe(tmp_path, written)) == config


@pytest.mark.parametrize("name", configs.shipped_recipes())
def test_a_short_recipe_is_the_same_recipe(tmp_path, name):
    shipped = read_recipe(name)
    short = to_short_toml(shipped)
    assert read_recipe(recipe(tmp_path, short)) == shipped
    keys = [key for key in ALL if settings.get(shipped, key) != settings.get(Config(), key)]
    lines = [line for line in short.splitlines() if " = " in line]
    assert [line.partition(" = ")[0] for line in lines] == ["schema", *(key.rpartition(".")[2] for key in keys)]
    assert all("  # default: " in line for line in lines[1:])


def test_every_setting_is_written(tmp_path):
    written = to_toml(RUNNABLE)
    assert read_recipe(recipe(tmp_path, written)) == RUNNABLE
    for section in settings.sections(Config()):
        assert written.count(f"\n[{section}]\n") == 1
    assert len(re.findall(r"^\w+ = ", written, re.MULTILINE)) == len(ALL) + 1  # and the schema


def test_differences_name_the_recipe_and_not_the_machine():
    ours = override(RUNNABLE, {"optim.lr": 0.5, "model.dropout.head": 0.1, "data.labels": ("a", "b")})
    assert configs.differences(ours, RUNNABLE) == [
        "model.dropout.head: None -> 0.1",
        "data.labels: () -> ('a', 'b')",
        "optim.lr: 5e-05 -> 0.5",
    ]
    machine = {"run.folder": "x", "run.resume": "yes", "run.device": "cpu", "train.micro_batch_size": 3}
    machine |= {"data.num_workers": 2, "eval.batch_tokens": 1, "log.every_steps": 1, "log.report_to": ("wandb",)}
    assert configs.differences(override(RUNNABLE, machine), RUNNABLE) == []


# names of schema 1 and of Hugging Face


def test_a_recipe_of_schema_1_is_answered_with_new_names(tmp_path):
    body = (
        '[run]\nseed = 1\n[data]\ntext = "t"\nscheme = "IOB2"\n[train]\nbatch_size = 8\nmicro_batch = "auto"\n'
        "epochs = 2\n[model.dropout]\npath = 0.1\n[regularize]\nweight_decay = 0.1\n"
    )
    path = recipe(tmp_path, f"schema = 1\n{body}")
    assert error_of(read_recipe, path).splitlines() == [
        f"recipe {path}: schema = 1 is old: write `schema = 2` and these names:",
        "  data.text -> data.text_column",
        "  data.scheme -> token_classification.tag_scheme",
        "  train.batch_size -> train.global_batch_size",
        '  train.micro_batch = "auto" -> train.micro_batch_size = "auto"',
        "  model.dropout.path -> model.dropout.drop_path",
        "  regularize.weight_decay -> optim.weight_decay",
    ]


def test_a_recipe_of_schema_1_without_old_names(tmp_path):
    path = recipe(tmp_path, "schema = 1\n[optim]\nlr = 1\n[misc]\n")
    assert error_of(read_recipe, path).endswith("its settings have kept their names: write `schema = 2`")


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_answered_with_the_new_one(tmp_path, old):
    new = RENAMED[old]
    assert new in ALL
    assert old not in ALL
    section, _, name = old.rpartition(".")
    assert error_of(parse, [f"--{old}=1"], USAGE) == f"--{old} is now --{new}"
    assert error_of(override, Config(), {old: 1}) == f"{old} is now {new}"
    path = recipe(tmp_path, f"schema = 2\n[{section}]\n{name} = 1\n")
    assert error_of(read_recipe, path) == f"recipe {path}: {old} is now {new}"
    path = recipe(tmp_path, f"schema = 1\n[{section}]\n{name} = 1\n")
    assert f"\n  {old} -> {new}" in error_of(read_recipe, path)


def test_every_other_name_of_a_task_is_answered_with_a_task():
    assert {*HF_TASKS.values()} <= {*TASKS}
    assert not {*HF_TASKS} & {*TASKS}


@pytest.mark.parametrize("name", HF_NAMES)
def test_a_name_of_hugging_face_is_answered(tmp_path, name):
    """Bare, with hyphens, in a section, without a value, on the command line and in a recipe."""
    ours, note = HF_NAMES[name]
    assert not ours or ours in ALL
    assert ours or note
    for mentioned in re.findall(r"[a-z][a-z_0-9]*(?:\.[a-z_0-9]+)+", note):
        assert mentioned in ALL or mentioned.startswith(("engine.", "metrics.", "config."))
    hyphens = name.replace("_", "-")
    path = recipe(tmp_path, f"schema = 2\n[train]\n{name} = 1\n")
    answers = [error_of(parse, [f"--{key}=1"], USAGE) for key in (name, hyphens)]
    answers.append(error_of(override, Config(), {name: 1}))
    if f"train.{name}" not in ALL:
        answers += [error_of(parse, [f"--train.{name}=1"], USAGE), error_of(read_recipe, path)]
    for answer in answers:
        assert ours in answer
        assert answer.endswith(note)


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate (Hugging Face's name) is here --optim.lr."),
        (["--optim.learning-rate=1"], "--optim.learning_rate (Hugging Face's name) is here --optim.lr."),
        (["--fp16"], "--fp16 (Hugging Face's name) is here --train.precision. Give the value fp16."),
        (["--seed=1"], "unknown setting 'seed'; did you mean 'run.seed'?"),
        (["--train.seed=1"], "unknown setting 'train.seed'; did you mean 'run.seed'?"),
        (
            ["--per_device_train_batch_size", "16"],
            "--per_device_train_batch_size (Hugging Face's name) is here --train.micro_batch_size. It is what fits on "
            "one device; the batch of an optimizer step is train.global_batch_size.",
        ),
        (
            ["--gradient_accumulation_steps=2"],
            "--gradient_accumulation_steps (Hugging Face's name) is not a setting here. It is derived: "
            "train.global_batch_size / (train.micro_batch_size x number of ranks).",
        ),
    ],
)
def test_what_an_answer_to_hugging_faces_name_says(argv, answer):
    assert error_of(parse, argv, USAGE) == answer


def test_a_command_line_of_hugging_face_is_answered_at_once():
    argv = ["--model_name_or_path", "bert", "--do_train", "--num_train_epochs=3", "--fp16", "--output_dir", "out"]
    answers = error_of(parse, argv, USAGE).splitlines()
    assert [answer.split()[0] for answer in answers] == [word.split("=")[0] for word in argv if word.startswith("--")]


# from Python


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("optim.lr", 1, 1.0),
        ("optim.lr", np.float64(0.25), 0.25),
        ("optim.lr", np.int64(2), 2.0),
        ("train.max_steps", np.int64(7), 7),
        ("train.micro_batch_size", np.int32(7), 7),
        ("run.folder", Path("runs") / "x", str(Path("runs") / "x")),
        ("run.plugins", [Path("a.py")], ("a.py",)),
        ("data.labels", ("a", 1), ("a", "1")),
        ("model.dropout.all", None, None),
    ],
)
def test_values_of_python_are_taken(key, given, value):
    read = settings.get(override(Config(), {key: given}), key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim.lr": None}, "optim.lr = None should be a finite number"),
        ({"optim.lr": [1e-4]}, "optim.lr = [0.0001] should be a finite number"),
        ({"optim.lr": {"peak": 1}}, "optim.lr = {'peak': 1} should be a finite number"),
        ({"optim.lr": 1j}, "optim.lr = 1j should be a finite number"),
        ({"train.max_steps": 2.0}, "train.max_steps = 2.0 should be a whole number"),
        ({"train.max_steps": np.float32(2)}, "should be a whole number"),
        ({"run.folder": None}, "run.folder = None should be text in valid Unicode"),
        ({"run.folder": b"x"}, "run.folder = b'x' should be text in valid Unicode"),
        ({"train.tf32": 1}, "train.tf32 = 1 should be true or false"),
        ({"data.labels": {"a", "b"}}, "should be a list of texts"),
        ({"data.labels": ("a", "\udcff")}, "should be a list of texts"),
        ({"data.labels": [None] * 999}, "... should be a list of texts"),
        ({"train.precision": None}, "train.precision = None should be text in valid Unicode"),
        ({"optim": {"lr": 1}}, "'optim' is a section, not a setting; it has optim.name, optim.lr"),
        ({"optim": OptimSettings()}, "'optim' is a section, not a setting"),
        ({3: 4}, "3 is not a setting: a setting is named by a text, such as 'optim.lr'"),
        ({"": 4}, "unknown setting ''; sections are run"),
    ],
)
def test_wrong_values_of_python_are_named(values, message):
    assert message in error_of(override, Config(), values)


# declarations


def test_every_setting_is_declared_in_full():
    for key, declared in ALL.items():
        doc, choices = declared.metadata["doc"], declared.metadata["choices"]
        assert len(doc) > 5, key
        assert not doc.endswith("."), f"{key}: docs are phrases"
        assert declared.type in settings.KINDS, key
        assert not choices or declared.default in choices, key
        assert override(Config(), {key: declared.default}) == Config(), key


def test_there_are_at_most_176_settings():
    """A budget: what a setting would switch is often better a line of the loop."""
    assert len(ALL) <= 176


# dropout


@pytest.mark.parametrize(
    ("dropout", "rates"),
    [
        (DropoutSettings(), {}),
        (DropoutSettings(hidden=0.0), {"hidden": 0.0}),
        (DropoutSettings(drop_path=0.1), {"drop_path": 0.1}),
        (DropoutSettings(all=0.0), dict.fromkeys(("embedding", "attention", "hidden", "head"), 0.0)),
        (
            DropoutSettings(all=0.1, attention=0.0, head=0.5),
            {"embedding": 0.1, "attention": 0.0, "hidden": 0.1, "head": 0.5},
        ),
    ],
)
def test_a_sites_own_rate_precedes_the_rate_of_all(dropout, rates):
    assert dropout.rates() == rates


def test_a_nested_section_is_a_field_like_any_other():
    assert [key for key in ALL if key.startswith("model.dropout.")] == [
        f"model.dropout.{f.name}" for f in fields(DropoutSettings)
    ]
    changed = override(RUNNABLE, {"model.dropout.all": 0.5, "model.pooling": "mean"})
    assert changed.model.dropout == DropoutSettings(all=0.5)
    assert changed.model.name == RUNNABLE.model.name
    assert RUNNABLE.model.dropout == DropoutSettings()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"text_pair_column": "text"}, "data.text_column = 'text', data.text_pair_column = 'text'"),
        ({"text_column": "label"}, "data.text_column = 'label', data.label_column = 'label'"),
    ],
)
def test_two_columns_of_one_name_are_refused(given, named):
    with pytest.raises(ConfigError, match=f"{named} must differ"):
        Columns().fill(replace(Config().data, **given))


def test_a_column_without_a_setting_has_the_tasks_name():
    data = Columns("question", "context", "answers", "context").fill(replace(Config().data, text_column="ask"))
    assert (data.text_column, data.text_pair_column, data.label_column, data.group_column) == (
        "ask",
        "context",
        "answers",
        "context",
    )
    ours = Columns("question", "context", "answers", "context")
    assert ours.fill(replace(Config().data, text_pair_column="passage")).group_column == "passage"
    assert Columns().fill(replace(Config().data, text_pair_column="second")).group_column == ""
    assert Columns(group="context").fill(replace(data, group_column="", validation="v.json")).group_column == ""


# What belongs to the files of a recipe


OF_ITS_FILES = """
schema = 2
[model]
name = "somewhere"
sha256 = "{digest}"
[data]
train = "theirs.csv"
validation = "v.csv"
test = "t.csv"
teacher_file = "logits.jsonl"
[augment.text]
back_translation_file = "paraphrases.jsonl"
""".format(digest="0" * 64)
MINE = {"data.validation": "", "data.test": "mine-t.csv", "data.teacher_file": ""}
MINE |= {"augment.text.back_translation_file": "", "data.train": "mine.csv"}


@pytest.mark.parametrize("left_out", MINE)
def test_a_recipes_files_do_not_join_another_train_file(tmp_path, left_out):
    own = recipe(tmp_path, OF_ITS_FILES)
    given = [f"--{key}={value}" for key, value in MINE.items() if key != left_out]
    if left_out == "data.train":  # the recipe's own again, to which its files belong
        assert parse([own, *given, "--data.train=theirs.csv"], USAGE).data.test == "mine-t.csv"
        return
    message = error_of(parse, [own, *given], USAGE)
    assert message.startswith(f"data.train = 'mine.csv' is not the recipe's, but {left_out} = ")
    assert f'give --{left_out} FILE, or --{left_out} "" ' in message
    assert message.count("data.train = ") == 1
    assert parse([own, *given, f"--{left_out}", MINE[left_out]], USAGE).data.train == "mine.csv"


def test_a_pinned_checksum_says_how_to_unpin_it(tmp_path):
    own = recipe(tmp_path, OF_ITS_FILES)
    message = error_of(parse, [own, "--model.name", "another"], USAGE)
    assert "the checksum of 'somewhere', not of model.name = 'another'" in message
    assert '--model.sha256 "" to check none' in message
    assert parse([own, "--model.name", "another", "--model.sha256", ""], USAGE).model.sha256 == ""
    assert parse([own, "--model.name", "another", "--model.sha256", "1" * 64], USAGE).model.name == "another"
    assert parse([own, "--model.name", "another", "--model.init", "scratch"], USAGE).model.name == "another"
    assert parse([own, "--model.name", "somewhere"], USAGE).model.sha256 == "0" * 64


def test_the_revision_of_a_recipe_is_that_of_its_model(tmp_path):
    own = str(recipe(tmp_path, to_toml(override(RUNNABLE, {"model.name": "org/own", "model.revision": "v1"}))))
    assert parse([own], USAGE).model.revision == "v1"
    assert "model.revision of the recipe is one of 'org/own'" in error_of(parse, [own, "--model.name=org/other"], USAGE)
    assert parse([own, "--model.name=org/other", "--model.revision="], USAGE).model.revision == ""
