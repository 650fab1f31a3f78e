"""--help: one screen for each command, and the rest by topic, as wide as the terminal."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from engine import commands, evaluate, export, help_pages, new, predict, prepare, study, study_options, train, validate
from engine.cli import is_used
from engine.config import Config, ConfigError, all_settings, command_line, override, shipped_recipes, to_toml
from engine.config.schema import KINDS, out_of_range, sections
from engine.report import __main__ as report
from engine.tasks import MULTI_TASK, TASKS

ALL = all_settings(Config())
COMMANDS = {module.__name__: module for module in (train, evaluate, predict, study, export, new)}
COMMANDS |= {"engine.report": report, "data.prepare": prepare}
TOPICS = ["tasks", "recipes", "all", *sections(Config()), "augment", "optim.lr", "fashion_mnist_dinov2"]


def help_of(capsys, command, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main([*arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def unwrapped(shown: str) -> str:
    return re.sub(r"\s+", " ", shown)


@pytest.fixture
def columns(monkeypatch):
    return lambda number: monkeypatch.setenv("COLUMNS", str(number))


@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_screen_of_24_lines(name, torchrun, columns, capsys, monkeypatch):
    columns(80)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", name])
    shown = help_of(capsys, COMMANDS[name], "--help")
    assert len(shown.splitlines()) <= 24
    assert shown.startswith(f"{'torchrun' if torchrun else 'python'} -m {name} ")
    assert "--help all" in unwrapped(shown)
    assert re.search(r"--(optim|data|run)\.\w+|--help (optim|data)", shown)


@pytest.mark.parametrize("width", [50, 80, 300])
@pytest.mark.parametrize("topic", ["", *TOPICS])
def test_nothing_is_wider_than_the_terminal(topic, width, columns, capsys):
    columns(width)
    shown = help_of(capsys, train, "--help", topic)
    assert max(map(len, shown.splitlines())) <= min(width, help_pages.WIDEST)
    for command in (evaluate, predict, study, export, report, new, prepare) if not topic else ():
        assert max(map(len, help_of(capsys, command, "-h").splitlines())) <= width


@pytest.mark.parametrize("name", ["help", "-h", "--help", "-help"])
def test_the_first_page_has_the_recipes_and_what_is_changed_most(name, columns, capsys):
    columns(80)
    shown = help_of(capsys, train, name)
    assert set(shipped_recipes()) <= set(shown.split())
    assert set(help_pages.COMMON) <= set(ALL)
    assert set(help_pages.COMMON_OF_RUNS) <= set(ALL)
    for key in help_pages.COMMON:
        assert f"\n  --{key} " in shown
    assert "\n  --optim.lr 0.0001 " in shown, "of movie_reviews, not the default"


def test_help_shows_what_a_recipe_has(tmp_path, columns, capsys, monkeypatch):
    columns(100)
    monkeypatch.chdir(tmp_path)
    path = Path("mine.toml")
    path.write_text("schema = 2\n[optim]\nlr = 0.25\n")
    for arguments in ([path, "--help"], ["--help", path], [path, "--optim.lr", "-h"]):
        assert "  --optim.lr 0.25 " in help_of(capsys, train, *map(str, arguments))
    for arguments in (["--help", "optim"], ["--help=optim"], ["-h", "[optim]"], ["--help", "--optim.lr"]):
        shown = unwrapped(help_of(capsys, train, str(path), *arguments))
        assert f"--optim.lr float (default 5e-05; {path} has 0.25) learning rate" in shown


def test_all_and_the_sections_explain_every_setting(columns, capsys):
    columns(80)
    everything = unwrapped(help_of(capsys, train, "--help", "all"))
    by_section = [unwrapped(help_of(capsys, train, "--help", name)) for name in sections(Config())]
    for key, declared in ALL.items():
        assert declared.type in KINDS
        for shown in (everything, " ".join(by_section)):
            assert re.search(
                rf" --{re.escape(key)}\*? [^)]*.*?\) {re.escape(declared.metadata['doc'])} ", f"{shown} "
            ), key
    for part in ("{fp32, bf16, fp16}", "{'', cls, mean, last, cls_mean}", "--train.micro_batch_size* int or auto (def"):
        assert part in everything
    assert "More: --help model.dropout, --help model.lora" in " ".join(by_section)


def test_tasks_and_recipes_are_listed_with_what_they_are(columns, capsys):
    columns(80)
    assert list(help_pages.ROWS) == list(TASKS)
    recipes = help_pages.recipes_of_tasks()
    shown = unwrapped(help_of(capsys, train, "--help", "tasks"))
    for name, task in TASKS.items():
        names = ", ".join(x for x in (task.columns.text, task.columns.text_pair, task.columns.label) if x)
        assert f"{name}: {help_pages.ROWS[name]} columns {names}; recipe {', '.join(recipes[name])}" in shown
        assert recipes[name], "a shipped recipe of each task"
    assert recipes[MULTI_TASK]
    shown = unwrapped(help_of(capsys, train, "--help", "recipes"))
    for name in shipped_recipes():
        sentence = help_pages.first_sentence(name)
        assert f"{name}: {sentence}" in shown
        assert 20 < len(sentence) < 250, name
        assert "Command" not in sentence


@pytest.mark.parametrize(
    ("topic", "answer"),
    [
        ("optmi", "--help optmi: there is no such topic; did you mean 'optim'? All topics: tasks, "),
        ("taskz", "did you mean 'tasks'?"),
        ("optim.learning", "--help optim.learning: there is no such topic"),
        ("optim.lrr", "did you mean 'optim.lr'?"),
        ("nonsense", "choose from tasks, recipes, all, run, model"),
        ("nowhere.toml", "recipe 'nowhere.toml'"),
    ],
)
def test_an_unknown_topic_is_answered(topic, answer):
    with pytest.raises(ConfigError, match=re.escape(answer)):
        train.main(["--help", topic])


@pytest.mark.parametrize(
    ("topic", "shown"), [("lr", "--optim.lr float"), ("lora", "[model.lora]"), ("learning_rate", "--optim.lr float")]
)
def test_a_topic_may_be_the_last_part_of_a_name(topic, shown, capsys):
    assert help_of(capsys, train, "--help", topic).startswith((f"  {shown}", shown))


@cache
def another_value(key: str) -> str:
    """Return a value of a setting that is allowed and is not the default."""
    choices = ALL[key].metadata["choices"]
    for value in [choice for choice in choices if choice] or ["7", "1", "0.5", "true", "false"]:
        with suppress(ConfigError):
            changed = override(Config(), {key: value})
            if changed != Config() and not [x for x in out_of_range(changed) if x.startswith(f"{key} =")]:
                return value
    raise ValueError(key)


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_run_has_just_what_its_task_reads(task, tmp_path, columns, capsys):
    """What is not listed is refused as without effect; what is listed is not."""
    columns(80)
    config = override(Config(), {"run.task": task, "data.train": "x", "model.name": "x"})
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "recipe.toml").write_text(to_toml(config))
    listed = {}
    for command in (evaluate, predict):
        shown = help_of(capsys, command, str(tmp_path), "--help")
        assert f"this run ({task})" in unwrapped(shown)
        listed[command] = set(re.findall(r"^  --([a-z_0-9]+\.\S+)", shown, flags=re.MULTILINE))
    assert {"run.device", "data.max_length", "train.precision", "eval.batch_tokens"} <= listed[predict]
    assert listed[evaluate] - listed[predict] == {"data.test"}
    used = {key for key in ALL if is_used(key, ())}
    assert listed[predict] <= used
    for key in used:
        value = TASKS[task].long_texts[-1] if key == "data.long_texts" else another_value(key)
        refused = ""
        try:
            changed = override(config, {key: value})
            validate.task_settings(changed, TASKS[task])
        except ConfigError as error:
            refused = str(error)
        assert (f"has no effect on {task}" in refused or changed == config) == (key not in listed[predict]), key


MISTAKES = [
    (evaluate, "", "name one run folder: python -m engine.evaluate RUN"),
    (evaluate, "a b", "name one run folder, not 'a' and 'b'"),
    (evaluate, "movie_reviews", "'movie_reviews': no such run folder"),
    (evaluate, "run --data.test", "--data.test needs a value: --data.test=VALUE; --help data.test says what it is"),
    (evaluate, "run --input x", "--input is an option of engine.predict, not a setting"),
    (evaluate, "run --vary optim.lr=1,2", "--vary is an option of engine.study, not a setting"),
    (evaluate, "run --outptu=x", "unknown option --outptu; did you mean 'output'?"),
    (evaluate, "run --test x", "did you mean 'data.test'?"),
    (evaluate, "run data.test=x", "'data.test=x' is a setting: give it as --data.test=x"),
    (evaluate, "run -o x", "unknown option '-o'"),
    (evaluate, "--help optim", "--help optim: this command does not read it"),
    (predict, "run rows.csv", "name one run folder, not 'run' and 'rows.csv'"),
    (predict, "run --against x", "--against is an option of engine.evaluate"),
    (predict, "run --embedding", "did you mean '--embeddings'?"),
    (predict, "run --window", "--window needs a value"),
    (study, "", "name one recipe: python -m engine.study RECIPE"),
    (study, "moive_reviews", "did you mean 'movie_reviews'?"),
    (study, "movie_reviews --vary optim.lr 1,2", "name one recipe, not 'movie_reviews' and '1,2'"),
    (study, "movie_reviews --vary optim.lrr=1,2", "did you mean 'optim.lr'?"),
    (study, "movie_reviews --seeds", "--seeds needs a value"),
    (study, "movie_reviews --output x", "--output is an option of engine.evaluate"),
    (export, "run --to", "--to needs a value"),
    (export, "run --to onnx --run.device cuda", "--run.device has no effect here: an export is made on the CPU"),
    (export, "", "name one run folder: python -m engine.export RUN"),
    (report, "", "name a run folder: python -m engine.report RUN"),
    (report, "run --no-predit", "did you mean '--no-predict'?"),
    (new, "text-clasification --data rows.csv", "did you mean 'text-classification'?"),
    (new, "text-classification --data", "--data needs a value"),
    (new, "text-classification --data rows.csv --looop", "did you mean '--loop'?"),
    (prepare, "", "--out is missing: python -m data.prepare"),
    (prepare, "moive_reviews --out x", "did you mean 'movie_reviews'?"),
    (prepare, "movie_reviews x --out y", "one recipe at a time, not 'movie_reviews' and 'x': python -m data.prepare"),
    (train, "movie_reviews 5e-5", "one recipe at a time, not 'movie_reviews' and '5e-5': python -m engine.train"),
]


@pytest.mark.parametrize(("command", "line", "answer"), MISTAKES)
def test_a_mistake_of_typing_is_answered(command, line, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(answer)):
        command.main(line.split())
    assert not list(tmp_path.iterdir())


def test_options_of_every_command_are_known_to_the_others():
    for name, module in COMMANDS.items():
        own = [*getattr(module, "OPTIONS", {}), *getattr(module, "SWITCHES", {})]
        own += [*study_options.OPTIONS, *study_options.REPEATED] if module is study else []
        for option in (option.partition(" ")[0].replace("-", "_") for option in own):
            assert name in command_line.COMMAND_OPTIONS.get(option, "") or option in sections(Config()), option


def test_commands_are_named_as_they_were_started(monkeypatch):
    text = "python -m engine.train a; python -m engine.new TASK"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for words, shown in {
        ("python", "-m", "engine.train", "x"): text,
        ("python", "/bin/finetune-train", "-m"): "finetune-train a; finetune-new TASK",
        ("python", "my_loop.py"): text,
        ("python",): text,
    }.items():
        monkeypatch.setattr(sys, "orig_argv", list(words))
        assert commands.as_started(text) == shown
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "engine.train"])
    assert commands.as_started(text) == "torchrun -m engine.train a; python -m engine.new TASK"


def test_only_the_first_rank_prints_help(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert help_of(capsys, train, "--help") == ""


def test_is_used_knows_the_settings_of_training():
    assert [key for key in ("data.cache", "data.fold", "optim.lr") if is_used(key, ())] == []
