"""What the engine writes: whole or not at all, through links, into devices, with the umask's mode, JSON without NaN."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.runs import arguments_of, open_log, run_training

import models
from data.writing import WRITING, is_stream, replace_file, to_json, write_text
from engine import disk, predict
from engine import log as logs
from engine.cli import check_output
from engine.config import ConfigError
from engine.errors import TrainingError

ROOT = Path(models.__file__).parent.parent


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Files


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    target, link, second = tmp_path / "real/file", tmp_path / "link", tmp_path / "second"
    target.write_text("old")
    link.symlink_to("real/file")
    second.symlink_to(link)
    reader = target.open()
    write_text(second, ["new\n", "é\ud800"])
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_text() == "new\né\\ud800"
    assert reader.read() == "old"  # another file took its name
    assert names(target.parent) == {"file"}
    (tmp_path / "dangling").symlink_to("real/later")
    write_text(tmp_path / "dangling", ["x"])
    assert (tmp_path / "real/later").read_text() == "x"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_has_the_mode_of_the_umask(tiny, tmp_path, mask):
    before = os.umask(mask)
    try:
        run_training(tiny(**{"train.max_steps": 5}))
        write_text(tmp_path / "text", ["x"])
        with replace_file(tmp_path / "bytes") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT, 0o600))  # as safetensors replaces a file
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "run").rglob("*") if path.is_file()] + [tmp_path / "text", tmp_path / "bytes"]
    assert len(made) > 12
    assert {
        path.name: path.stat().st_mode & 0o777 for path in made if path.stat().st_mode & 0o777 != 0o666 & ~mask
    } == {}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    def parts():
        yield "new"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", parts())
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    assert check_output(str(tmp_path / "pipe"), "nowhere") == tmp_path / "pipe"
    write_text(tmp_path / "pipe", ["a\n", "b\n"])
    reader.join(30)
    assert got == ["a\nb\n"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_device_is_written_into_and_stays_a_device(tmp_path):
    (tmp_path / "link").symlink_to(os.devnull)
    before = os.stat(os.devnull)
    write_text(tmp_path / "link", ["x"])
    assert os.path.samestat(os.stat(os.devnull), before)
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("/dev/full"), ["x"])


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "link"])
def test_a_descriptor_is_appended_to(tmp_path, name):
    """As `--output /dev/stdout` in `(echo first; ...) > file`."""
    with (tmp_path / "file").open("w") as stream:
        stream.write("first\n")
        stream.flush()
        (tmp_path / "link").symlink_to(f"/dev/fd/{stream.fileno()}")
        path = Path(name.format(stream.fileno())) if "{" in name else tmp_path / name
        assert is_stream(path)
        write_text(path, ["second\n"])
        stream.write("third\n")
    assert (tmp_path / "file").read_text() == "first\nsecond\nthird\n"


def test_a_link_to_itself_and_a_lost_folder_are_sentences(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="is a link that leads to itself; name a file"):
        check_output(str(tmp_path / "loop"), "nowhere")
    (tmp_path / "lost").symlink_to("no/file")
    with pytest.raises(ConfigError, match=r"there is no folder '.*no'"):
        check_output(str(tmp_path / "lost"), "nowhere")


def test_a_run_folder_may_be_a_link_to_a_folder(tiny, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    run_training(tiny(**{"train.max_steps": 2}))
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "disk") >= {"best", "last", "metrics.jsonl"}


# JSON


def test_nan_and_infinity_are_null_in_every_json():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": None, "e": "NaN", "f": (1, True)}
    assert json.loads(to_json(value)) == {
        "a": None,
        "b": [1.5, None, {"c": None}],
        "d": None,
        "e": "NaN",
        "f": [1, True],
    }
    assert to_json({"x": 0.1}) == json.dumps({"x": 0.1})


def test_a_prediction_that_is_not_a_number_is_null(tiny, tmp_path, reviews, monkeypatch):
    config = tiny(**{"train.max_steps": 2})
    run_training(config)
    monkeypatch.setattr(predict, "predict", lambda *args: [{"id": "1", "logits": {"a": math.nan}}])
    monkeypatch.setattr(predict, "with_left_out", lambda predictions, *more: predictions)
    predict.main([config.run.folder, "--input", str(reviews), "--output", str(tmp_path / "p.jsonl")])
    assert (tmp_path / "p.jsonl").read_text() == '{"id": "1", "logits": {"a": null}}\n'


# metrics.jsonl


@pytest.fixture
def log(tmp_path):
    return open_log(tmp_path)


def test_the_log_has_null_for_nan_and_reads_it_back(log, tmp_path):
    log.log_evaluation(1, {"loss": math.inf, "accuracy": math.nan}, {}, False, 0.0)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text)["evaluation"] == {"loss": None, "accuracy": None}
    assert math.isnan(logs.read_rows(tmp_path / "metrics.jsonl")[0]["evaluation"]["accuracy"])
    again = open_log(tmp_path, start=1)
    assert math.isnan(again.values_of("accuracy")[0])
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_f04_lines_wait_while_the_disk_is_full(log, tmp_path, capsys):
    """A write that stops inside a line leaves no part of it; the lines follow in their order once there is room."""

    class Full:
        def __init__(self, file):
            self.file, self.fileno, self.truncate = file, file.fileno, file.truncate
            self.calls = 0

        def write(self, data) -> int:
            self.calls += 1
            if self.calls % 2:
                return self.file.write(bytes(data[:10]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log.log_step(1, 0.5, 1e-3, 1.0, {})
    complete = (tmp_path / "metrics.jsonl").read_bytes()
    real, log.file = log.file, Full(log.file)
    for step in (2, 3):
        log.log_step(step, 0.5, 1e-3, 1.0, {})
        assert (tmp_path / "metrics.jsonl").read_bytes() == complete
    assert capsys.readouterr().out.count("cannot be written (No space left on device); the run goes on") == 1
    log.file = real
    log.log_step(4, 0.5, 1e-3, 1.0, {})
    assert [row["step"] for row in logs.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_f04_an_end_that_cannot_be_logged_is_an_error(log, tmp_path):
    log.file.close()
    log.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(TrainingError, match=r"metrics\.jsonl lacks the last 1 lines.* --resume writes its end"):
        log.final(9, {"accuracy": 0.5}, "all steps done", 1.0)


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\0\0\0\0", "[1]\n", '{"step": "x"}\n{"a": 1}\n', "5\n"])
def test_after_a_crash_the_log_has_each_line_once(log, tmp_path, tail):
    for step in (1, 2, 3):
        log.log_step(step, 0.5, 1e-3, 1.0, {})
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write(tail)
    resumed = open_log(tmp_path, start=2)
    resumed.log_step(3, 0.5, 1e-3, 1.0, {})
    assert [row["step"] for row in logs.read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["a folder", "a pipe"])
def test_a_log_that_cannot_be_opened_is_a_sentence(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if kind == "a folder" else os.mkfifo(path)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written: "):
        open_log(tmp_path, total=1)


# The disk


def test_sizes_of_the_checkpoints_are_those_that_are_written(tiny, tmp_path, capsys):
    estimated = {}
    original = disk.estimate_sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "estimate_sizes", lambda *args: estimated.update(original(*args)) or original(*args))
        run_training(tiny(**{"train.max_steps": 10, "regularize.ema_decay": 0.9}))
    for name, size in estimated.items():
        actual = sum(path.stat().st_size for path in (tmp_path / "run" / name).glob("*.safetensors"))
        assert size == pytest.approx(actual, rel=0.15), name  # headers are large beside so small tensors
    assert "checkpoints:" not in capsys.readouterr().out
    run_training(tiny(**{"run.dry_run": True, "checkpoint.keep": "last,best"}))
    shown = capsys.readouterr().out
    assert "checkpoints: last/ 220 kB, best/ 73.4 kB; about 514 kB while one is written, " in shown


def test_f04_a_disk_without_room_is_told_before_training(tiny, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    run_training(tiny(**{"train.max_steps": 1}))
    assert (
        "warning: the checkpoints take about 734 kB while one is written, and 1 kB are free" in capsys.readouterr().out
    )


# The console


def shell(text: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of bash in which "$0" is Python."""
    return subprocess.run(
        ["bash", "-c", text, sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_a_console_that_fails_ends_no_command(tmp_path):
    code = "import sys; from engine import console; console.protect()\n"
    code += "[print('é' * 5000, flush=True) for _ in range(9)]; open(sys.argv[1], 'w').write('done')"
    cases = [">/dev/full", ">&-", ">&- 2>&-", "2>/dev/full >/dev/full", "| head -c 1 >/dev/null"]
    for i, redirections in enumerate(cases):
        done = shell(f'"$0" -c "$1" "$2" {redirections}', code, tmp_path / str(i))
        full = "warning: stdout cannot be written (No space left on device); going on without it\n"
        assert done.stderr == (full if i == 0 else ""), redirections
        assert (tmp_path / str(i)).read_text() == "done", redirections


def test_a_console_that_is_not_utf8_gets_escapes():
    code = "import sys; from engine import console; console.protect(); print('é'); print('ü', file=sys.stderr)"
    done = shell('"$0" -c "$1"', code, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9\n", "\\xfc\n")


@pytest.mark.slow
@pytest.mark.parametrize("redirections", [">/dev/full", ">&- 2>&-", "2>/dev/full", "| head -n 1"])
def test_a_run_with_a_console_that_fails_is_complete(tiny, tmp_path, redirections):
    recipe = arguments_of(tiny(), tmp_path / "recipe.toml")[0]
    done = shell(f'"$0" -m engine.train "$1" {redirections}; exit ${{PIPESTATUS[0]}}', recipe)
    assert done.returncode == 0, done.stderr
    assert logs.read_rows(tmp_path / "run/metrics.jsonl")[-1]["end"] == "all steps done"


def test_unfinished_files_are_hidden_and_removed(tmp_path):
    with replace_file(tmp_path / "file") as temporary:
        assert temporary.name.startswith(WRITING)
        assert temporary.parent == tmp_path
        assert not (tmp_path / "file").exists()
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path / "file"):
        raise KeyboardInterrupt
    assert names(tmp_path) == {"file"}
