"""A user's mistake ends with code 2 and one message, which names the mistake and a remedy; no file is left behind.

Each case is a function that makes the mistake and returns the arguments of `engine.train`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.runs import arguments_of, run_module, run_training

import models
from engine import cli, train
from engine.config import RECIPES, shipped_recipes

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, about pytest's stderr


@dataclass
class Bench:
    """The files of a case: a folder of its own, and a tiny checkpoint, data and recipe without a mistake."""

    folder: Path
    checkpoint: Path
    tiny: Callable[..., Any]
    cleanup: ExitStack

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def arguments(self, **changes: object) -> list[str]:
        """Return the arguments of a run that works, with these changes; "__" in a name means a dot."""
        options = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return arguments_of(self.tiny(), self.folder / "recipe.toml") + options

    def file(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def reviews(self, name: str, *labels: str, text: str = "text") -> Path:
        rows = [json.dumps({"id": str(i), text: "a good film", "label": label}) for i, label in enumerate(labels)]
        return self.file(name, "\n".join(rows) + "\n")

    def copy_of_checkpoint(self) -> Path:
        return Path(shutil.copytree(self.checkpoint, self.folder / "copy"))

    def train(self, **changes: object) -> None:
        """Train for two steps in `self.run`."""
        run_training(self.tiny(**{"train.max_steps": 2, "eval.every_steps": 2} | changes))


@pytest.fixture
def bench(tiny, checkpoint_folder, tmp_path) -> Iterator[Bench]:
    with ExitStack() as cleanup:
        yield Bench(tmp_path, checkpoint_folder, tiny, cleanup)


# Settings


def unknown_key(b):
    return b.arguments(train__global_bach_size=3)


def unknown_key_in_the_recipe(b):
    return [str(b.file("recipe.toml", "schema = 2\n[optim]\nlearning_rat = 1e-4\n"))]


def wrong_type(b):
    return b.arguments(train__global_batch_size="many")


def out_of_range(b):
    return b.arguments(model__dropout__all=1.5)


def missing_recipe(b):
    return ["movie_review"]


def unknown_task(b):
    return b.arguments(run__task="text-clasification")


def unknown_metric(b):
    return b.arguments(eval__metric="acuracy")


# Data


def missing_data_file(b):
    return b.arguments(data__train=b.folder / "nowhere.jsonl")


def missing_validation_file(b):
    return b.arguments(data__validation=b.folder / "nowhere.jsonl")


def unknown_kind_of_file(b):
    return b.arguments(data__train=b.file("rows.xlsx", ""))


def empty_file(b):
    return b.arguments(data__train=b.file("rows.tsv", ""))


def header_only(b):
    return b.arguments(data__train=b.file("rows.tsv", "text\tlabel\n"))


def one_class_only(b):
    return b.arguments(data__train=b.reviews("rows.jsonl", "good", "good", "good"))


def one_row_of_two(b):
    return b.arguments(data__train=b.reviews("rows.jsonl", "good", "bad"), data__validation_fraction=0.9)


def unknown_label_in_validation(b):
    return b.arguments(data__validation=b.reviews("val.jsonl", "positive", "neutral"))


def label_not_declared(b):
    return b.arguments(data__train=b.reviews("rows.jsonl", "yes", "no", "maybe"), data__labels="yes,no")


def text_column_absent(b):
    return b.arguments(data__train=b.reviews("rows.jsonl", "good", "bad", text="sentence"))


def text_column_absent_in_tsv(b):
    return b.arguments(data__train=b.file("rows.tsv", "sentence\tlabel\ngood\tyes\n"))


def row_without_its_label(b):
    return b.arguments(data__train=b.file("rows.jsonl", '{"text": "a", "label": "x"}\n\n{"text": "b"}\n'))


def broken_json(b):
    return b.arguments(data__train=b.file("rows.jsonl", '{"text": "a", "label": "x"}\n{"text": \n'))


# The model


def missing_checkpoint(b):
    return b.arguments(model__name=b.folder / "nowhere")


def checkpoint_is_a_file(b):
    return b.arguments(model__name=b.checkpoint / "model.safetensors")


def checkpoint_without_weights(b):
    (b.copy_of_checkpoint() / "model.safetensors").unlink()
    return b.arguments(model__name=b.folder / "copy")


def checkpoint_without_tokenizer(b):
    (b.copy_of_checkpoint() / "tokenizer.json").unlink()
    return b.arguments(model__name=b.folder / "copy")


def checkpoint_without_config(b):
    (b.copy_of_checkpoint() / "config.json").unlink()
    return b.arguments(model__name=b.folder / "copy")


def truncated_weights(b):
    file = b.copy_of_checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return b.arguments(model__name=b.folder / "copy")


def other_weights_than_recorded(b):
    return b.arguments(model__sha256="0" * 64)


def head_of_other_labels(b):
    model = models.from_pretrained(b.checkpoint, head="sequence-classification", labels=["ham", "spam"])
    models.save_pretrained(model, b.copy_of_checkpoint())
    return b.arguments(model__name=b.folder / "copy")


def longer_than_the_positions(b):
    return b.arguments(data__max_length=512)


def shorter_than_the_special_tokens(b):
    return b.arguments(data__max_length=2)


# The run folder


def folder_in_use(b):
    b.run.mkdir()
    hold = f"import fcntl, sys; f = open({str(b.run / '.lock')!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
    holder = b.cleanup.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    b.cleanup.callback(holder.kill)
    return b.arguments()


def folder_holds_a_run(b):
    b.train()
    return b.arguments(train__max_steps=2, eval__every_steps=2)


def no_checkpoint_to_resume(b):
    return [*b.arguments(), "--resume"]


def another_recipe_at_resume(b):
    b.train()
    return [*b.arguments(train__max_steps=2, eval__every_steps=2, optim__lr=0.5), "--resume"]


def folder_below_a_file(b):
    return b.arguments(run__folder=b.file("occupied", "") / "run")


def folder_that_cannot_be_made(b):
    return b.arguments(run__folder="/proc/run")


MISTAKES: list[tuple[Callable[[Bench], list[str]], list[str]]] = [
    (unknown_key, ["unknown setting 'train.global_bach_size'", "did you mean 'train.global_batch_size'?"]),
    (unknown_key_in_the_recipe, ["{folder}/recipe.toml", "'optim.learning_rat'", "optim has name, lr, "]),
    (wrong_type, ["train.global_batch_size = 'many'", "a whole number"]),
    (out_of_range, ["model.dropout.all = 1.5", "in [0, 1)"]),
    (missing_recipe, ["recipe 'movie_review'", "No such file", "did you mean 'movie_reviews'?"]),
    (unknown_task, ["run.task = 'text-clasification'", "did you mean 'text-classification'?"]),
    (unknown_metric, ["eval.metric = 'acuracy'", "f1", "did you mean 'accuracy'?"]),
    (missing_data_file, ["{folder}/nowhere.jsonl", "no such file"]),
    (missing_validation_file, ["{folder}/nowhere.jsonl", "no such file"]),
    (unknown_kind_of_file, ["{folder}/rows.xlsx", "a spreadsheet", "csv in UTF-8"]),
    (empty_file, ["{folder}/rows.tsv", "no rows"]),
    (header_only, ["{folder}/rows.tsv", "no rows"]),
    (one_class_only, ["{folder}/rows.jsonl", "'label'", "only one class, 'good'", "two"]),
    (one_row_of_two, ["data.validation_fraction = 0.9", "leaves nothing to train on"]),
    (unknown_label_in_validation, ["{folder}/val.jsonl:2:", "'neutral'", "'negative', 'positive'"]),
    (label_not_declared, ["{folder}/rows.jsonl:3:", "'maybe'", "'yes', 'no'"]),
    (text_column_absent, ["{folder}/rows.jsonl:", "no column 'text'", 'did you mean data.text_column = "sentence"?']),
    (text_column_absent_in_tsv, ["{folder}/rows.tsv:1:", "no column 'text'", "'sentence'"]),
    (row_without_its_label, ["{folder}/rows.jsonl:3:", "no column 'label'"]),
    (broken_json, ["{folder}/rows.jsonl:2:", "not JSON"]),
    (missing_checkpoint, ["model.name = '{folder}/nowhere'", "no such folder"]),
    (checkpoint_is_a_file, ["model.name = ", "is a file", "name the folder"]),
    (checkpoint_without_weights, ["{folder}/copy", "no model.safetensors"]),
    (checkpoint_without_tokenizer, ["{folder}/copy", "no tokenizer.json"]),
    (checkpoint_without_config, ["{folder}/copy", "no config.json"]),
    (truncated_weights, ["{folder}/copy/model.safetensors", "not a complete safetensors file"]),
    (other_weights_than_recorded, ["sha256", "0" * 64]),
    (head_of_other_labels, ["{folder}/copy", "['ham', 'spam']", "['negative', 'positive']", "--model.head_init reset"]),
    (longer_than_the_positions, ["data.max_length = 512", "40 positions"]),
    (shorter_than_the_special_tokens, ["data.max_length = 2", "special tokens"]),
    (folder_in_use, ["run.folder = '{folder}/run'", "in use by another run", "another folder"]),
    (folder_holds_a_run, ["run.folder = '{folder}/run'", "already holds a run", "--resume", "--run.folder"]),
    (no_checkpoint_to_resume, ["--resume", "run.folder = '{folder}/run'", "--run.resume auto"]),
    (another_recipe_at_resume, ["optim.lr: 0.001 -> 0.5", "--run.folder", "--run.allow_changes"]),
    (folder_below_a_file, ["run.folder = '{folder}/occupied/run'", "cannot be written", "Not a directory"]),
    (folder_that_cannot_be_made, ["run.folder = '/proc/run'", "cannot be written"]),
]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below the folder, with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def outcome(arguments: list[str], monkeypatch, capsys) -> tuple[object, str, str]:
    """Run `python -m engine.train` in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["engine.train", *arguments])
    capsys.readouterr()
    code: object = 0
    try:
        cli.run_command(train.main)  # torch's `record` turns SystemExit(0) into a plain return
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("make", "named"), MISTAKES, ids=[make.__name__ for make, _ in MISTAKES])
def test_mistake_is_answered_in_one_message(bench, make, named, monkeypatch, capsys):
    arguments = make(bench)
    before = tree(bench.folder)
    code, _, stderr = outcome(arguments, monkeypatch, capsys)
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("error: ") == 1
    assert "Traceback" not in stderr
    for part in named:
        assert part.replace("{folder}", str(bench.folder)) in stderr
    assert tree(bench.folder) == before


PREPARED = [
    name for name in shipped_recipes() if '"datasets/' in (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
]


@pytest.mark.parametrize("recipe", PREPARED)
def test_recipe_without_its_files_names_its_prepare_command(recipe, tmp_path, monkeypatch, capsys):
    """Its data or its model, in one sentence for all of them; the hub is not asked for a model of that name."""
    monkeypatch.chdir(tmp_path)
    code, _, stderr = outcome([recipe], monkeypatch, capsys)
    assert code == 2
    assert stderr.startswith(f"error: datasets/{recipe}")
    assert re.search(rf": no such \w+; `python -m benchmarks.prepare {recipe}` writes (it|them)\n$", stderr)
    assert stderr.count("\n") == 1


def test_mistake_ends_the_command_without_a_traceback(bench):
    """As a process of its own, which prints nothing else either."""
    done = run_module("engine.train", *unknown_label_in_validation(bench), cwd=bench.folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*/val.jsonl:2: unknown label 'neutral'; .*\n\(data.bad_rows .*\n", done.stderr)
    assert not bench.run.exists()


# No mistakes, though they look like some


def test_truncated_texts_are_counted(bench, monkeypatch, capsys):
    arguments = bench.arguments(data__max_length=8, train__max_steps=1)
    code, stdout, _ = outcome(arguments, monkeypatch, capsys)
    assert code == 0
    lines = [line for line in stdout.splitlines() if "truncated to data.max_length" in line]
    assert len(lines) == 2  # of the training and the validation data


def test_batch_larger_than_the_data_takes_all_of_it(bench, monkeypatch, capsys):
    code, stdout, _ = outcome(bench.arguments(train__global_batch_size=1000, train__max_steps=1), monkeypatch, capsys)
    assert code == 0
    assert "a step takes all 108" in stdout


def test_p17_batch_may_be_smaller_than_the_number_of_ranks(bench):
    """A rank without an example takes part in every step."""
    arguments = bench.arguments(train__global_batch_size=1, train__max_steps=2, eval__every_steps=2)
    done = run_module("engine.train", *arguments, ranks=2, cwd=bench.folder)
    assert done.returncode == 0, done.stderr
    assert "step = 2 ranks (1 with 1 example, 1 with 0)" in done.stdout
    assert "all steps done" in done.stdout


def test_closed_pipe_ends_no_command_and_shows_no_traceback():
    """`python -m engine.train ... | head`."""
    code = "from engine.cli import run_command; run_command(lambda a: (print('x' * 10**6), 0)[1])"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(models.__file__).parent.parent,
    )
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(60) == 0
