"""Ranges, trials and pruning of a study, compared with Optuna's own; and the workers that share the GPUs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.runs import QuietStop, run_module, run_training

import engine
from engine import config as configs
from engine import study, study_link, study_options, study_runs, study_search, study_variants
from engine.config import ConfigError
from engine.study_options import number_kinds
from engine.study_variants import Range, Variant, random_trials

SPACE = {
    "optim.lr": Range(1e-5, 1e-2, True, False),
    "train.epochs": Range(1, 6, False, True),
    "optim.name": ["adamw", "sgd"],
}
TRIALS = 18
TEXTS = ["optim.lr=1e-5..1e-2 log", "train.epochs=1..6", "optim.name=adamw,sgd"]


def read_space(texts):
    return study_variants.read_space(texts, number_kinds())


@pytest.fixture
def recipe(tiny, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    text = configs.to_toml(tiny(**{"train.max_steps": 4, "eval.every_steps": 2}))
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("folder")))
    return path


# ranges


def test_ranges_are_read():
    assert read_space(TEXTS) == SPACE
    assert read_space(["regularize.l2=0..1"]) == {"regularize.l2": Range(0, 1, False, False)}
    assert read_space(["data.train=../a.jsonl,../b.jsonl"]) == {"data.train": ["../a.jsonl", "../b.jsonl"]}


@pytest.mark.parametrize(
    "text", ["optim.lr=1e-2..1e-5", "optim.lr=0..1 log", "train.global_batch_size=1.5..2", "optim.lr=a..b"]
)
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(
        ConfigError, match=r"a range has two (whole )?numbers, the lower one first, and above 0 with log"
    ):
        read_space([text])


@pytest.mark.parametrize("text", ["optim.lr=1e-5..1e-4 log,1e-3", "data.max_length=16..64 lg"])
def test_a_range_among_values_is_named(text):
    with pytest.raises(ConfigError, match=r"a range stands alone, as A\.\.B or 'A\.\.B log'"):
        read_space([text])


def test_random_trials_depend_on_the_seed_and_their_number():
    trials = random_trials(SPACE, 400, 5)
    assert random_trials(SPACE, 30, 5) == trials[:30]
    assert random_trials(SPACE, 30, 6) != trials[:30]
    rates = np.log10([float(trial.settings["optim.lr"]) for trial in trials])
    assert rates.min() >= -5 - 1e-5
    assert rates.max() <= -2 + 1e-5
    assert np.histogram(rates, 3, (-5, -2))[0].min() > 90  # of 133 in each decade
    epochs = [int(trial.settings["train.epochs"]) for trial in trials]
    assert set(epochs) == {1, 2, 3, 4, 5, 6}
    assert {trial.settings["optim.name"] for trial in trials} == {"adamw", "sgd"}
    whole = Range(1, 1000, True, True)
    values = [int(whole.sample(np.random.default_rng(i))) for i in range(300)]
    assert min(values) >= 1
    assert max(values) <= 1000
    assert np.median(values) < 100


# Optuna


def objective(settings: dict[str, str], step: int) -> float:
    """Return a metric that depends on the settings and rises with the steps."""
    rate = math.log10(float(settings["optim.lr"]))
    return step / 10 - (rate + 3.3) ** 2 - 0.1 * int(settings["train.epochs"]) + (settings["optim.name"] == "sgd")


def search_trials(folder: Path, count: int, stop_at: tuple[int, int] | None = None) -> list[tuple]:
    """Search as a study does; return (number, settings, state). stop_at: the trial and step where it is killed."""
    search = study_search.TpeSearch(folder, SPACE, 3, count, "max")
    while begun := search.next_trial():
        number, variant = begun
        is_pruned = search.was_to_prune(number)
        for step in range(1, 5):
            if is_pruned or (number, step) == stop_at:
                break
            is_pruned = search.report(number, objective(variant.settings, step), step)
        if (number, step) == stop_at:
            break
        search.end(number, objective(variant.settings, 4), is_pruned)
    return [(number, variant.settings, state) for number, variant, state in search.settings_of_all()]


def test_trials_are_those_of_optuna_also_after_a_kill(tmp_path):
    optuna = pytest.importorskip("optuna")
    theirs = []
    their_study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
    for number in range(TRIALS):
        their_study.sampler = optuna.samplers.TPESampler(seed=study_search.sampler_seed(3, number))
        trial = their_study.ask()
        values = {
            "optim.lr": trial.suggest_float("optim.lr", 1e-5, 1e-2, log=True),
            "train.epochs": trial.suggest_int("train.epochs", 1, 6),
            "optim.name": trial.suggest_categorical("optim.name", ["adamw", "sgd"]),
        }
        settings, state = {key: str(value) for key, value in values.items()}, "COMPLETE"
        for step in range(1, 5):
            trial.report(objective(settings, step), step)
            if trial.should_prune():
                state = "PRUNED"
                break
        their_study.tell(
            trial,
            objective(settings, 4) if state == "COMPLETE" else None,
            state=getattr(optuna.trial.TrialState, state),
        )
        theirs.append((number, settings, state))
    assert {state for *_, state in theirs} == {"COMPLETE", "PRUNED"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert search_trials(whole, TRIALS) == theirs
    last = max(number for number, _, state in theirs[:-2] if state == "COMPLETE")
    assert search_trials(killed, TRIALS, stop_at=(last, 3))[-1][2] == "RUNNING"
    assert search_trials(killed, TRIALS - 1) == theirs[:-1]
    assert search_trials(killed, TRIALS) == theirs  # more trials continue the same search
    with pytest.raises(ConfigError, match="has the trials of other ranges, seeds or metrics"):
        study_search.TpeSearch(killed, SPACE | {"optim.lr": Range(1e-5, 1, True, False)}, 3, TRIALS, "max")


@pytest.fixture
def here(monkeypatch) -> list[list[str]]:
    """Run the commands of a study in this process; return them."""
    commands = []

    def launch(_study, command, _environment, output, link=None):
        commands.append(command)
        if link is not None:
            link.serve()
        output.write_text("")
        run_training(configs.parse(command[3:], ""), QuietStop())
        return 0

    monkeypatch.setattr(study_runs, "launch", launch)
    return commands


def test_a_trial_that_failed_is_begun_again_with_its_values(recipe, here, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    ours, failing = study_runs.launch, True

    def launch(its_study, command, environment, output, link=None):
        if failing and f"--run.folder={tmp_path / 'study' / 'trial1' / 'seed0'}" in command:
            here.append(command)
            output.write_text("error: a sentence\n")
            return 2
        return ours(its_study, command, environment, output, link)

    monkeypatch.setattr(study_runs, "launch", launch)
    vary = ["--vary=optim.lr=1e-4..1e-2 log", "--sampler=tpe"]
    arguments = [str(recipe), *vary, "--trials=3", f"--folder={tmp_path / 'study'}"]
    assert study.main(arguments) == 1
    shown = capsys.readouterr()
    assert "trial1/seed0: error: a sentence" in shown.err
    records = json.loads((tmp_path / "study" / "runs.json").read_text())
    assert [record["state"] for record in records] == ["finished", "failed", "finished"]
    failing = False
    assert study.main(arguments) == 0
    assert here[-1] == here[1]
    assert len(here) == 4
    best = max(json.loads((tmp_path / "study" / "runs.json").read_text()), key=lambda r: r["best"]["best accuracy"])
    assert f"best: {Path(best['folder']).parent.name}, accuracy " in (out := capsys.readouterr().out)
    assert f"--optim.lr={best['settings']['optim.lr']}" in out
    values = [
        variant.labels["optim.lr"]
        for _, variant, _ in study_search.TpeSearch(
            tmp_path / "study", read_space([vary[0].removeprefix("--vary=")]), 0, 3, "max"
        ).settings_of_all()
    ]
    assert [command for command in here if f"--optim.lr={values[2]}" in command] == [here[2]]


@pytest.mark.slow
def test_several_runs_of_a_trial_are_pruned_by_their_mean(recipe, here, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    asked = []

    def report(search, number, value, step):
        asked.append((number, step))
        return (number, step) == (1, 1)

    monkeypatch.setattr(study_search.TpeSearch, "report", report)
    arguments = [str(recipe), "--vary=optim.lr=1e-4..1e-2 log", "--sampler=tpe", "--trials=2", "--seeds=2", "--prune"]
    assert study.main([*arguments, f"--folder={tmp_path / 'study'}"]) == 0
    assert asked == [(0, 1), (0, 2), (1, 1)]
    assert len(here) == 3
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_asks_the_study_after_each_evaluation(tmp_path):
    code = (
        "from engine.study_link import report_evaluation\n"
        "for step in (1, 2, 3): report_evaluation({'step': step, 'evaluation': {'f1': float('nan')}})\n"
    )
    rows = []

    def should_prune(row):
        rows.append(row)
        return row["step"] == 2

    link = study_link.Link(should_prune)
    environment = os.environ | link.environment | {"PYTHONPATH": str(Path(engine.__file__).parent.parent)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=link.descriptors)
    link.serve()
    assert child.wait(60) == -signal.SIGTERM
    assert link.has_pruned
    assert rows == [{"step": step, "evaluation": {"f1": None}} for step in (1, 2)]


@pytest.mark.slow
def test_a_pruned_run_ends_at_its_evaluation(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.setattr(study_search.TpeSearch, "report", lambda search, number, value, step: (number, step) == (1, 4))
    arguments = [str(recipe), "--vary=optim.lr=1e-4..1e-2 log", "--sampler=tpe", "--trials=2", "--prune"]
    arguments += [f"--folder={tmp_path / 'study'}", "--train.max_steps=8"]
    assert study.main(arguments) == 0
    records = json.loads((tmp_path / "study" / "runs.json").read_text())
    assert [record["state"] for record in records] == ["finished", "pruned"]
    rows = [json.loads(line) for line in (tmp_path / "study/trial1/seed0/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]  # no step after the evaluation of step 4
    assert "pruned after step 4, accuracy " in capsys.readouterr().out
    assert study.main(arguments) == 0  # a pruned trial is not begun again
    states = study_search.TpeSearch(tmp_path / "study", read_space(["optim.lr=1e-4..1e-2 log"]), 0, 2, "max")
    assert [state for *_, state in states.settings_of_all()] == ["COMPLETE", "PRUNED"]


@pytest.mark.slow
def test_a_search_is_killed_and_continues(recipe, tmp_path):
    """The same command, killed in its first trial, gives the trials of a search that was not."""
    pytest.importorskip("optuna")
    arguments = [str(recipe), "--vary=optim.lr=1e-4..1e-2 log", "--sampler=tpe", "--trials=2", "--train.max_steps=40"]
    arguments += ["--eval.every_steps=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_module("engine.study", *arguments, f"--folder={whole}").returncode == 0
    command = [sys.executable, "-m", "engine.study", *arguments, f"--folder={killed}"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, deadline = killed / "trial0/seed0/metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    while time.monotonic() < deadline + 60:
        done = run_module("engine.study", *arguments, f"--folder={killed}")
        if "is in use by another run" not in done.stderr:  # the run has not yet seen that the study has gone
            break
    assert done.returncode == 0, done.stderr
    assert (killed / "table.csv").read_text() == (whole / "table.csv").read_text()


# options and workers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary=optim.lr=1e-5..1e-4"], "--vary optim.lr has a range: --trials N says how many values to try"),
        (["--vary=optim.lr=1e-5..1e-4", "--sample=3", "--trials=3"], "--sample chooses from a grid"),
        (["--vary=optim.lr=1e-5,1e-4", "--trials=3"], "--vary has no range: --sample N runs some combinations"),
        (["--trials=3"], "--trials needs what to vary"),
        (["--vary=optim.lr=-1..1", "--trials=3"], "optim.lr = -1.0 must be >= 0"),
        (["--vary=optim.lr=1e-5..1e-4", "log", "--trials=3"], "name one recipe (quote a range with its log: "),
        (["--vary=optim.lr=1e-5..1e-4", "--trials=3", "--sampler=tpee"], "choose from random, tpe; did you mean 'tpe'"),
        (["--vary=optim.lr=1e-5,1e-4", "--sampler=tpe"], "--sampler tpe needs --trials N"),
        (["--vary=optim.lr=1e-5..1e-4", "--trials=3", "--prune"], "--prune is for --sampler tpe"),
        (["--change=x: regularize.l2=1", "--trials=3"], "give one of them"),
        (["--folds=1"], "--folds = '1' should be a whole number from 2"),
        (["--folds=3", "--data.validation=v"], "data.fold = '1/3' holds out a part of data.train, but data.validation"),
        (["--data.fold=1/3"], "data.fold is set by the study itself"),
        (["--vary=data.fold=1/3,2/3"], "data.fold is set by the study itself"),
        (["--keep-weights=maybe"], "--keep_weights = 'maybe' should be true or false"),
        (["--workers"], "--workers needs a value"),
    ],
)
def test_options_that_do_not_go_together_are_refused(recipe, here, arguments, message):
    with pytest.raises(ConfigError) as caught:
        study.main([str(recipe), *arguments])
    assert message in str(caught.value)
    assert here == []


def test_optuna_that_is_missing_is_one_sentence(recipe, monkeypatch):
    monkeypatch.setattr(study_search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--sampler tpe needs the optuna package: pip install optuna$"):
        study_options.parse([str(recipe), "--vary=optim.lr=0..1", "--trials=3", "--sampler=tpe"])


@pytest.mark.parametrize(
    ("named", "count", "names"),
    [("", 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), ("GPU-a,GPU-b", 1, ["GPU-a"]), ("", 0, [])],
)
def test_the_gpus_are_those_that_the_study_may_use(monkeypatch, named, count, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(study_runs.torch.cuda, "device_count", lambda: count)
    assert study_runs.visible_gpus() == names


@pytest.mark.parametrize("gpus", [["3", "5"], []])
def test_each_worker_has_a_gpu_or_a_share_of_the_cpu(tmp_path, monkeypatch, gpus):
    """Runs of very different lengths: never two at a time on one device, and no device waits."""
    monkeypatch.setattr(study_runs, "visible_gpus", lambda: gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(study_runs.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    busy, used, lock = [], [], threading.Lock()

    def launch(_study, command, environment, output, _link=None):
        output.write_text("")
        device = environment.get("CUDA_VISIBLE_DEVICES") if gpus else environment["OMP_NUM_THREADS"]
        with lock:
            used.append(device)
            busy.append(device)
            assert len(busy) <= 2
            assert not gpus or len(set(busy)) == len(busy)
        time.sleep(0.05 if len(used) != 1 else 0.3)
        with lock:
            busy.remove(device)
        return 1

    monkeypatch.setattr(study_runs, "launch", launch)
    variants = [Variant({"change": str(i)}, {}, str(i)) for i in range(8)]
    its = study_runs.Study("r", {}, variants, [0], tmp_path, "f1", "max", workers=2)
    study.run_all(its)
    assert len(its.problems) == 8
    assert set(used) == (set(gpus) or {"4"})
    on_cpu = study_runs.Study("r", {}, [], [0], tmp_path, "f1", "max", workers=4, uses_gpus=False)
    assert study_runs.environment_of(on_cpu, 0)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's own limit
    assert study_runs.environment_of(on_cpu, 0)["OMP_NUM_THREADS"] == "1"
