"""The loggers of log.report_to: what each kept is read back, after a resume too; the trace of log.profile_steps."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import StopAfter, assert_same_run, logged_rows, run_training

from engine import config as configs
from engine import loggers
from engine.config import ConfigError
from engine.log import read_rows
from engine.profiling import parse_profile_steps

STEPS = {"train.max_steps": 8, "eval.every_steps": 4, "run.resume": "auto"}


def run_twice(tiny, name: str, **more: object) -> Path:
    """Run a recipe that is stopped after 6 steps, while 8 are due, and continue it; return its folder."""
    config = tiny(**STEPS | {"log.report_to": name} | more)
    assert run_training(config, StopAfter(6)) is None
    assert run_training(config) is not None
    return Path(config.run.folder)


def expected_numbers(folder: Path) -> dict[tuple[str, int], float]:
    """Return {(family/name, step): number} of metrics.jsonl."""
    numbers: dict[tuple[str, int], float] = {}
    for row in read_rows(folder / "metrics.jsonl"):
        step = row.pop("step")
        family = "train" if "lr" in row else "final" if "end" in row else "validation"
        values = row["evaluation"] if family == "validation" else row
        numbers |= {(f"{family}/{name}", step): x for name, x in values.items() if isinstance(x, int | float)}
    return numbers


def drop_rates(numbers: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {key: value for key, value in numbers.items() if not key[0].endswith(("_second", "_seconds", "_mb"))}


def records_of(file: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file, a log of LevelDB: blocks of 32 KiB, in which a long record is in parts."""
    at, record = 7, b""
    while at < len(file):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)
        record += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.slow
def test_mlflow_has_the_numbers_of_one_run_after_a_resume(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = run_twice(tiny, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.run_id == json.loads((folder / loggers.IDS).read_text())["mlflow"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", str(folder))
    assert (run.data.params["optim.lr"], run.data.params["train.max_steps"]) == ("0.001", "8")
    kept = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        assert len({metric.step for metric in history}) == len(history)  # each once
        kept |= {(name, metric.step): metric.value for metric in history}
    assert drop_rates(kept) == drop_rates(expected_numbers(folder))


def test_wandb_writes_one_run_offline_and_changes_nothing(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run_twice(tiny, "wandb")
    id = json.loads((folder / loggers.IDS).read_text())["wandb"]
    parts = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))  # one of each process; `wandb sync` joins them
    assert {path.name for path in parts} == {f"run-{id}.wandb"}
    kept, settings = {}, {}
    for path in parts:
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            values = {item.nested_key[0] or item.key: json.loads(item.value_json) for item in record.history.item}
            kept |= {(name, values["_step"]): x for name, x in values.items() if not name.startswith("_")}
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert drop_rates(kept) == drop_rates(expected_numbers(folder))
    assert settings["optim.lr"] == 0.001
    plain = tiny(**STEPS | {"run.folder": str(tmp_path / "plain")})
    run_training(plain, StopAfter(6))
    run_training(plain)
    assert_same_run(folder, plain.run.folder)


@pytest.mark.slow
def test_swanlab_writes_an_experiment_offline(tiny, monkeypatch):
    pytest.importorskip("swanlab", reason="swanlab is not installed")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    folder = run_twice(tiny, "swanlab")
    id = json.loads((folder / loggers.IDS).read_text())["swanlab"]
    parts = sorted((folder / "swanlab").glob(f"run-*-{id}"))
    assert parts
    assert "optim.lr" in (parts[0] / "files" / "config.yaml").read_text()
    data = b"".join(path.read_bytes() for part in parts for path in part.glob("*.swanlab"))
    assert b"validation/accuracy" in data
    assert b"final/best_accuracy" in data


def fake_logger(monkeypatch: pytest.MonkeyPatch, **slots: object) -> None:
    made = {"id": "x", "log": lambda numbers, step: None, "close": lambda ended: None} | slots
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda run: loggers.Logger(**made))
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="x"))


def test_f03_a_logger_that_fails_is_left_out_and_said_once(tiny, monkeypatch, capsys):
    def log(numbers, step):
        if step >= 3:
            raise OSError(28, "No space left on device")

    fake_logger(monkeypatch, log=log)
    result = run_training(tiny(**STEPS | {"log.report_to": "wandb"}))
    assert result is not None
    assert math.isfinite(result["best_accuracy"])
    shown = capsys.readouterr().out
    assert shown.count("wandb (log.report_to) has failed: [Errno 28] No space left on device; the run goes on") == 1


def test_a_logger_that_cannot_be_opened_is_an_error_at_once(tiny, monkeypatch, capsys):
    config = tiny(**STEPS | {"log.report_to": "wandb"})
    fake_logger(monkeypatch)
    run_training(config, StopAfter(6))

    def refuse(run):
        raise RuntimeError("no API key\nmore")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", refuse)
    assert run_training(config) is not None  # a resumed run goes on without it
    assert "wandb (log.report_to) has failed: no API key; more; the run goes on" in capsys.readouterr().out
    other = configs.override(config, {"run.folder": f"{config.run.folder}-2"})
    with pytest.raises(ConfigError, match=r"^log.report_to = wandb: it cannot be opened: no API key; more$"):
        run_training(other)


def test_loggers_that_are_unknown_or_missing_are_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="choose from tensorboard, wandb, mlflow, swanlab; did you mean 'wandb'"):
        run_training(tiny(**{"log.report_to": "wandbb", "data.train": "nowhere"}))
    (tmp_path / "swanlab").mkdir()  # what a run wrote: a package without a file
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"log.report_to = swanlab needs the swanlab package: pip install swanlab"):
        loggers.check_loggers(["swanlab"])


def test_a_logger_named_twice_is_refused():
    with pytest.raises(ConfigError, match="name tensorboard once"):
        loggers.check_loggers(["tensorboard", "tensorboard"])


def test_errors_of_several_lines_are_one_sentence(tmp_path, monkeypatch):
    def open_it(run):
        raise ValueError("1 validation error for Settings\nmode\n  Input should be 'offline'\n")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", open_it)
    with pytest.raises(ConfigError, match="cannot be opened: 1 validation error for Settings; mode; Input should be"):
        loggers.Loggers(["wandb"], tmp_path, 0, {}, print)


@pytest.mark.slow
def test_a_server_of_mlflow_that_hangs_up_is_asked_three_times(tmp_path, monkeypatch):
    """Not eight times, with pauses that double, in which a training would stand still."""
    pytest.importorskip("mlflow")
    asked = list[int]()

    def serve(listener):
        while True:
            connection, _ = listener.accept()
            asked.append(1)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv(loggers.MLFLOW_RETRIES, raising=False)
        with pytest.raises(ConfigError, match=r"log\.report_to = mlflow: it cannot be opened"):
            loggers.Loggers(["mlflow"], tmp_path, 0, {}, print)
    assert len(asked) == 3


def test_older_recipes_with_the_switch_of_tensorboard_are_read(tmp_path):
    path = tmp_path / "old.toml"
    for switch, names in (("true", ("tensorboard",)), ("false", ())):
        path.write_text(f'schema = 2\n[data]\ntrain = "x"\n[log]\nevery_steps = 5\ntensorboard = {switch}\n')
        assert configs.read_recipe(str(path)).log.report_to == names


@pytest.mark.parametrize(
    ("text", "steps"), [("", range(0)), ("7", range(7, 8)), (" 10..12 ", range(10, 13)), ("3..3", range(3, 4))]
)
def test_the_steps_of_a_trace(text, steps):
    assert parse_profile_steps(text) == steps


@pytest.mark.parametrize("text", ["0", "5..3", "a", "1..", "1..2..3", "-1", "1,2"])
def test_steps_that_are_none_are_refused(tiny, text):
    with pytest.raises(ConfigError, match=r"log.profile_steps = .* should be a step, or the first and last of some"):
        run_training(tiny(**{"log.profile_steps": text, "data.train": "nowhere"}))
    with pytest.raises(ConfigError, match=r"log.profile_steps = '7..9': the run has 8 steps"):
        run_training(tiny(**STEPS | {"log.profile_steps": "7..9"}))


def test_a_trace_of_steps_is_written_and_changes_nothing(tiny, tmp_path, capsys):
    """Of a resumed run too: the steps 7 and 8 are those after the resume."""
    folder = run_twice(tiny, "", **{"log.profile_steps": "7..8"})
    shown = capsys.readouterr().out
    trace = json.loads((folder / "trace-steps-7-8.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    assert sum("Optimizer.step#AdamW" in event["name"] for event in trace["traceEvents"]) >= 2
    assert "aten::addmm" in names or "aten::mm" in names
    assert f"steps 7 to 8 in {folder / 'trace-steps-7-8.json'}" in shown
    assert "operator, on the cpu" in shown
    plain = tiny(**STEPS | {"run.folder": str(tmp_path / "plain")})
    run_training(plain, StopAfter(6))
    run_training(plain)
    assert_same_run(folder, plain.run.folder)


@pytest.mark.slow
def test_a_trace_that_a_signal_interrupts_has_the_steps_so_far(tiny, capsys):
    config = tiny(**STEPS | {"log.profile_steps": "5..7"})
    run_training(config, StopAfter(6))
    assert "steps 5 to 6 in " in capsys.readouterr().out
    assert (Path(config.run.folder) / "trace-steps-5-7.json").stat().st_size > 0
    assert len(logged_rows(config.run.folder)) == 7
