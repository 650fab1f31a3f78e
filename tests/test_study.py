"""The study command: which runs a grid is, that it goes on where it was, and what its table says."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import pytest
from conftest import QuietStop, StopAfter, run_module, run_training

from engine import config as configs
from engine import study
from engine.config import ConfigError


@pytest.fixture(autouse=True)
def _handler_of_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def recipe(tiny, tmp_path: Path) -> Path:
    config = tiny(**{"train.max_steps": 6, "eval.every": 3})
    path = tmp_path / "small.toml"
    path.write_text("\n".join(line for line in configs.to_toml(config).splitlines() if not line.startswith("folder")))
    return path


@pytest.fixture
def here(monkeypatch):
    """Runs in this process; (their commands, a box whose "steps" stops a run after so many)."""
    commands, box = [], {"steps": 0}

    def launch(_study, command, _environment, printed):
        commands.append(command)
        printed.write_text("")
        run_training(configs.parse(command[3:], ""), StopAfter(box["steps"]) if box["steps"] else QuietStop())
        return 128 + signal.SIGTERM if box["steps"] else 0

    monkeypatch.setattr(study, "launch", launch)
    return commands, box


def test_a_grid_is_run_once_and_its_table_is_that_of_its_runs(recipe, here, tmp_path, capsys):
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
    assert study.main(arguments) == 0  # which finds that all has been done
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
        assert float(line["best_mean"]) == pytest.approx(fmean(best))
        assert float(line["best_sd"]) == pytest.approx(stdev(best))
        assert float(line["gap_mean"]) == pytest.approx(fmean(last) - fmean(losses))
        for run, seed in zip(runs, (0, 1), strict=True):
            own = configs.read_recipe(str(run / "recipe.toml"))
            assert (own.run.seed, own.regularize.l2, own.optim.lr) == (seed, float(line["regularize.l2"]), 1e-3)
            assert not (run / "best").exists()


def test_weights_are_kept_when_asked_for(recipe, here, tmp_path):
    folder = tmp_path / "study"
    assert study.main([str(recipe), "--vary=regularize.l1=0", f"--folder={folder}", "--keep-weights=true"]) == 0
    assert (folder / "regularize.l1=0" / "seed0" / "best" / "model.safetensors").is_file()


def test_a_stopped_study_goes_on_from_the_checkpoint_of_its_run(recipe, here, tmp_path, capsys):
    commands, box = here
    folder = tmp_path / "study"
    arguments = [str(recipe), "--vary=regularize.l2=0,0.1", f"--folder={folder}"]
    box["steps"] = 4
    assert study.main(arguments) == 130
    assert len(commands) == 1  # the second was not begun
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert (folder / "table.md").read_text() == "no run has ended\n"
    box["steps"] = 0
    assert study.main(arguments) == 0
    steps = [json.loads(x)["step"] for x in (folder / "regularize.l2=0/seed0/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 6]


def test_a_sample_of_a_grid_is_of_the_grid_and_always_the_same(recipe):
    values = ",".join(str(i / 100) for i in range(10))
    arguments = [str(recipe), f"--vary=regularize.l2={values}", f"--vary=model.dropout.head={values}", "--sample=7"]
    first, again = study.parse(arguments), study.parse(arguments)
    assert first.combinations == again.combinations
    assert len({tuple(c.items()) for c in first.combinations}) == 7
    other = study.parse([*arguments, "--run.seed=1"])
    assert other.combinations != first.combinations
    assert study.parse([*arguments[:-1], "--sample=500"]).combinations.__len__() == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary=regularize.l3=1"], "unknown setting 'regularize.l3'; did you mean 'regularize.l"),
        (["--vary=regularize.l2"], "should name each value once"),
        (["--vary=regularize.l2=1,1"], "should name each value once"),
        (["--vary=regularize.l2=1", "--vary=regularize.l2=2"], "is given twice"),
        (["--vary=regularize.l2=1,x"], "regularize.l2 = 'x' should be a finite number"),
        (["--vary=model.dropout.all=0.1,1.5"], "model.dropout.all = 1.5 must be in [0, 1)"),
        (["--vary=run.seed=1,2"], "run.seed is the study's to set; --folder and --seeds are its options"),
        (["--run.folder=x"], "run.folder is the study's to set"),
        (["--seeds=0"], "--seeds = '0' should be a whole number from 1"),
        (["another"], "name one recipe"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_run(recipe, here, arguments, message):
    with pytest.raises(ConfigError) as caught:
        study.main([str(recipe), *arguments])
    assert message in str(caught.value)
    assert here[0] == []


def test_a_run_that_fails_is_named_and_the_others_go_on(recipe, here, tmp_path, monkeypatch, capsys):
    ours = study.launch

    def launch(of_study, command, environment, printed):
        if "--regularize.l2=0" in command:
            printed.write_text("much\nerror: a sentence\n")
            return 2
        return ours(of_study, command, environment, printed)

    monkeypatch.setattr(study, "launch", launch)
    folder = tmp_path / "study"
    assert study.main([str(recipe), "--vary=regularize.l2=0,0.1", f"--folder={folder}"]) == 1
    captured = capsys.readouterr()
    assert "regularize.l2=0/seed0: error: a sentence" in captured.err
    assert "| 0.1 | 1 |" in captured.out


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    nan = dict.fromkeys(study.MEASURED, math.nan)
    lines = [study.Line({"a.b": str(i)}, 1, "f1", dict.fromkeys(study.MEASURED, 0.5 + i), nan) for i in range(3)]
    one = study.Study("r", {}, [], [0], tmp_path)
    assert (tmp_path / "plot.png") in study.write(one, lines)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_itself_is_interrupted_and_goes_on(recipe, tmp_path):
    folder = tmp_path / "study"
    arguments = [str(recipe), "--vary=regularize.l2=0,0.1", "--parallel=2", f"--folder={folder}"]
    longer = [*arguments, "--train.max_steps=400", "--eval.every=100"]
    first = subprocess.Popen([sys.executable, "-m", "engine.study", *longer], stderr=subprocess.PIPE, text=True)
    logs = [folder / f"regularize.l2={value}" / "seed0" / "metrics.jsonl" for value in ("0", "0.1")]
    deadline = time.monotonic() + 120
    while not all(log.is_file() and log.stat().st_size for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGTERM)
    _, printed = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "stopped; the same command goes on" in printed
    done = run_module("engine.study", *longer)
    assert done.returncode == 0, done.stderr
    assert "| 0.1 | 1 |" in done.stdout
