"""Settings: where they come from, how they are read and written back, and what a user's mistake is answered with."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from engine import config as configs
from engine.config import (
    Config,
    ConfigError,
    DropoutSettings,
    check,
    override,
    parse,
    read_recipe,
    split_arguments,
    to_toml,
)
from engine.config import schema as settings
from engine.tasks import Columns

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
    return error_of(read_recipe, recipe(tmp_path, f"schema = 1\n{body}"))


# where values come from


def test_defaults_then_the_recipe_then_the_command_line(tmp_path):
    path = recipe(
        tmp_path, 'schema = 1\n[model]\nname = "m"\n[data]\ntrain = "t.tsv"\n[optim]\nlr = 1e-4\nschedule = "cosine"\n'
    )
    config = parse([path, "--optim.lr=0.5", "--train.max_steps", "7"], USAGE)
    assert config.optim.beta1 == Config().optim.beta1
    assert config.optim.lr_schedule == "cosine"
    assert config.optim.lr == 0.5
    assert config.train.max_steps == 7
    assert parse([path], USAGE).optim.lr == 1e-4


def test_without_a_recipe_the_default_one_is_read():
    assert parse([], USAGE) == read_recipe(configs.DEFAULT_RECIPE)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--optim.lr=1e-3"], "optim.lr", 1e-3),
        (["--optim.lr", "1e-3"], "optim.lr", 1e-3),
        (["--optim.lr", "2"], "optim.lr", 2.0),
        (["--train.batch-size", "8"], "train.global_batch_size", 8),
        (["--train.max_steps=1_000"], "train.max_steps", 1000),
        (["--log.tensorboard"], "log.tensorboard", True),
        (["--log.tensorboard", "False"], "log.tensorboard", False),
        (["--log.tensorboard", "movie_reviews"], "log.tensorboard", True),  # what follows is the recipe
        (["--log.tensorboard", "--optim.lr=1"], "log.tensorboard", True),
        (["--resume"], "run.resume", "yes"),
        (["--dry-run"], "run.dry_run", True),
        (["--model.dropout.hidden=0.1"], "model.dropout.hidden", 0.1),
        (["--model.dropout.all", "none"], "model.dropout.all", None),
        (["--model.dropout.all="], "model.dropout.all", None),
        (["--data.test="], "data.test", ""),
        (["--data.labels=no, yes"], "data.labels", ("no", "yes")),
        (["--data.labels="], "data.labels", ()),
        (["--data.text_column=--x=y"], "data.text_column", "--x=y"),
        (["--optim.lr=1", "--optim.lr=2"], "optim.lr", 2.0),  # the last one wins
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
        (["--dryrun"], "--dryrun needs a value: --dryrun=VALUE; did you mean '--dry-run'?"),
        (["-r"], "unknown option '-r'; a setting is given as --section.key=value"),
        (["--"], "unknown option '--'; a setting is given as --section.key=value"),
        (["--=3"], "unknown option '--=3'; a setting is given as --section.key=value"),
        (["a.toml", "b.toml"], "one recipe at a time, not 'a.toml' and 'b.toml'"),
        (["--train.lr", "1e-4"], "unknown setting 'train.lr'; did you mean 'optim.lr'?"),
        (["--lr=1e-4"], "unknown setting 'lr'; did you mean 'optim.lr'?"),
        (["--optim.amsgrad=true"], "unknown setting 'optim.amsgrad'; optim has lr, schedule, warmup"),
        (["--trian.batch_size=1"], "unknown setting 'trian.batch_size'; did you mean 'train.global_batch_size'?"),
        (["--train.bach_size=1"], "unknown setting 'train.bach_size'; did you mean 'batch_size'?"),
        (["--TRAIN.batch_size=1"], "unknown setting 'TRAIN.batch_size'; did you mean 'train.global_batch_size'?"),
        (["--model.dropout=0.1"], "'model.dropout' is a section, not a setting; it has model.dropout.all, model."),
        (["--model.dropout.hiden=0.1"], "unknown setting 'model.dropout.hiden'; did you mean 'hidden'?"),
        (["--x.y=1"], "unknown setting 'x.y'; sections are run, model, model.dropout, model.lora"),
        (["--optim.lr="], "optim.lr = '' should be a finite number"),
        (["--train.global_batch_size="], "train.global_batch_size = '' should be a whole number"),
        (["--log.tensorboard="], "log.tensorboard = '' should be true or false"),
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
        ("log.tensorboard", "1", "1 should be true or false"),
        ("log.tensorboard", '"yes"', "'yes' should be true or false"),
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


def test_text_that_no_recipe_could_hold_is_refused():
    """A file name that is not UTF-8 comes from the shell as lone surrogates, and would fail when first saved."""
    assert error_of(override, Config(), {"run.folder": "runs/\udcff"}).endswith("should be text in valid Unicode")


def test_whole_numbers_are_numbers_and_labels_are_texts(tmp_path):
    config = read_recipe(recipe(tmp_path, "schema = 1\n[optim]\nlr = 1\n[data]\nlabels = [0, ' one ']\n"))
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.data.labels == ("0", "one")


def test_every_unknown_or_wrong_setting_is_reported_at_once(tmp_path):
    error = recipe_error(tmp_path, '[optim]\nlr = "x"\nbeta3 = 1\n[train]\nepochs = 1\nbatch_size = "y"\n')
    assert len(error.splitlines()) == 3
    for name in ("optim.lr", "optim.beta3", "train.global_batch_size"):
        assert name in error


@pytest.mark.parametrize("key", [key for key, declared in ALL.items() if declared.metadata["within"]])
def test_every_range_is_enforced_and_its_default_lies_within(key):
    within = ALL[key].metadata["within"]
    check(RUNNABLE)
    outside = {"> 0": (0, -1), ">= 0": (-1,), "in [0, 1)": (-0.1, 1), "in [0, 1]": (-0.1, 1.1)}
    outside |= {"in (0, 1]": (0, 1.1), "in [0, 180]": (-1, 181)}
    for value in outside[within]:
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
        {"train.micro_batch_size": "auto", "train.micro_batch_size": 1},
        ["train.micro_batch_size = auto", "micro_batch_size"],
    ),
    (
        {"train.micro_batch_size": "auto", "train.micro_batch_tokens": 9},
        ["train.micro_batch_size = auto", "micro_batch_tokens"],
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
def test_every_shipped_recipe_is_one(path):
    config = read_recipe(path.stem)
    check(config)
    assert config == read_recipe(str(path))
    assert "torchrun" in path.read_text(encoding="utf-8"), "a recipe says its command"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr = 1\n", "no schema; put `schema = 1` in its first line"),
        ("schema = 0\n", "schema = 0; it should be `schema = 1`"),
        ("schema = true\n", "schema = True; it should be `schema = 1`"),
        ('schema = "1"\n', "schema = '1'; it should be `schema = 1`"),
        ("schema = 2\n", "schema = 2 is newer than this version, which reads 1: install a newer one"),
        ("schema = 1\n[optim]\nlr =\n", "Invalid value (at line 3, column 5)"),
        ("schema = 1\n[optim]\nlr = 1\nlr = 2\n", "Cannot overwrite a value (at line 4"),
        ("schema = 1\nbatch_size = 3\n", "unknown setting 'batch_size'; did you mean 'train.global_batch_size'?"),
        ("schema = 1\noptim = 3\n", "'optim' is a section, not a setting; it has optim.lr, optim.lr_schedule"),
        ("schema = 1\n[run.task]\nname = 1\n", "unknown setting 'run.task.name'; did you mean"),
        ("schema = 1\n[optm]\n", "unknown section [optm]; did you mean 'optim'?; sections are run, model"),
        ("schema = 1\n[optm]\nlr = 1\n", "unknown setting 'optm.lr'; did you mean 'optim.lr'?"),
        ("schema = 1\n[misc]\nx = 1\n", "unknown setting 'misc.x'; sections are run, model"),
        ("schema = 1\n[[optim]]\nlr = 1\n", "'optim' is a section, not a setting"),
        ("schema = 1\n[run]\nfolder = " + "[" * 5000, ""),
    ],
)
def test_p20_a_recipe_that_cannot_be_read_says_why(tmp_path, text, message):
    error = error_of(read_recipe, recipe(tmp_path, text))
    assert error.startswith(f"recipe {tmp_path / 'mine.toml'}: ")
    assert message in error


def test_a_recipe_that_is_not_there(tmp_path):
    shipped = ", ".join(configs.shipped_recipes())
    assert f"name a .toml file or one of {shipped}; did you mean 'movie_reviews'?" in error_of(
        read_recipe, "movie_review"
    )
    assert "did you mean 'movie_reviews'?" in error_of(read_recipe, "movie_reviews.toml")
    assert "Is a directory" in error_of(read_recipe, str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"schema = 1 # \xff")
    assert "utf-8" in error_of(read_recipe, str(tmp_path / "binary.toml"))


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes("\ufeffschema = 1\r\n[optim]\r\nlr = 0.5\r\n".encode())
    assert read_recipe(str(path)).optim.lr == 0.5


@pytest.mark.parametrize(
    "toml", ["[model.dropout]\nhidden = 0.2", "[model]\ndropout.hidden = 0.2", "model.dropout.hidden = 0.2"]
)
def test_a_nested_section_in_each_spelling_of_toml(tmp_path, toml):
    assert read_recipe(recipe(tmp_path, f"schema = 1\n{toml}\n")).model.dropout == DropoutSettings(hidden=0.2)


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
def test_what_is_written_reads_back_as_the_same(tmp_path, text):
    values = {"model.name": text, "data.labels": (text.strip(), "other, with a comma"), "model.dropout.drop_path": 0.3}
    values |= {"optim.lr": 1e-300, "optim.eps": 0.1 + 0.2, "run.seed": 2**63 - 1, "log.tensorboard": True}
    config = override(Config(), values)
    assert read_recipe(recipe(tmp_path, to_toml(config))) == config


def test_every_setting_stands_in_what_is_written(tmp_path):
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
    machine |= {"data.num_workers": 2, "eval.batch_tokens": 1, "log.every_steps": 1, "log.tensorboard": True}
    assert configs.differences(override(RUNNABLE, machine), RUNNABLE) == []


# declarations


def test_every_setting_is_declared_in_full():
    for key, declared in ALL.items():
        doc, choices = declared.metadata["doc"], declared.metadata["choices"]
        assert len(doc) > 5, key
        assert not doc.endswith("."), f"{key}: docs are phrases"
        assert declared.type in settings.KINDS, key
        assert not choices or declared.default in choices, key
        assert override(Config(), {key: declared.default}) == Config(), key


def test_there_are_at_most_123_settings():
    """A budget, of which three are the machine's: what a setting would switch is often better a line of the loop."""
    assert len(ALL) <= 123


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting_with_its_meaning(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([flag], USAGE)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(USAGE)
    for key, declared in ALL.items():
        assert re.search(
            rf"^  --{re.escape(key)}\*? .*\n        {re.escape(declared.metadata['doc'])}$", shown, re.M
        ), key
    for choice in ("{fp32,bf16,fp16}", "{'',cls,mean,last}"):
        assert choice in shown
    assert set(configs.shipped_recipes()) <= set(re.split(r"[ ,]+", shown))


def test_help_shows_what_a_recipe_has(tmp_path, capsys):
    path = recipe(tmp_path, "schema = 1\n[optim]\nlr = 0.25\n")
    for argv in ([path, "--help"], [path, "--optim.lr", "-h"]):
        with pytest.raises(SystemExit):
            parse(argv, USAGE)
        shown = capsys.readouterr().out
        assert f"--optim.lr float  (default 5e-05; {path} has 0.25)" in shown
        assert "--optim.eps float  (default 1e-08)" in shown


# dropout


@pytest.mark.parametrize(
    ("dropout", "rates"),
    [
        (DropoutSettings(), {}),
        (DropoutSettings(hidden=0.0), {"hidden": 0.0}),
        (DropoutSettings(drop_path=0.1), {"path": 0.1}),
        (DropoutSettings(all=0.0), dict.fromkeys(("embedding", "attention", "hidden", "head"), 0.0)),
        (
            DropoutSettings(all=0.1, attention=0.0, head=0.5),
            {"embedding": 0.1, "attention": 0.0, "hidden": 0.1, "head": 0.5},
        ),
    ],
)
def test_one_rate_for_all_sites_gives_way_to_a_sites_own(dropout, rates):
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
        ({"text_pair": "text"}, "data.text_column = 'text', data.text_pair_column = 'text'"),
        ({"text": "label"}, "data.text_column = 'label', data.label_column = 'label'"),
    ],
)
def test_two_columns_of_one_name_are_refused_also_where_the_task_names_one(given, named):
    with pytest.raises(ConfigError, match=f"{named} must differ"):
        Columns().fill(replace(Config().data, **given))


def test_a_column_that_the_recipe_leaves_open_is_the_tasks():
    data = Columns("question", "context", "answers", "context").fill(replace(Config().data, text="ask"))
    assert (data.text_column, data.text_pair_column, data.label_column, data.group_column) == (
        "ask",
        "context",
        "answers",
        "context",
    )
    assert Columns(group="context").fill(replace(data, group="", validation="v.json")).group == ""
