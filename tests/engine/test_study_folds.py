"""Cross-validation: each fold is the run by hand, and every row of every task is predicted once by another fold."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
from support.cases import predictions
from support.runs import QuietStop, logged_rows, run_training
from support.task_data import write
from support.task_settings import settings_of

from engine import config as configs
from engine import held_out, study, study_runs
from engine.config import Config, ConfigError
from engine.tasks import TASKS, read_training_data
from engine.tasks.task import no_split_labels

FOLDS = 3


@pytest.fixture
def recipe(tiny, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    text = configs.to_toml(tiny(**{"train.max_steps": 4, "eval.every_steps": 2}))
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("folder")))
    return path


@pytest.fixture
def here(monkeypatch) -> list[list[str]]:
    """Run the commands of a study in this process; return them."""
    commands = []

    def launch(_study, command, _environment, output, _link=None):
        commands.append(command)
        output.write_text("")
        if command[2] == "engine.held_out":
            return held_out.main([*command[3:], "--run.device=cpu"])
        run_training(configs.parse(command[3:], ""), QuietStop())
        return 0

    monkeypatch.setattr(study_runs, "launch", launch)
    return commands


def test_folds_are_the_runs_by_hand_and_predict_every_row(recipe, here, reviews, tmp_path, capsys):
    folder = tmp_path / "study"
    arguments = [str(recipe), f"--folds={FOLDS}", f"--folder={folder}", "--keep-weights"]
    assert study.main(arguments) == 0
    assert study.main(arguments) == 0  # finds all of it done
    assert len(here) == 2 * FOLDS
    assert "3 runs: 1 variant x 1 seed x 3 folds" in capsys.readouterr().out
    ids = [json.loads(line)["id"] for line in reviews.read_text().splitlines()]
    joined = [json.loads(line) for line in (folder / "as_it_is" / "out_of_fold-seed0.jsonl").read_text().splitlines()]
    assert [row["id"] for row in joined] == ids
    best, seen = [], []
    for number in range(1, FOLDS + 1):
        by_hand = tmp_path / f"by hand {number}"
        settings = [f"--data.fold={number}/{FOLDS}", f"--run.folder={by_hand}"]
        run_training(configs.parse([str(recipe), *settings], ""), QuietStop())
        run = folder / "as_it_is" / f"seed0-fold{number}"
        assert logged_rows(run) == logged_rows(by_hand)
        best.append(logged_rows(run)[-1]["best_accuracy"])
        of_fold = [json.loads(line) for line in (run / study_runs.HELD_OUT).read_text().splitlines()]
        seen += [row["row"] for row in of_fold]
        all_rows = predictions(by_hand, Path(reviews))
        for row in of_fold:  # by engine.predict, in other batches
            ours = all_rows[row["row"]]
            assert (row["id"], row["label"]) == (ours["id"], ours["label"])
            assert row["logits"] == pytest.approx(ours["logits"], abs=1e-5)
            assert {key: value for key, value in row.items() if key != "row"} == joined[row["row"]]
    assert sorted(seen) == list(range(len(ids)))
    (line,) = csv.DictReader((folder / "table.csv").open())
    assert float(line["best_accuracy_mean"]) == pytest.approx(fmean(best))
    assert float(line["best_accuracy_sd"]) == pytest.approx(stdev(best))
    records = json.loads((folder / "runs.json").read_text())
    assert [record["best"]["best accuracy"] for record in records] == best
    assert [[row["step"] for row in record["evaluations"]] for record in records] == [[2, 4]] * FOLDS
    assert " ".join(f"{value:.3f}" for value in best) in (folder / "table.md").read_text()


def fold_settings(task: str, folder: Path, number: int) -> dict[str, object]:
    written = write(task, folder, 24)
    written.pop("data.validation")
    return written | {"data.fold": f"{number}/{FOLDS}", "run.folder": str(folder / f"run{number}")}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_folds(task, tmp_path):
    found = []
    for number in range(1, FOLDS + 1):
        config = configs.override(Config(), fold_settings(task, tmp_path, number))
        configs.check(config)
        data = read_training_data(TASKS[task], settings_of(config), 0)
        held = {(row.id, row.line) for row in data.validation}
        assert held.isdisjoint((row.id, row.line) for row in data.train)
        found += held
        has_labels = TASKS[task].stratify or TASKS[task].split_labels is not no_split_labels
        assert any("not stratified" in note for note in data.notes) == (not has_labels)
    assert len(found) == len(set(found)) == len(data.train) + len(data.validation)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_held_out_rows_of_every_task_are_predicted(task, tmp_path):
    config = configs.override(Config(), fold_settings(task, tmp_path, 2) | {"train.max_steps": 2})
    configs.check(config)
    assert run_training(config) is not None
    validation = read_training_data(TASKS[task], settings_of(config), 0).validation
    output = tmp_path / "held_out.jsonl"
    assert held_out.main([config.run.folder, f"--output={output}", "--run.device=cpu"]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    assert [row["id"] for row in rows] == [row.id for row in validation]
    assert all(TASKS[task].predicts in row for row in rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.fold": "0/5"}, "data.fold = '0/5' should be K/N, the K-th of N folds, such as 1/5"),
        ({"data.fold": "five"}, "data.fold = 'five' should be K/N"),
        ({"data.fold": "1/5", "data.validation": "v"}, "data.fold = '1/5' holds out a part of data.train, but"),
    ],
)
def test_a_fold_that_makes_no_sense_is_refused(tiny, values, message):
    with pytest.raises(ConfigError) as caught:
        tiny(**values)
    assert message in str(caught.value)


def test_a_run_without_a_fold_has_nothing_held_out_by_it(recipe, here, reviews, tmp_path):
    config = configs.parse([str(recipe), f"--data.validation={reviews}", f"--run.folder={tmp_path / 'x'}"], "")
    run_training(config)
    with pytest.raises(ConfigError, match="this run held out no rows of the file"):
        held_out.main([config.run.folder, f"--output={tmp_path / 'out.jsonl'}"])
