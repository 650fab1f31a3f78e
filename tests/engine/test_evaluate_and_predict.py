"""`python -m engine.evaluate` and `python -m engine.predict`, as a user types them, on one tiny trained run."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import arguments_of, run_module, run_training, write_reviews

from engine import cli, evaluate, predict
from engine import config as configs
from engine.config import Config, ConfigError
from engine.errors import TrainingError
from engine.metrics.text_classification import per_class_table
from models import ModelError


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """(its configuration, its validation file) of a run of 20 steps, left untouched by the tests."""
    folder = tmp_path_factory.mktemp("trained")
    validation = write_reviews(folder / "validation.jsonl", 41, seed=7)
    values = {
        "run.folder": str(folder / "run"),
        "run.device": "cpu",
        "model.name": str(checkpoint_folder),
        "data.train": str(reviews),
        "data.validation": str(validation),
        "data.max_length": 32,
        "train.global_batch_size": 16,
        "train.max_steps": 20,
        "optim.lr": 1e-3,
        "eval.every_steps": 5,
    }
    config = configs.override(Config(), values)
    run_training(config)
    return config, validation


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(run: Path | str, source: Path, output: Path, *more: str) -> list[dict]:
    assert predict.main([str(run), "--input", str(source), "--output", str(output), *more]) == 0
    return rows_of(output)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """The same rows in the format of the suffix."""
    with path.open("w", newline="") as stream:
        if path.suffix == ".jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


# ---- evaluate


def test_evaluation_gives_the_metrics_that_training_logged(trained, tmp_path, capsys):
    config, validation = trained
    logged = [row for row in rows_of(Path(config.run.folder) / "metrics.jsonl") if "evaluation" in row]
    for name, expected in (("best", [row for row in logged if row["best"]][-1]), ("last", logged[-1])):
        output = tmp_path / f"{name}.json"
        arguments = [f"{config.run.folder}/{name}", "--data.test", str(validation), "--output", str(output)]
        assert evaluate.main(arguments) == 0
        result = json.loads(output.read_text())
        assert result["checkpoint"].endswith(name)
        assert result["examples"] == 41
        for metric, value in expected["evaluation"].items():
            assert result[metric] == pytest.approx(value, rel=1e-6), (name, metric)
    printed = capsys.readouterr().out
    assert f"accuracy  {result['accuracy']:.4f}" in printed
    assert "predicted as negative, positive" in printed


def test_a_run_folder_stands_for_its_best(trained, tmp_path, capsys):
    config, validation = trained
    evaluate.main([config.run.folder, "--data.test", str(validation)])
    assert capsys.readouterr().out.startswith(f"{config.run.folder}/best: 41 examples of {validation}")
    run = shutil.copytree(config.run.folder, tmp_path / "run")
    shutil.rmtree(run / "best")
    evaluate.main([str(run), "--data.test", str(validation)])
    assert capsys.readouterr().out.startswith(f"{run}/last: ")


@pytest.mark.parametrize("against", [False, True])
def test_results_have_chinese_names_as_they_are(trained, tmp_path, against):
    _, validation = trained
    source, output = write_rows(tmp_path / "测试.jsonl", rows_of(validation)), tmp_path / "m.json"
    run = trained[0].run.folder
    assert (
        evaluate.main([run, "--data.test", str(source), "--output", str(output), *["--against", run][: 2 * against]])
        == 0
    )
    assert "测试.jsonl" in output.read_text(encoding="utf-8"), "not its escapes"


def test_the_test_file_of_the_recipe_is_the_default(trained, tmp_path):
    config, validation = trained
    run = tmp_path / "run"
    run_training(configs.override(config, {"run.folder": str(run), "data.test": str(validation), "train.max_steps": 2}))
    output = tmp_path / "metrics.json"
    assert evaluate.main([str(run), "--output", str(output)]) == 0
    final = rows_of(run / "metrics.jsonl")[-1]
    assert json.loads(output.read_text())["accuracy"] == pytest.approx(final["test_accuracy"])


@pytest.mark.parametrize("count", [3, 20, 26])
def test_class_table_shows_the_first_and_counts_the_others(count):
    confusion = torch.zeros(count, count, dtype=torch.float64)
    confusion[0, 0], confusion[1, -1], confusion[1, -2], confusion[-1, 0] = 7, 2, 3, 5
    statistics = torch.cat([torch.zeros(1), confusion.flatten()])
    lines = per_class_table(statistics, [f"class{i}" for i in range(count)]).splitlines()
    if count <= 20:
        assert len(lines) == count + 1
        assert lines[0].endswith(f", class{count - 1}")
        assert lines[2].split()[4:] == ["5", *["0"] * (count - 2), "3", "2"]
    else:
        assert len(lines) == 22
        assert lines[0].endswith(", class19 and 6 more")
        assert lines[2].split()[4:] == ["5", *["0"] * 20, "5"]
        assert lines[-1] == "and 6 more classes"


def test_only_a_file_that_is_split_needs_the_group_column(trained, tmp_path):
    config, validation = trained
    grouped = write_rows(tmp_path / "grouped.jsonl", [row | {"film": row["id"][:2]} for row in rows_of(validation)])
    run = tmp_path / "run"
    values = {"run.folder": str(run), "data.group_column": "film", "train.max_steps": 1, "data.test": str(validation)}
    split = {"data.train": str(grouped), "data.validation": ""}
    run_training(configs.override(config, values | split))
    assert evaluate.main([str(run), "--data.test", str(validation)]) == 0
    run_training(configs.override(config, values | {"run.folder": str(tmp_path / "given")}))  # nothing is split
    with pytest.raises(ValueError, match="no column 'film'"):
        run_training(configs.override(config, values | split | {"data.train": str(validation), "run.folder": "again"}))


def test_two_ranks_evaluate_and_predict_as_one_does(trained, tmp_path):
    config, validation = trained
    run = config.run.folder
    alone, together = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    expected = predictions(run, validation, alone)
    done = run_module("engine.predict", run, "--input", validation, "--output", together, "--run.device=cpu", ranks=2)
    assert done.returncode == 0, done.stderr
    found = rows_of(together)
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-6)


def test_p09_a_label_the_model_does_not_know_is_refused(trained, tmp_path, checkpoint_folder):
    config, validation = trained
    rows = [row | {"label": row["label"][:3]} for row in rows_of(validation)]
    renamed = write_rows(tmp_path / "renamed.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"renamed.jsonl:1: unknown label '\w+'.*the labels are 'negative', 'positive'"
    ):
        evaluate.main([config.run.folder, "--data.test", str(renamed)])
    changes = {"run.folder": str(tmp_path / "again"), "data.validation": "", "data.train": str(renamed)}
    again = configs.override(config, changes | {"model.name": f"{config.run.folder}/best"})
    with pytest.raises(ModelError, match=r"its head knows \['negative', 'positive'\].*head_init reset"):
        run_training(again)


# ---- predict


def test_predictions_keep_ids_and_order_and_are_distributions(trained, tmp_path):
    config, validation = trained
    found = predictions(config.run.folder, validation, tmp_path / "p.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in rows_of(validation)]
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-9)
        assert list(row["probabilities"]) == ["negative", "positive"]
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)


def test_accuracy_of_the_predictions_is_the_accuracy_evaluated(trained, tmp_path):
    config, validation = trained
    evaluate.main([config.run.folder, "--data.test", str(validation), "--output", str(tmp_path / "m.json")])
    found = predictions(config.run.folder, validation, tmp_path / "p.jsonl")
    right = sum(a["label"] == b["label"] for a, b in zip(found, rows_of(validation), strict=True))
    assert right / len(found) == pytest.approx(json.loads((tmp_path / "m.json").read_text())["accuracy"])


def test_p09_a_shuffled_file_is_predicted_the_same_by_id(trained, tmp_path):
    config, validation = trained
    expected = {row["id"]: row for row in predictions(config.run.folder, validation, tmp_path / "p.jsonl")}
    backwards = write_rows(tmp_path / "backwards.jsonl", rows_of(validation)[::-1])
    found = predictions(config.run.folder, backwards, tmp_path / "q.jsonl")
    assert [row["id"] for row in found] == list(expected)[::-1]
    for row in found:
        assert row["label"] == expected[row["id"]]["label"]
        assert row["probabilities"] == pytest.approx(expected[row["id"]]["probabilities"], abs=1e-6)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_every_format_is_predicted_alike_without_labels_or_ids(trained, tmp_path, suffix):
    config, validation = trained
    expected = predictions(config.run.folder, validation, tmp_path / "p.jsonl")
    source = write_rows(tmp_path / f"texts{suffix}", [{"text": row["text"]} for row in rows_of(validation)])
    found = predictions(config.run.folder, source, tmp_path / "q.jsonl")
    assert [row["id"] for row in found] == [str(i) for i in range(1, 42)]
    assert [row["probabilities"] for row in found] == [row["probabilities"] for row in expected]


def test_columns_are_named_by_the_recipe_unless_given(trained, tmp_path):
    config, validation = trained
    expected = predictions(config.run.folder, validation, tmp_path / "p.jsonl")
    rows = [{"key": row["id"], "sentence": row["text"]} for row in rows_of(validation)]
    source = write_rows(tmp_path / "other.csv", rows)
    with pytest.raises(ValueError, match=r"other.csv:1: no column 'text' .data.text_column.; the columns are"):
        predict.main([config.run.folder, "--input", str(source), "--output", str(tmp_path / "q.jsonl")])
    more = ["--data.text_column", "sentence", "--data.id_column=key"]
    assert predictions(config.run.folder, source, tmp_path / "q.jsonl", *more) == expected


def test_interrupted_prediction_keeps_the_old_file_only(trained, tmp_path, monkeypatch):
    config, validation = trained
    output = tmp_path / "p.jsonl"
    expected = predictions(config.run.folder, validation, output)
    written = []

    def dumps(row: dict, **options: object) -> str:
        written.append(row)
        if len(written) == 5:
            raise KeyboardInterrupt
        return "{}"

    monkeypatch.setattr(predict, "to_json", dumps)
    with pytest.raises(KeyboardInterrupt):
        predict.main([config.run.folder, "--input", str(validation), "--output", str(output)])
    monkeypatch.undo()
    assert rows_of(output) == expected
    assert list(tmp_path.iterdir()) == [output]


def test_a_disk_that_fails_is_one_sentence(trained, tmp_path, monkeypatch):
    def replace(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.os, "replace", replace)
    with pytest.raises(TrainingError, match="could not be written: No space left on device"):
        cli.write_output(tmp_path / "p.jsonl", ["{}"])
    assert list(tmp_path.iterdir()) == []


# ---- mistakes: each is one sentence that names what is wrong, before any work

MISTAKES = {
    "no run": ([], "name one run folder: python -m engine.predict RUN"),
    "two runs": (["RUN", "RUN"], "name one run folder"),
    "no such run": (["nowhere"], "'nowhere': no such run folder"),
    "not a run": (["."], "'.' is not a run folder: it has no best/, last/ or manifest.json"),
    "no input": (["RUN", "--output=p.jsonl"], "--input is missing"),
    "no output": (["RUN", "--input=texts.tsv"], "--output is missing"),
    "typing error": (["RUN", "--inptu=texts.tsv"], "unknown option --inptu; did you mean 'input'?"),
    "unknown setting": (
        ["RUN", "--data.text_colum=x"],
        "unknown option --data.text_colum; did you mean 'data.text_column'?",
    ),
    "training setting": (["RUN", "--optim.lr=1"], "--optim.lr has no effect on a trained model"),
    "other command": (["RUN", "--data.test=x"], "--data.test has no effect"),
    "bad value": (["RUN", "--input=texts.tsv", "--output=p.jsonl", "--run.device=gpu"], "run.device = 'gpu': choose"),
    "no such input": (["RUN", "--input=no.tsv", "--output=p.jsonl"], "no.tsv: no such file"),
    "unknown format": (
        ["RUN", "--input=texts.xls", "--output=p.jsonl"],
        "texts.xls: this is a spreadsheet; save its sheet as csv",
    ),
    "no folder": (["RUN", "--input=texts.tsv", "--output=no/p.jsonl"], "there is no folder 'no'"),
    "a folder": (["RUN", "--input=texts.tsv", "--output=."], "'.' is a folder; name a file"),
    "same file": (["RUN", "--input=texts.tsv", "--output=./texts.tsv"], "is the file that is read"),
    "too long": (["RUN", "--input=texts.tsv", "--output=p.jsonl", "--data.max_length=50"], "has 40 positions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_in_one_sentence(trained, tmp_path, monkeypatch, name):
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Path("texts.tsv").write_text("text\ngood film\n")
    run = trained[0].run.folder
    with pytest.raises(ValueError, match=re.escape(message)):
        predict.main([run if argument == "RUN" else argument for argument in arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["texts.tsv"]
    assert Path("texts.tsv").read_text() == "text\ngood film\n"


def test_evaluation_needs_a_labelled_file(trained):
    with pytest.raises(ConfigError, match=r"data.test is empty: --data.test FILE names the labelled file"):
        evaluate.main([trained[0].run.folder])


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    config, validation = trained
    run = shutil.copytree(config.run.folder, tmp_path / "run")
    weights = bytearray((run / "best" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "best" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"differs from what was written.*name another checkpoint folder of the run"):
        evaluate.main([str(run), "--data.test", str(validation)])
    assert evaluate.main([str(run / "last"), "--data.test", str(validation)]) == 0


# ---- the command line itself


@pytest.mark.parametrize(
    ("command", "own"), [(evaluate, ["--output", "--against"]), (predict, ["--input", "--output"])]
)
def test_help_shows_own_options_first_and_relevant_settings(capsys, command, own):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    shown = re.findall(r"^  --(\S+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert [f"--{name}" for name in shown[: len(own)]] == own
    assert {"run.device", "data.text_column", "data.bad_rows", "train.precision", "eval.batch_tokens"} <= set(shown)
    assert not {"optim.lr", "run.folder", "data.train", "train.global_batch_size", "eval.patience"} & set(shown)


def test_a_mistake_ends_the_process_with_code_2_and_no_traceback(trained, tmp_path):
    done = run_module("engine.evaluate", trained[0].run.folder, "--data.test", "no.tsv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no.tsv: no such file\n"


def test_the_recipe_of_a_run_reads_back_as_the_one_it_ran(trained, tmp_path):
    config, _ = trained
    stored = configs.read_recipe(f"{config.run.folder}/best/recipe.toml")
    assert stored == config
    assert arguments_of(stored, tmp_path / "again.toml") == [str(tmp_path / "again.toml")]
    assert configs.read_recipe(str(tmp_path / "again.toml")) == config
