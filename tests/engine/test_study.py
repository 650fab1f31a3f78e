"""The study command: the runs of a study, how it continues after a stop, its table and its plot."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import fmean, stdev

import pytest
from support.runs import QuietStop, StopAfter, run_module, run_training

from data.notes import display_width
from engine import config as configs
from engine import plugins, study, study_options, study_plots, study_report, study_runs
from engine.config import ConfigError


@pytest.fixture
def recipe(tiny, tmp_path: Path) -> Path:
    config = tiny(**{"train.max_steps": 6, "eval.every_steps": 3})
    path = tmp_path / "small.toml"
    path.write_text("\n".join(line for line in configs.to_toml(config).splitlines() if not line.startswith("folder")))
    return path


@pytest.fixture
def here(monkeypatch):
    """Run in this process; return (the commands, a box whose "steps" stops each run after this many)."""
    commands, box = [], {"steps": 0}

    def launch(_study, command, _environment, output, _link=None):
        commands.append(command)
        output.write_text("")
        run_training(configs.parse(command[3:], ""), StopAfter(box["steps"]) if box["steps"] else QuietStop())
        return 128 + signal.SIGTERM if box["steps"] else 0

    monkeypatch.setattr(study_runs, "launch", launch)
    return commands, box


def test_a_grid_is_run_once_and_its_table_matches_its_runs(recipe, here, tmp_path, capsys):
    commands, _ = here
    folder = tmp_path / "study"
    arguments = [
        str(recipe),
        "--vary",
        "regularize.l2=0,0.1",
        "--vary=optim.lr=1e-3",
        "--seeds=2",
        f"--folder={folder}",
    ]
    assert study.main(arguments) == 0
    assert len(commands) == 4
    assert study.main(arguments) == 0  # finds every run finished
    assert len(commands) == 4
    printed = capsys.readouterr().out
    assert (folder / "table.md").read_text().strip() in printed

    with (folder / "table.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["regularize.l2"] for line in lines] == ["0", "0.1"]
    for line in lines:
        runs = [folder / f"regularize.l2={line['regularize.l2']},optim.lr=1e-3" / f"seed{seed}" for seed in (0, 1)]
        rows = [[json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        best = [of_run[-1]["best_accuracy"] for of_run in rows]
        losses = [[row["loss"] for row in of_run if "lr" in row][-1] for of_run in rows]
        last = [[row["evaluation"]["loss"] for row in of_run if "evaluation" in row][-1] for of_run in rows]
        assert float(line["best_accuracy_mean"]) == pytest.approx(fmean(best))
        assert float(line["best_accuracy_sd"]) == pytest.approx(stdev(best))
        assert float(line["loss_gap_mean"]) == pytest.approx(fmean(last) - fmean(losses))
        for run, seed in zip(runs, (0, 1), strict=True):
            own = configs.read_recipe(str(run / "recipe.toml"))
            assert (own.run.seed, own.regularize.l2, own.optim.lr) == (seed, float(line["regularize.l2"]), 1e-3)
            assert not (run / "best").exists()


CHANGES = [
    *("--change", "L2, strong: regularize.l2=0.1"),
    "--change=stop early: eval.patience=1 eval.metric=loss 'data.text_column=text'",
]


def test_changes_are_compared_by_the_metric_of_the_recipe(recipe, here, tmp_path, capsys):
    commands, _ = here
    folder = tmp_path / "study"
    arguments = [str(recipe), *CHANGES, "--seeds=2", "--eval.train_subset_size=8", f"--folder={folder}"]
    assert study.main(arguments) == 0
    assert len(commands) == 6
    names = {"as it is": "as_it_is", "L2, strong": "L2,_strong", "stop early": "stop_early"}
    with (folder / "table.csv").open() as stream:
        lines = {line["change"]: line for line in csv.DictReader(stream)}
    assert list(lines) == list(names)
    as_it_is = {}
    for name, place in names.items():
        runs = [folder / place / f"seed{seed}" for seed in (0, 1)]
        settings = [configs.read_recipe(str(run / "recipe.toml")) for run in runs]
        assert [(c.run.seed, c.regularize.l2) for c in settings] == [(s, 0.1 * (name == "L2, strong")) for s in (0, 1)]
        assert {c.eval.patience for c in settings} == {int(name == "stop early")}
        rows = [[json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        at_best = [next(x for x in own if "evaluation" in x and x["step"] == own[-1]["best_step"]) for own in rows]
        at_last = [[x for x in own if "evaluation" in x][-1] for own in rows]
        for at, found in (("best", at_best), ("last", at_last)):  # the accuracy also of the run that watches the loss
            train, validation = ([x[part]["accuracy"] for x in found] for part in ("training", "evaluation"))
            gaps = [a - b for a, b in zip(train, validation, strict=True)]
            assert float(lines[name][f"{at}_train_accuracy_mean"]) == pytest.approx(fmean(train))
            assert float(lines[name][f"{at}_validation_accuracy_sd"]) == pytest.approx(stdev(validation))
            assert float(lines[name][f"{at}_accuracy_gap_mean"]) == pytest.approx(fmean(gaps))
            base = as_it_is.setdefault(at, validation)
            gains = [a - b for a, b in zip(validation, base, strict=True)]
            assert (lines[name][f"{at}_accuracy_gain_mean"] == "nan") == (name == "as it is")
            if name != "as it is":  # of each seed, not of the means
                assert float(lines[name][f"{at}_accuracy_gain_sd"]) == pytest.approx(stdev(gains))
    printed = capsys.readouterr().out
    assert "6 runs: 3 variants x 2 seeds" in printed
    head = "| change | runs | step | train accuracy | validation accuracy | accuracy gap | train loss |"
    assert printed.count(head) == 2  # the best evaluation and the last


def ended(best_step, *evaluations):
    """Return the rows of a finished run with {"training": {...}, "evaluation": {...}} at steps 1, 2, ..."""
    rows = [{"step": i, "loss": 9.0, "lr": 1e-3} for i in range(1, 21)]
    rows += [{"step": i, **row} for i, row in enumerate(evaluations, start=1)]
    return [*rows, {"step": 20, "end": "all steps done", "best_loss": 1.0, "best_step": float(best_step)}]


@pytest.mark.parametrize(("metric", "mode", "gap"), [("f1", "max", 0.4), ("mae", "min", -0.4), ("loss", "min", 1.5)])
def test_a_gap_is_positive_where_training_examples_are_better(metric, mode, gap):
    """0.9 on training and 0.5 on validation is overfitting if higher is better, and is not if lower is better."""
    first = {"training": {metric: 0.8, "loss": 1.0}, "evaluation": {metric: 0.7, "loss": 1.0}}
    second = {"training": {metric: 0.9, "loss": 0.5}, "evaluation": {metric: 0.5, "loss": 2.0}}
    found = study_report.summarize_run(ended(1, first, second), metric, mode)
    assert found[f"last {metric} gap"] == pytest.approx(gap)
    assert (found["last loss gap"], found["best loss gap"]) == (1.5, 0.0)
    assert (found["best step"], found["last step"]) == (1, 2)


@pytest.mark.parametrize(("mode", "gain"), [("max", 0.2), ("min", -0.2)])
def test_a_gain_compares_with_the_recipe_under_the_same_seed(mode, gain):
    runs = [
        {
            seed: study_report.summarize_run(ended(1, {"evaluation": {"f1": f1}}), "f1", mode)
            for seed, f1 in by_seed.items()
        }
        for by_seed in ({0: 0.1, 1: 0.5}, {1: 0.7, 2: 0.9})
    ]
    results = [study_report.VariantResult({"change": str(i)}, by_seed) for i, by_seed in enumerate(runs)]
    study_report.add_gains(results, "f1", mode)
    assert [found.get("best f1 gain") for found in results[1].runs.values()] == [pytest.approx(gain), None]
    assert "best f1 gain" not in results[0].runs[1]


def test_the_training_loss_without_a_training_subset():
    rows = ended(1, {"evaluation": {"f1": 0.7, "loss": 12.0}})
    rows[18]["loss"] = 7.0  # the last tenth of 20 is two
    assert study_report.summarize_run(rows, "f1", "max") == {
        "best f1": 0.7,
        "train loss": 8.0,
        "validation loss": 12.0,
        "loss gap": 4.0,
    }


def test_a_number_that_no_run_has_gets_no_column():
    """A task without a loss, and a run without a best evaluation because its metric was never a number."""
    row = {"training": {"f1": 0.5}, "evaluation": {"f1": math.nan}}
    results = [
        study_report.VariantResult({"change": "as it is"}, {0: study_report.summarize_run(ended(0, row), "f1", "max")})
    ]
    assert study_report.columns(results) == ["last step", "last train f1"]
    assert "| as it is | 1 | 1 | 0.500 |" in study_report.format_table(results)


@pytest.mark.parametrize("width", [50, 80, 150])
def test_the_table_on_a_terminal_fits_the_watched_metric_first(width):
    row = {"training": {"f1": 0.9, "loss": 0.1}, "evaluation": {"f1": 0.5, "loss": 0.2}}
    runs = {"seed0": study_report.summarize_run(ended(1, row), "f1", "max")}
    results = [
        study_report.VariantResult({"change": name}, {seed: dict(run) for seed, run in runs.items()})
        for name in ("as it is", "提前停止")
    ]
    study_report.add_gains(results, "f1", "max")
    lines = study_report.format_for_terminal(results, "f1", width).split("\n")
    assert all(display_width(line) <= width for line in lines)
    assert lines[0].split("  ")[0] == "variant"
    assert [len({display_width(line) for line in lines[:3]}), lines[2].split()[:2]] == [1, ["提前停止", "1"]]
    assert ("loss gap" in lines[0]) == (width == 150)
    assert any(line.startswith("gain: ") for line in lines) == (" gain" in lines[0])
    assert study_report.format_for_terminal(results, "f1", 0) == study_report.format_table(results)


def test_a_finished_run_of_other_settings_is_refused(recipe, here, tmp_path):
    folder = tmp_path / "study"
    weak, strong = (f"--change=L2: regularize.l2={value}" for value in (0.01, 0.1))
    assert study.main([str(recipe), weak, f"--folder={folder}"]) == 0
    with pytest.raises(ConfigError, match=r"L2/seed0 was run with other settings \(regularize.l2: 0.01 -> 0.1\)"):
        study.main([str(recipe), strong, f"--folder={folder}"])
    assert len(here[0]) == 2


def test_keep_weights_keeps_the_checkpoints(recipe, here, tmp_path):
    folder = tmp_path / "study"
    assert study.main([str(recipe), "--vary=regularize.l1=0", f"--folder={folder}", "--keep-weights=true"]) == 0
    assert (folder / "regularize.l1=0" / "seed0" / "best" / "model.safetensors").is_file()


def test_a_stopped_study_continues_from_its_checkpoint(recipe, here, tmp_path, capsys):
    commands, box = here
    folder = tmp_path / "study"
    arguments = [str(recipe), "--vary=regularize.l2=0,0.1", f"--folder={folder}"]
    box["steps"] = 4
    assert study.main(arguments) == 128 + signal.SIGTERM  # of a run, since the study got none
    assert len(commands) == 1  # the second run was not begun
    assert "stopped; the same command continues the study" in capsys.readouterr().err
    assert (folder / "table.md").read_text() == "no run has ended\n"
    box["steps"] = 0
    assert study.main(arguments) == 0
    steps = [json.loads(x)["step"] for x in (folder / "regularize.l2=0/seed0/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 6]


def test_a_sample_of_a_grid_depends_on_the_seed_only(recipe):
    values = ",".join(str(i / 100) for i in range(10))
    arguments = [str(recipe), f"--vary=regularize.l2={values}", f"--vary=model.dropout.head={values}", "--sample=7"]
    first, again = (study_options.parse(arguments)[0] for _ in range(2))
    assert first.variants == again.variants
    assert len({tuple(one.settings.items()) for one in first.variants}) == 7
    other, _ = study_options.parse([*arguments, "--run.seed=1"])
    assert other.variants != first.variants
    assert len(study_options.parse([*arguments[:-1], "--sample=500"])[0].variants) == 100


def test_a_study_knows_the_metrics_of_its_plugins(recipe, tmp_path):
    plugin = tmp_path / "my_metrics.py"
    plugin.write_text("METRICS = {'text-classification': {'always_one': lambda statistics, labels: 1.0}}\n")
    try:
        with pytest.raises(ConfigError, match="always_one"):
            study_options.parse([str(recipe), "--eval.metric=always_one"])
        arguments = [str(recipe), f"--run.plugins={plugin}", "--eval.metric=always_one", "--eval.mode=max"]
        assert study_options.parse(arguments)[0].metric == "always_one"
    finally:
        plugins.load_plugins(())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary=regularize.l3=1"], "unknown setting 'regularize.l3'; regularize has"),
        (["--vary=train.batch_size=8,16"], "train.batch_size is now train.global_batch_size"),
        (["--learning_rate=1"], "--learning_rate (Hugging Face's name) is here --optim.lr"),
        (["--vary=regularize.l2"], "should name each value once"),
        (["--vary=regularize.l2=1,1"], "should name each value once"),
        (["--vary=regularize.l2=1", "--vary=regularize.l2=2"], "is given twice"),
        (["--vary=regularize.l2=1,x"], "regularize.l2 = 'x' should be a finite number"),
        (["--vary=model.dropout.all=0.1,1.5"], "model.dropout.all = 1.5 must be in [0, 1)"),
        (["--vary=run.seed=1,2"], "run.seed is set by the study itself; use its options --folder, --seeds and --folds"),
        (["--run.folder=x"], "run.folder is set by the study itself"),
        (["--change=regularize.l2=1"], "should be a name and settings, each once, as in --change 'stop early: "),
        (["--change=model.name=package:x"], "should be a name and settings"),
        (["--change=x:"], "should be a name and settings"),
        (["--change"], "should be a name and settings"),
        (["--change=..: regularize.l2=1"], "should be a name and settings"),
        (["--change=x: regularize.l2=1 regularize.l2=2"], "should be a name and settings, each once"),
        (["--change=x: seq2seq.source_prefix='a"], "should be a name and settings"),
        (
            ["--change=x: regularize.l3=1"],
            "unknown setting 'regularize.l3'; regularize has",
        ),
        (["--change=x: regularize.l2=0"], "changes no setting: the recipe has these values already"),
        (["--change=x: eval.patience=-1"], "eval.patience = -1 must be >= 0"),
        (["--change=as it is: regularize.l2=1"], "another change has this name"),
        (
            ["--change=a/b: regularize.l2=1", "--change=a b: regularize.l2=2"],
            "this name, or one with the same folder name",
        ),
        (["--change=x: run.folder=y"], "run.folder is set by the study itself"),
        (["--change=x: regularize.l2=1", "--vary=regularize.l1=0,1"], "give one of them"),
        (["--change=x: regularize.l2=1", "--sample=1"], "give one of them"),
        (["--seeds=0"], "--seeds = '0' should be a whole number from 1"),
        (["another"], "name one recipe"),
    ],
)
def test_a_mistake_is_refused_before_any_run(recipe, here, arguments, message):
    with pytest.raises(ConfigError) as caught:
        study.main([str(recipe), *arguments])
    assert message in str(caught.value)
    assert here[0] == []


def test_a_failed_run_is_named_and_the_others_are_run(recipe, here, tmp_path, monkeypatch, capsys):
    ours = study_runs.launch

    def launch(its_study, command, environment, output, link=None):
        if "--regularize.l2=0" in command:
            output.write_text("much\nerror: a sentence\n")
            return 2
        return ours(its_study, command, environment, output)

    monkeypatch.setattr(study_runs, "launch", launch)
    folder = tmp_path / "study"
    assert study.main([str(recipe), "--vary=regularize.l2=0,0.1", f"--folder={folder}"]) == 1
    captured = capsys.readouterr()
    assert "regularize.l2=0/seed0: error: a sentence" in captured.err
    assert "| 0.1 | 1 |" in captured.out


@pytest.mark.parametrize(("sentence", "started"), [("error: no column", 3), ("error: seed {}", 8), ("killed", 8)])
def test_a_mistake_that_all_runs_share_is_said_thrice(recipe, tmp_path, monkeypatch, capsys, sentence, started):
    """Not of each of a hundred folds; what may be a mistake of some runs alone is tried in all."""
    outputs = []

    def launch(its_study, command, environment, output, link=None):
        outputs.append(output)
        output.write_text(sentence.format(len(outputs)))
        return 2

    monkeypatch.setattr(study_runs, "launch", launch)
    assert study.main([str(recipe), "--seeds=8", f"--folder={tmp_path / 'study'}"]) == 1
    assert len(outputs) == started
    shown = capsys.readouterr().err
    assert ("5 other runs were not started, since the first 3 failed alike" in shown) == (started == 3)


@pytest.mark.parametrize("training", [True, False], ids=["with_training_examples", "without"])
def test_a_plot_is_written(tmp_path, training):
    pytest.importorskip("matplotlib")
    results = []
    for i in range(3):
        found = [{"f1": 0.5 + i / 9, "loss": 1.0 + i + later} for later in (0, 1)]
        rows = ended(1, *({"evaluation": x} | ({"training": x} if training else {}) for x in found))
        results.append(
            study_report.VariantResult(
                {"change": f"change {i}"}, {k: study_report.summarize_run(rows, "f1", "max") for k in range(i + 1)}
            )
        )
    study_plots.plot(results, "f1", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_f05_a_signal_stops_the_runs_of_a_study(recipe, here, tmp_path, monkeypatch, capsys, number):
    """The runs are processes that wait; two are in progress, and the third is not started."""
    monkeypatch.undo()
    launch, before = study_runs.launch, signal.getsignal(number)
    codes = []

    def wait(its_study, command, environment, output, link=None):
        codes.append(launch(its_study, ["sleep", "60"], environment, output))
        return codes[-1]

    monkeypatch.setattr(study_runs, "launch", wait)
    threading.Timer(1, os.kill, (os.getpid(), number)).start()
    arguments = [str(recipe), "--vary=regularize.l2=0,0.1,0.2", "--workers=2", f"--folder={tmp_path / 'study'}"]
    assert study.main(arguments) == 128 + number
    assert codes == [-signal.SIGTERM] * 2
    assert capsys.readouterr().err == "stopped; the same command continues the study\n"
    assert signal.getsignal(number) == before


def test_a_run_that_was_killed_has_failed_and_the_others_are_run(recipe, here, tmp_path, monkeypatch, capsys):
    ours = study_runs.launch

    def kill(its_study, command, environment, output, link=None):
        output.write_text("step 1\n")
        return -signal.SIGKILL if "--regularize.l2=0" in command else ours(its_study, command, environment, output)

    monkeypatch.setattr(study_runs, "launch", kill)
    arguments = [str(recipe), "--vary=regularize.l2=0,0.1", f"--folder={tmp_path / 'study'}"]
    assert study.main(arguments) == 1
    assert "seed0: killed by SIGKILL; the same command continues it" in capsys.readouterr().err
    assert len(here[0]) == 1


def test_the_whole_error_of_a_run_is_shown(recipe):
    text = "step 1\nerror: a:1: one\na:2: two\n... and 3 more\n"
    assert study_runs.explain_failure(2, text) == "error: a:1: one\na:2: two\n... and 3 more"
    assert study_runs.explain_failure(1, "Traceback\n  in x\nValueError: y\n") == "ValueError: y"
    assert study_runs.explain_failure(3, "") == "ended with code 3"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_is_interrupted_and_continues(recipe, tmp_path, number):
    folder = tmp_path / "study"
    arguments = [str(recipe), "--vary=regularize.l2=0,0.1", "--workers=2", f"--folder={folder}"]
    longer = [*arguments, "--train.max_steps=400", "--eval.every_steps=100"]
    first = subprocess.Popen([sys.executable, "-m", "engine.study", *longer], stderr=subprocess.PIPE, text=True)
    logs = [folder / f"regularize.l2={value}" / "seed0" / "metrics.jsonl" for value in ("0", "0.1")]
    deadline = time.monotonic() + 120
    while not all(log.is_file() and log.stat().st_size for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(first.pid, number)
    _, printed = first.communicate(timeout=120)
    assert first.returncode == 128 + number
    assert "stopped; the same command continues the study" in printed
    done = run_module("engine.study", *longer)
    assert done.returncode == 0, done.stderr
    assert "| 0.1 | 1 |" in done.stdout
