"""The summary of a run before it starts, and the dry run, which prints all of it and leaves no file behind."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.runs import arguments_of, run_module
from support.task_settings import settings_of

import models
from data import MicroBatching, TextExamples, load_tokenizer
from data.examples import count_notes
from data.notes import count_of
from engine.config import ConfigError, LogSettings, read_recipe, to_recipe
from engine.first_screen import Summary, show
from engine.report.summary_file import DATA, MODEL, STEPS, read_summary
from engine.run_folder import SUMMARY
from engine.screen import Screen
from engine.summary import View, describe_examples, describe_run, describe_step
from engine.tasks import TASKS, read_training_data
from engine.validate import check_fit


def examples(*lengths: int, labels: list[int] | None = None, truncated: int = 0) -> TextExamples:
    total = sum(lengths)
    return TextExamples(
        input_ids=np.arange(total, dtype=np.int32),
        token_type_ids=np.zeros(total, dtype=np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None if labels is None else np.array(labels),
        ids=[f"r{i}" for i in range(len(lengths))],
        truncated=truncated,
        notes=count_notes((truncated, "text", "truncated to data.max_length")),
    )


@pytest.mark.parametrize(
    ("batch_size", "count", "limits", "text"),
    [
        (8, 16, MicroBatching(), "1 rank x accumulation 1 x micro-batch of 8 examples"),
        (8, 16, MicroBatching(max_examples=4), "1 rank x accumulation 2 x micro-batch of 4 examples"),
        (8, 16, MicroBatching(max_examples=1), "1 rank x accumulation 8 x micro-batch of 1 example"),
        (8, 16, MicroBatching(max_examples=3), "1 rank x accumulation 3 x micro-batch of 2 to 3 examples"),
        (8, 16, MicroBatching(max_examples=99), "1 rank x accumulation 1 x micro-batch of 8 examples"),
        (8, 16, MicroBatching(2, 0, 0, 2), "2 ranks x accumulation 2 x micro-batch of 2 examples"),
        (
            8,
            16,
            MicroBatching(0, 0, 0, 3),
            "3 ranks (2 with 3 examples, 1 with 2) x accumulation 1 x micro-batch of 2 to 3 examples",
        ),
        (
            9,
            18,
            MicroBatching(2, 0, 0, 4),
            "4 ranks (1 with 3 examples, 3 with 2) x accumulation 2 x micro-batch of 1 to 2 examples",
        ),
        (
            2,
            4,
            MicroBatching(0, 0, 0, 4),
            "4 ranks (2 with 1 example, 2 with 0) x accumulation 1 x micro-batch of 0 to 1 examples",
        ),
        (
            8,
            17,
            MicroBatching(),
            "1 rank x accumulation 1 x micro-batch of 8 examples; the last step of an epoch has 1 example",
        ),
        (8, 16, MicroBatching(max_tokens=20), "1 rank x about 4 micro-batches of at most 20 tokens"),
        (8, 16, MicroBatching(0, 20, 0, 2), "2 ranks x about 2 micro-batches of at most 20 tokens"),
        (
            1,
            2,
            MicroBatching(max_tokens=9),
            "1 rank x about 1 micro-batch of at most 9 tokens; 2 longer examples, each alone in a micro-batch",
        ),
        (1_000, 2_000, MicroBatching(), "1 rank x accumulation 1 x micro-batch of 1,000 examples"),
    ],
)
@pytest.mark.parametrize("rank", [0, "last"])
def test_step_in_words(batch_size, count, limits, text, rank):
    """The words are the same on every rank; each example has 10 tokens."""
    limits = replace(limits, rank=0 if rank == 0 else limits.world_size - 1)
    assert describe_step(batch_size, examples(*[10] * count), limits) == f"global_batch_size {batch_size:,} = {text}"


def test_step_is_at_most_the_data():
    assert describe_step(8, examples(*[10] * 5), MicroBatching(world_size=2)) == (
        "global_batch_size 8 is more than the training data has, so a step takes all 5 = "
        "2 ranks (1 with 3 examples, 1 with 2) x accumulation 1 x micro-batch of 2 to 3 examples"
    )


def test_example_above_the_limit_is_alone():
    text = describe_step(2, examples(3, 12), MicroBatching(max_tokens=9))
    assert text.endswith("about 2 micro-batches of at most 9 tokens; 1 longer example, each alone in a micro-batch")


def test_summary_of_examples_has_tokens_labels_and_notes():
    text = describe_examples("training", examples(2, 4, 6, labels=[0, 0, 1], truncated=1), ("no", "yes", "never"))
    assert text == (
        "training: 3 examples, 12 tokens (mean 4.0, 50% 4, 95% 5, 100% 6)\n"
        "  1 text truncated to data.max_length\n"
        "  labels: no 2, yes 1, never 0"
    )
    assert describe_examples("test", examples(1), ()) == "test: 1 example, 1 token (mean 1.0, 50% 1, 95% 1, 100% 1)"


def test_summary_of_scores_has_their_range():
    scored = replace(examples(1, 1, 1), labels=np.array([[0.5], [-999], [3]], dtype=np.float32))
    assert describe_examples("test", scored, ("stars",)).endswith("\n  stars: -999 to 3 (mean -331.8, 50% 0.5)")


def test_first_of_many_labels_are_shown():
    names = tuple(f"c{i}" for i in range(1_025))
    text = describe_examples("training", examples(1, labels=[0]), names)
    assert text.endswith("c19 0, and 1,005 more")
    assert "c20" not in text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(0, "text", "0 texts"), (1, "micro-batch", "1 micro-batch"), (1_000, "batch", "1,000 batches")],
)
def test_count_of(count, noun, text):
    assert count_of(count, noun) == text


def described(config) -> Summary:
    """Return the summary of a run of this recipe."""
    task = TASKS[config.run.task]
    settings = settings_of(config)
    train_rows, validation_rows, test_rows, labels, notes = read_training_data(task, settings, config.run.seed)
    model = models.from_pretrained(config.model.name, head=task.head, labels=labels, pooling="cls")
    tokenizer = load_tokenizer(models.hub.resolve(config.model.name))
    encode = task.encoder(tokenizer, settings, model.labels)
    sets = (encode(train_rows), encode(validation_rows), encode(test_rows))
    return describe_run(config, model, tokenizer, sets, notes, 20, MicroBatching(), torch.device("cpu"))


def test_the_report_finds_the_parts_of_a_summary(tiny, tmp_path):
    whole = described(tiny()).full
    (tmp_path / SUMMARY).write_text(whole)
    found = read_summary(tmp_path)
    assert "\n\n".join(found[title] for title in (MODEL, DATA, STEPS)) + "\n" == whole
    assert found[MODEL].startswith("weights: ")
    assert found[DATA].startswith("training: 108 examples")
    assert found[STEPS].startswith("parameters: ")


def test_summary_of_a_run_has_model_data_and_plan(tiny, reviews):
    text = described(tiny(**{"data.test": str(reviews)})).full
    assert "weights: " in text
    assert "initialised" in text
    assert "training: 108 examples" in text
    assert "validation: 12 examples" in text
    assert "test: 120 examples" in text
    assert "parameters: 18,338, 18,338 of them trained\n20 steps of 16 examples, 2.857 epochs\n" in text
    assert "schema = " not in text, "the recipe is in the run folder; only a dry run prints it"
    assert "first encoded" not in text
    assert "test: " not in described(tiny()).full


def test_class_without_training_examples_is_a_warning(tiny, tmp_path):
    rows = [{"text": "good film", "label": f"class{i % 3}", "film": f"f{i % 3}"} for i in range(30)]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data.train": str(tmp_path / "films.jsonl"), "train.global_batch_size": 4}
    assert "warning: no training" not in described(tiny(**settings)).full
    # The validation data is one film of three: all examples of a class.
    text = described(tiny(**settings | {"data.group_column": "film"})).full
    assert re.search(r"^warning: no training example of 'class\d'$", text, re.MULTILINE)
    names = tuple(f"class{i}" for i in range(30))
    text = described(tiny(**settings | {"data.labels": names})).full
    assert f"warning: no training example of {', '.join(map(repr, names[3:23]))}, and 7 more" in text


@pytest.mark.parametrize(("classes", "hidden"), [(5, ["top5_accuracy"]), (6, [])])
def test_metrics_that_cannot_compare_models_are_hidden(classes, hidden):
    images = SimpleNamespace(labels=np.arange(classes))
    names = tuple(map(str, range(classes)))
    assert View("", TASKS["image-classification"], "accuracy", (images,) * 3, names).hidden_metrics() == hidden


def test_a_run_shows_no_metric_that_is_always_the_same(tiny, tmp_path):
    rows = [{"id": i, "text": "a bad film", "label": "negative"} for i in range(9)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert described(tiny()).columns == ("accuracy", "precision", "recall", "loss")
    assert described(tiny(**{"data.validation": str(tmp_path / "one.jsonl")})).columns == ("accuracy", "loss")


def test_dry_run_prints_everything_and_leaves_no_file(tiny, tmp_path):
    config = tiny(**{"train.global_batch_size": 15, "train.micro_batch_size": 4})
    done = run_module("engine.train", *arguments_of(config, tmp_path / "mine.toml"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    recipe, _, rest = done.stdout.partition("\nweights: ")
    (tmp_path / "printed.toml").write_text(recipe)
    assert read_recipe(str(tmp_path / "printed.toml")) == config
    assert "micro_batch_size = 4  # default: 0\n" in recipe
    assert "beta1" not in recipe, "a default"
    for expected in (
        "loaded ",
        "initialised ",
        "training: 108 examples, ",
        "validation: 12 examples, ",
        "labels: negative ",
        "first encoded examples:\n  id r",
        "    [CLS] ",
        "\n    [2, ",
        "parameters: 18,338, 18,338 of them trained\n20 steps of 15 examples, 2.5 epochs\n",
        "global_batch_size 15 = 1 rank x accumulation 4 x micro-batch of 3 to 4 examples; "
        "the last step of an epoch has 3 examples\n",
    ):
        assert expected in rest
    assert "loss" not in done.stdout.partition("first encoded")[2], "nothing was trained"


@pytest.mark.parametrize("shows_all", [False, True])
def test_a_dry_run_prints_the_recipe_in_short_or_in_full(tiny, tmp_path, shows_all):
    config = tiny(**{"run.dry_run": True, "run.show_all": shows_all})
    printed = described(config).full.partition("\nweights: ")[0]
    (tmp_path / "printed.toml").write_text(printed)
    assert read_recipe(str(tmp_path / "printed.toml")) == to_recipe(config)
    assert ("beta1 = 0.9" in printed) == shows_all


def test_texts_and_ids_must_fit_the_model(tiny, checkpoint_folder):
    config = tiny()
    model = models.from_pretrained(checkpoint_folder)
    tokenizer = load_tokenizer(checkpoint_folder)
    check_fit(tiny(**{"data.max_length": 40}), model, tokenizer)
    for length, message in ((41, "has 40 positions: lower data.max_length"), (2, "no room beside 2 special tokens")):
        with pytest.raises(ConfigError, match=f"data.max_length = {length}.*{message}"):
            check_fit(tiny(**{"data.max_length": length}), model, tokenizer)
    larger = SimpleNamespace(get_vocab=lambda: {"<ent>": 25, "a": 0}, num_special_tokens_to_add=lambda pair: 2)
    with pytest.raises(ConfigError, match="the tokenizer gives '<ent>' the id 25, the embedding has 25 rows"):
        check_fit(config, model, larger)


@pytest.mark.parametrize(
    ("level", "wanted"), [("info", ["summary", "warning", "note"]), ("quiet", ["warning"])], ids=["info", "quiet"]
)
def test_a_dry_run_as_json_has_the_summary(level, wanted, capsys):
    found = Summary("all of it", {}, ["a warning"], ["a note"], "", (), {})
    show(found, Screen(LogSettings(level=level, json=True)), is_dry_run=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [name for row in rows for name in row] == wanted
