"""`python -m engine.predict` by windows: the same file whatever the windows, the ranks, and where it was killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import warm
from support.runs import run_module, run_training, tiny_config, write_reviews

import models as native
from engine import predict, prediction_output
from engine.config import ConfigError
from engine.errors import TrainingError

ROOT = Path(native.__file__).parent.parent
WINDOW = ("--window", "16", "--run.device=cpu")


@pytest.fixture(scope="module")
def run(checkpoint_folder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("predicted") / "run"
    run_training(tiny_config(checkpoint_folder, reviews, folder, {"train.max_steps": 3}))
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 rows, five windows of 16; two rows have no text."""
    file = write_reviews(tmp_path_factory.mktemp("source") / "in.jsonl", 70, seed=3)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[15]["text"], rows[40]["text"] = "", " "
    return write(file, rows)


@pytest.fixture(scope="module")
def whole(run: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The predictions of a single window."""
    return read(predicted(run, source, tmp_path_factory.mktemp("whole") / "out.jsonl"))


@pytest.fixture(scope="module")
def expected(run: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a command with windows of 16 rows writes."""
    return predicted(run, source, tmp_path_factory.mktemp("windows") / "out.jsonl", *WINDOW).read_bytes()


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def predicted(run: str, source: Path, output: Path, *more: str) -> Path:
    assert predict.main([run, "--input", str(source), "--output", str(output), *more]) == 0
    assert names(output.parent) == {output.name} | ({source.name} if source.parent == output.parent else set())
    return output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["label"] == b["label"]
        assert a.get("reason") == b.get("reason")
        assert a.get("logits", {}) == pytest.approx(b.get("logits", {}), abs=1e-5)


# Windows


@pytest.mark.parametrize("size", ["1", "7", "16", "70", "1000"])
def test_windows_of_any_size_give_the_same_predictions(run, source, whole, tmp_path, size):
    assert_close(read(predicted(run, source, tmp_path / "out.jsonl", "--window", size)), whole)
    assert [row["id"] for row in whole if "reason" in row] == ["r15", "r40"]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks_share_each_window(run, source, whole, tmp_path, ranks):
    output = tmp_path / "out.jsonl"
    done = run_module("engine.predict", run, "--input", source, "--output", output, *WINDOW, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_close(read(output), whole)
    assert done.stdout.count("70 predictions in") == 1
    assert names(tmp_path) == {"out.jsonl"}


def test_notes_of_many_windows_are_said_once(run, source, tmp_path, capsys):
    predicted(run, source, tmp_path / "out.jsonl", *WINDOW, "--data.max_length", "16")
    printed = capsys.readouterr().out
    assert "70 predictions in" in printed
    assert printed.count("rows left out") == 1
    assert printed.count("texts truncated to data.max_length = 16") == 1


# Errors


def test_every_bad_row_is_reported_before_any_prediction(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("a row was predicted"))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[3]["text"], rows[60] = 5, {"id": "r60"}
    file = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match=r"in.jsonl:4: 'text' should be text, not 5") as error:
        predict.main([run, "--input", str(file), "--output", str(tmp_path / "out.jsonl"), *WINDOW])
    assert "in.jsonl:61: no column 'text'" in str(error.value)
    assert "is empty" not in str(error.value)  # such rows are no errors
    assert str(error.value).count('data.bad_rows = "skip"') == 1
    assert names(tmp_path) == {"in.jsonl"}


def test_an_id_of_two_windows_is_found(run, source, tmp_path, whole):
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[50]["id"] = rows[2]["id"]
    file, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"in.jsonl:51: the id 'r2' is that of line 3 too"):
        predict.main([run, "--input", str(file), "--output", str(output), *WINDOW])
    predicted(run, file, output, *WINDOW, "--data.bad_rows=skip")
    found = read(output)
    assert "is that of line 3 too" in found[50]["reason"]
    assert_close(found[:50] + found[51:], whole[:50] + whole[51:])


def test_a_file_that_changes_meanwhile_is_refused(run, source, tmp_path, monkeypatch):
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(source.read_bytes())
    original = predict.load_trained

    def change(*args):
        write(file, [json.loads(line) | {"label": "?"} for line in source.read_text().splitlines()])
        return original(*args)

    monkeypatch.setattr(predict, "load_trained", change)
    with pytest.raises(ValueError, match=r"in.jsonl: the file has changed since it was checked"):
        predict.main([run, "--input", str(file), "--output", str(output), *WINDOW])


@pytest.mark.parametrize("given", ["0", "-3", "many", "1.5", "9" * 20])
def test_a_window_is_a_number_of_rows(run, source, tmp_path, given):
    with pytest.raises(ConfigError, match=r"--window = '.*' should be a number of rows, from 1"):
        predict.main([run, "--input", str(source), "--output", str(tmp_path / "out"), "--window", given])


# Tables


@pytest.mark.parametrize("window", ["16", "100"])
def test_a_table_has_a_column_for_each_value(run, source, expected, tmp_path, window):
    output = predicted(run, source, tmp_path / "out.csv", "--run.device=cpu", "--window", window)
    with output.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in expected.splitlines()]
    assert list(rows[0]) == [
        *("id", "label", "probabilities.negative", "probabilities.positive", "logits.negative", "logits.positive"),
        "reason",
    ]
    for row, line in zip(rows, lines, strict=True):
        assert (row["id"], row["label"], row["reason"]) == (line["id"], line["label"] or "", line.get("reason", ""))
        if line["label"]:
            assert float(row["logits.positive"]) == pytest.approx(line["logits"]["positive"], abs=1e-5)


def test_parquet_has_the_values_of_the_lines(run, source, expected, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = predicted(run, source, tmp_path / "out.parquet", *WINDOW)
    rows = parquet.read_table(output).to_pylist()
    for row, line in zip(rows, map(json.loads, expected.splitlines()), strict=True):
        assert row["logits.positive"] == (line["logits"]["positive"] if line["label"] else None)
        assert {name: row[name] for name in ("id", "label")} == {name: line[name] for name in ("id", "label")}
        assert row["reason"] == line.get("reason")


def test_parquet_without_its_package_is_refused_first(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_output, "can_write", lambda _: False)
    with pytest.raises(ConfigError, match="need the package pyarrow: pip install pyarrow"):
        predict.main([run, "--input", "no.jsonl", "--output", str(tmp_path / "out.parquet")])


# Crashes


class Killed(BaseException):
    """The end of the process, after which nothing of it runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], int]:
    """Raise Killed in the `count`-th call that changes the disk; return a function that returns the calls so far."""
    calls = 0

    def counted(function: Callable, before: Callable[..., object] = lambda *_: None) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                before(*args)
                raise Killed
            return function(*args, **kwargs)

        return call

    class File(prediction_output.FileIO):
        def write(self, data) -> int:
            return counted(super().write, lambda data: super(File, self).write(data[: len(data) // 2]))(data)

    monkeypatch.setattr(prediction_output, "FileIO", File)
    monkeypatch.setattr(prediction_output.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(prediction_output.os, "replace", counted(os.replace))
    monkeypatch.setattr(prediction_output.PartialFile, "_remove_if_empty", lambda self: None)
    monkeypatch.setattr(prediction_output, "write_table", counted(prediction_output.write_table))
    return lambda: calls


def crash_and_continue(run: str, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> bool:
    """Kill a command at the `count`-th change of the disk, and repeat it; return whether it came so far."""
    command = [run, "--input", str(source), "--output", str(output), *WINDOW]
    with monkeypatch.context() as patch:
        calls = kill_at(patch, count)
        try:
            predict.main(command)
        except Killed:
            assert not output.exists() or calls() > 15
    assert predict.main(command) == 0
    for path in output.parent.glob(".writing-*"):
        path.unlink()  # of a killed process, which could not remove it
    assert names(output.parent) == {output.name}
    return calls() >= count


def test_killed_anywhere_it_continues_to_the_same_file(run, source, expected, tmp_path, monkeypatch, capsys):
    for count in (1, 4, 7, 8, 9, 21):
        output = tmp_path / "out.jsonl"
        assert crash_and_continue(run, source, output, monkeypatch, count)
        assert output.read_bytes() == expected
        output.unlink()
    assert "rows are kept in" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_killed_at_every_change_of_the_disk(run, source, tmp_path, monkeypatch, suffix):
    (tmp_path / "b").mkdir()
    expected = predicted(run, source, tmp_path / "b" / f"out{suffix}", *WINDOW).read_bytes()
    count, output = 1, tmp_path / "a" / f"out{suffix}"
    output.parent.mkdir()
    while crash_and_continue(run, source, output, monkeypatch, count):
        assert output.read_bytes() == expected
        output.unlink()
        count += 1
    assert count > 20


def start(run: str, source: Path, output: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "engine.predict", run, "--input", str(source), "--output", str(output), *more]
    command.insert(0, str(warm.folder() / "python"))
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_windows(state: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_text())["windows"] >= count:
            return
        time.sleep(0.002)
    pytest.fail(f"the process ended: {process.communicate()}")


@pytest.mark.parametrize(
    ("number", "windows"),
    [(signal.SIGTERM, 5), *(pytest.param(signal.SIGKILL, n, marks=pytest.mark.slow) for n in (1, 23, 50))],
)
def test_a_signal_leaves_what_the_same_command_continues(run, tmp_path, number, windows):
    source = write_reviews(tmp_path / "in.jsonl", 400, seed=5)
    output, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial.json"
    process = start(run, source, output, "--window", "5", "--run.device=cpu")
    wait_for_windows(state, windows, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    kept = json.loads(state.read_text())["rows"]
    assert windows * 5 <= kept < 400
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert "stopping after this batch" in err
        assert f"stopped by SIGTERM: the predictions of the first {kept:,} rows are kept in {output}.partial" in err
    else:
        assert process.returncode == -number
    command = [run, "--input", str(source), "--output", str(output), "--window", "5", "--run.device=cpu"]
    assert predict.main(command) == 0
    assert names(tmp_path) - {path.name for path in tmp_path.glob(".writing-*")} == {"in.jsonl", "out.jsonl"}
    ours = output.read_bytes()
    assert predict.main(command) == 0
    assert output.read_bytes() == ours


@pytest.fixture
def interrupted(run: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of predictions of which two windows are there."""
    command = [run, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), *WINDOW]
    append = prediction_output.PartialFile.append

    def failing(self, *args):
        if self.num_windows == 2:
            raise KeyboardInterrupt
        append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(prediction_output.PartialFile, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            predict.main(command)
    assert names(tmp_path) == {"out.jsonl.partial", "out.jsonl.partial.json"}
    return command


def test_what_is_complete_is_not_predicted_again(interrupted, expected, tmp_path, monkeypatch):
    counts, original = [], predict.predict

    def count(model, examples, context):
        counts.append(len(examples))
        return original(model, examples, context)

    monkeypatch.setattr(predict, "predict", count)
    assert predict.main(interrupted) == 0
    assert counts == [15, 16, 6]
    assert (tmp_path / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--data.max_length", "16"), r"data.max_length = 32, not 16"),
        (("--window", "8"), "--window = 16, not 8"),
        (("--window", "800"), "--window = 16, not 800"),
        (("--data.text_column", "id"), "the rows of --input, data.text_column = 'text', not 'id'"),
    ],
)
def test_a_partial_file_of_other_predictions_is_kept(interrupted, tmp_path, more, what):
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(ConfigError, match="has the first 32 rows of other predictions, which differ in") as error:
        predict.main([*interrupted, *more])
    assert what in str(error.value)
    assert "delete out.jsonl.partial and out.jsonl.partial.json, or name another --output" in str(error.value)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_a_partial_file_that_is_damaged_is_refused(interrupted, tmp_path):
    partial, state = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"
    content = partial.read_bytes()
    partial.write_bytes(content[:100])
    with pytest.raises(ConfigError, match=r"is shorter than out.jsonl.partial.json says"):
        predict.main(interrupted)
    partial.write_bytes(content)
    state.write_text("{")
    with pytest.raises(ConfigError, match=r"partial.json cannot be read, or is of another version"):
        predict.main(interrupted)
    state.unlink()
    with pytest.raises(ConfigError, match=r"has no out.jsonl.partial.json beside it"):
        predict.main(interrupted)
    assert partial.read_bytes() == content


def test_a_disk_that_fills_keeps_the_windows_before(run, source, expected, tmp_path, monkeypatch):
    command = [run, "--input", str(source), "--output", str(tmp_path / "out.jsonl"), *WINDOW]
    windows = 0

    class Full(prediction_output.FileIO):
        def write(self, data) -> int:
            nonlocal windows
            windows += 1
            if windows < 3:
                return super().write(data)
            if windows == 3:
                return super().write(data[:50])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prediction_output, "FileIO", Full)
        with pytest.raises(TrainingError, match=r"No space left on device; the predictions of the first 32 rows are"):
            predict.main(command)
    assert predict.main(command) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_two_processes_do_not_write_one_file(interrupted, tmp_path):
    code = (
        "import fcntl, sys; stream = open(sys.argv[1], 'r+b'); fcntl.lockf(stream, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out.jsonl.partial")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="is being written by another process"):
            predict.main(interrupted)
        other.communicate()


# Devices and pipes


def test_a_pipe_gets_the_lines_of_each_window(run, source, expected, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe.csv").read_bytes()), daemon=True)
    reader.start()
    assert predict.main([run, "--input", str(source), "--output", str(tmp_path / "pipe.csv"), *WINDOW]) == 0
    reader.join(30)
    assert got == [expected]
    assert names(tmp_path) == {"pipe.csv"}


def test_a_pipe_is_read_once(run, source, whole, tmp_path):
    os.mkfifo(tmp_path / "in.jsonl")
    threading.Thread(target=lambda: (tmp_path / "in.jsonl").write_bytes(source.read_bytes()), daemon=True).start()
    output = tmp_path / "out.jsonl"
    assert predict.main([run, "--input", str(tmp_path / "in.jsonl"), "--output", str(output), *WINDOW]) == 0
    assert_close(read(output), whole)


# Memory


PEAK = "import sys, resource; from engine import predict; predict.main(sys.argv[1:]); "
PEAK += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(run, tmp_path, suffix):
    peaks = []
    for count in (20_000, 200_000):
        source = write_reviews(tmp_path / f"{count}.jsonl", count)
        command = [sys.executable, "-c", PEAK, run, "--input", str(source)]
        command += ["--output", str(tmp_path / f"out{suffix}"), "--run.device=cpu", "--window=4096"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.05 * peaks[0], peaks
