"""The task table: each recipe is trained once and compared with what a user would have without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record, tasks
from engine.config import read_recipe
from engine.config.recipe import shipped_recipes

ROW = {
    "recipe": "relations",
    "task": "relation-extraction",
    "metric": "f1",
    "after": 0.93604,
    "before": 0.4351,
    "before_is": tasks.RANDOM_WEIGHTS,
    "cpu_seconds": 61.4,
    "commit": "0" * 40,
}


def test_table_has_every_shipped_recipe_once():
    assert sorted(shown.recipe for shown in tasks.TABLE) == sorted(shipped_recipes())


def test_recipe_is_trained_and_compared_and_not_again(tmp_path, monkeypatch, capsys):
    """The smallest recipe, for two steps; the second call finds both numbers in the record.

    The commit is that of the start, also where somebody commits meanwhile.
    """
    now = record.describe("tasks", [])
    monkeypatch.setattr(record, "describe", lambda name, results, arguments=(): now | {"results": results})
    output = tmp_path / "tasks.json"
    arguments = ["--only", "message_spans", "--output", str(output), "--train.max_steps=2"]
    assert tasks.main(arguments) == 0
    printed = capsys.readouterr().out
    (row,) = record.read(output)["results"]
    assert row["metric"] == "perplexity"
    assert row["before_is"] == tasks.UNTRAINED
    assert row["before"] > row["after"] > 1
    assert row["steps"] == 2
    assert min(row["cpu_seconds"], row["seconds"], row["peak_memory_mb"]) > 0
    assert "| span corruption | `message_spans` |" in printed
    assert tasks.main(arguments) == 0
    assert "message_spans: after" not in capsys.readouterr().out
    assert record.read(output)["results"] == [row]


def test_largest_class_is_that_of_the_evaluated_examples():
    """Film reviews: 524 of the 1,057 held-out sentences have the other label."""
    assert tasks.share_of_largest_class(read_recipe("review_modernbert")) == pytest.approx(533 / 1057)
    assert tasks.share_of_largest_class(read_recipe("fashion_mnist_scratch")) == pytest.approx(0.115)


def test_recipe_without_its_data_is_left_out_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tasks.main(["--only", "capitals", "--output", str(tmp_path / "tasks.json")]) == 0
    assert "python -m benchmarks.prepare capitals" in capsys.readouterr().out
    assert not (tmp_path / "tasks.json").exists()


def test_failed_training_is_named_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    def fail(recipe: str, settings: object, threads: int) -> None:
        raise tasks.FailedError(f"no room for {recipe}")

    monkeypatch.setattr(tasks, "train", fail)
    assert tasks.main(["--only", "relations", "questions", "--output", str(tmp_path / "tasks.json")]) == 0
    printed = capsys.readouterr().out
    assert "relations: after failed: no room for relations" in printed
    assert "questions: after failed: no room for questions" in printed


def test_changed_recipes_do_not_go_into_the_shipped_record(capsys):
    for arguments, problem in ((["--optim.lr", "1"], "add --output FILE"), (["--nonsense"], "unknown option")):
        with pytest.raises(SystemExit):
            tasks.main(arguments)
        assert problem in capsys.readouterr().err


def test_numbers_of_a_page_are_compared_with_the_record():
    (line,) = tasks.table([ROW])[2:]
    assert line.endswith("| 0.435 | 0.936 | 61 |")
    assert tasks.differences(f"a page\n\n{line}\n", [ROW]) == []
    wrong = line.replace("0.936", "0.963")
    assert tasks.differences(wrong, [ROW]) == ["relations: the page has 0.435, 0.963, 61; measured 0.435, 0.936, 61"]
    assert tasks.differences("no table", [ROW]) == ["relations: the page has no row; measured 0.435, 0.936, 61"]


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [("perplexity", 4142.7, "4,143"), ("perplexity", 41.38, "41.4"), ("bleu", 22.48, "22.5"), ("f1", 0.1, "0.100")],
)
def test_numbers_have_the_digits_of_their_metric(metric, value, shown):
    assert tasks.shown_number(metric, value) == shown


def test_shipped_record_has_rows_short_enough_for_a_page():
    if not tasks.OUTPUT.is_file():
        pytest.skip("not measured yet")
    lines = tasks.table(record.read(tasks.OUTPUT)["results"])
    assert max(map(len, lines)) <= 120
    assert json.loads(Path(tasks.OUTPUT).read_text())["benchmark"] == "tasks"
