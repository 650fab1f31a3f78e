"""F5, F6, F7, F9, F10: processes of a run that die, stop, hang or fail; the signals of a group and of torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from support.runs import arguments_of, assert_same_run, logged_rows, run_training, tiny_config

import models
from data import DataError, TextExamples
from data.order import epoch_order
from data.workers import WorkerError, stop_signals
from engine import checkpoint, cli, distributed, heartbeat, train, validate
from engine.cli import StopRequest
from engine.config import ConfigError, override
from engine.errors import LostRankError
from engine.heartbeat import Heartbeat

NUM_TRAINING, BATCH = 108, 16  # of tiny_config
DIES = "TEST_DIES"  # environment variable: the rank that kills itself in the first attempt of torchrun


# Data that does not come


def fail_at_step(monkeypatch, step, fail):
    """Let the training examples of a step of the first epoch do something when they are read."""
    bad = set(epoch_order(0, 0, NUM_TRAINING)[BATCH * step : BATCH * (step + 1)].tolist())
    batch = TextExamples.batch

    def failing(examples, indices, epoch=None):
        if epoch is not None and bad & {*map(int, indices)}:
            fail()
        return batch(examples, indices, epoch)

    monkeypatch.setattr(TextExamples, "batch", failing)


def raise_data_error():
    raise DataError("r1.png is broken")


@pytest.fixture
def handlers():
    """What signals do is as before after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("workers", "step"), [(0, 3), (2, 3), (2, 0)])
def test_f10_data_that_cannot_be_read_costs_no_step(tiny, tmp_path, monkeypatch, workers, step):
    """The error is raised after a checkpoint, unless there is nothing to save."""
    through = tiny(**{"train.max_steps": 6, "run.folder": str(tmp_path / "through")})
    config = override(through, {"run.folder": str(tmp_path / "run"), "data.num_workers": workers})
    with monkeypatch.context() as patch:
        fail_at_step(patch, step, raise_data_error)
        with pytest.raises(DataError, match=r"^r1\.png is broken"):
            run_training(config)
    assert (tmp_path / "run/last").exists() == (step > 0)
    if step:
        assert max(row["step"] for row in logged_rows(config.run.folder)) == step
        run_training(override(config, {"run.resume": "yes"}))
        run_training(through)
        assert_same_run(config.run.folder, through.run.folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_f05_a_signal_is_seen_while_data_hangs(tiny, monkeypatch, handlers, workers):
    config = tiny(**{"data.num_workers": workers})
    fail_at_step(monkeypatch, 3, lambda: time.sleep(100))
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    stop = StopRequest()
    assert run_training(config, stop) is None
    assert stop.exit_code == 128 + signal.SIGTERM
    assert max(row["step"] for row in logged_rows(config.run.folder)) == 3
    assert checkpoint.verify(Path(config.run.folder) / "last") is None


def test_f10_data_that_does_not_come_ends_the_run(tiny, monkeypatch, capfd):
    config = tiny(**{"data.num_workers": 1, "distributed.timeout_seconds": 1.5})
    fail_at_step(monkeypatch, 3, lambda: time.sleep(100))
    with pytest.raises(WorkerError, match=r"no data of step 4 for 1.5 s .* was reading example id 'r\d+' of step 4$"):
        run_training(config)
    assert checkpoint.verify(Path(config.run.folder) / "last") is None
    assert "in run_training" in capfd.readouterr().err  # the stack


# The heartbeat of one rank, which is called here instead of being started as a thread


class EndedError(Exception):
    """Stands for the end of the process."""


def end(code):
    raise EndedError(code)


@pytest.fixture
def beat(monkeypatch):
    """Return beat(store, timeout), which runs the thread's loop of rank 0 of 2 here until it ends the process."""
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def beat(store, timeout=1.0, seconds=0.5):
        thread = Heartbeat(store, 0, 2, timeout)
        threading.Timer(seconds, thread.ended.set).start()
        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", end)
            thread.run()

    return beat


@pytest.mark.parametrize("is_dead", [True, False])
def test_f06_a_rank_without_a_beat_is_named_once(beat, capfd, is_dead):
    store = dist.HashStore()
    store.set("who/1", "machine other, process 7")
    store.set("alive/1", "1 0")
    if is_dead:
        store.set(heartbeat.TROUBLE, "yes")
    with pytest.raises(EndedError, match="75"):
        beat(store, 0.2)
    said = capfd.readouterr().err
    fault = "has ended unexpectedly" if is_dead else "has not answered for 0.2 s (distributed.timeout_seconds)"
    last = f"error: rank 1 (machine other, process 7) {fault}. The same command with --resume continues from the last"
    assert said.splitlines()[-1].startswith(last)
    assert ("in beat" in said) == (not is_dead)  # the stack
    with pytest.raises(EndedError, match="75"):  # another rank, which finds the verdict
        beat(store)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", ["ended", "beats"])
def test_a_rank_that_beats_or_has_ended_is_not_missed(beat, value):
    store = dist.HashStore()
    store.set("alive/1", value)
    ended = threading.Event()

    def go_on():
        beats = 0
        while value == "beats" and not ended.wait(0.02):
            store.set("alive/1", f"{(beats := beats + 1)} 0")

    other = threading.Thread(target=go_on)
    other.start()
    beat(store, 0.2)
    ended.set()
    other.join()


@pytest.mark.parametrize("key", [heartbeat.FAILED, heartbeat.VERDICT])
@pytest.mark.parametrize(("machine", "local_rank"), [("0", "0"), ("1", "0"), ("1", "1")])
def test_f09_a_sentence_is_printed_once_on_each_machine(beat, monkeypatch, capfd, key, machine, local_rank):
    monkeypatch.setattr(heartbeat, "VERDICT_SECONDS", 0.1)
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    store = dist.HashStore()
    store.set(key, f"{machine} rank 3 has failed: why")
    with pytest.raises(EndedError, match="75"):
        beat(store)
    assert capfd.readouterr().err == ("error: rank 3 has failed: why\n" if (machine, local_rank) == ("1", "0") else "")


class UnreachableStore:
    """A store that does not answer, as when a cable is cut: a request waits, without an error."""

    def __init__(self):
        self.healed = threading.Event()

    def set(self, *_):
        self.healed.wait()
        raise RuntimeError("the store has ended")

    get = check = add = set


def test_f06_a_store_that_does_not_answer_ends_the_rank(monkeypatch, capfd):
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    store = UnreachableStore()
    thread = Heartbeat(store, 3, 4, 0.2)
    thread.start()
    with pytest.raises(EndedError, match="75"):
        thread.watch_store("10.0.0.1:29500")
    thread.ended.set()
    store.healed.set()
    host = f"(machine {socket.gethostname()}, process {os.getpid()})"
    sentence = f"error: rank 3 {host} has not reached 10.0.0.1:29500 (MASTER_ADDR, MASTER_PORT) for 0.2 s (distributed"
    assert capfd.readouterr().err.startswith(sentence)


def test_f05_a_process_whose_parent_has_gone_stops_itself(beat, monkeypatch):
    monkeypatch.setenv(heartbeat.PARENT, "1")
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    beat(None, seconds=0.2)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_f05_a_process_without_such_a_parent_watches_nothing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    heartbeat.start(None, 0, 1, 300)
    assert heartbeat._own is None


def test_f06_a_rank_that_does_not_join_is_named():
    with pytest.raises(LostRankError, match=r"^rank 1, 2 of 3 has not joined the run within 0.2 s"):
        heartbeat.join(dist.HashStore(), 0, 3, 0.2)


def test_f06_a_slow_rank_is_found():
    store = dist.HashStore()
    thread = Heartbeat(store, 0, 3, 300)
    thread.collectives = 7
    for rank, value in enumerate(["5 6", "5 7", "5 6"]):
        store.set(f"alive/{rank}", value)
    assert thread.find_slow() == [2]


# Under torchrun, which runs this file too


def die(rank: int) -> None:
    """Patch the loop to kill a rank in its eighth step, three after a checkpoint."""
    calls = []

    def counting(penalties):
        calls.append(1)
        if len(calls) == 8 and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    train.Penalties.add_gradients_ = counting


def main(argv):
    if DIES in os.environ and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die(int(os.environ[DIES]))
    return train.main(argv)


@contextmanager
def torchrun(config, folder: Path, *options: str, **env: str) -> Iterator[subprocess.Popen]:
    """Start the run on two ranks; at the end nothing of it is left, whatever happens."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    root = Path(models.__file__).parent.parent
    paths = os.pathsep.join(map(str, (root, root / "tests", Path(__file__).parent)))
    process = subprocess.Popen(
        [*launcher, "-m", "test_processes", *arguments_of(config, folder / "recipe.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | env,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if line.startswith("step "):
            return


def children_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("reads /proc")
    return [int(pid) for pid in children.read_text().split()]


def is_running(pid: int) -> bool:
    """Return False for a process that has ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def join_all(store, ranks=(0, 1), world_size=2, seconds=5.0):
    """Return {rank: what heartbeat.join returned or raised}, called by a thread of each rank."""
    results = {}

    def call(rank):
        try:
            results[rank] = heartbeat.join(store, rank, world_size, seconds)
        except (LostRankError, EndedError) as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_f07_ranks_agree_on_the_attempt_of_torchrun():
    """A store keeps what ranks that died have set, and machines count their restarts for themselves."""
    store = dist.HashStore()
    assert join_all(store) == {0: "attempt 1", 1: "attempt 1"}
    assert join_all(store) == {0: "attempt 2", 1: "attempt 2"}
    assert "has not joined" in str(join_all(store, ranks=[1], seconds=0.3)[1])  # not taken into an old attempt
    assert join_all(store) == {0: "attempt 3", 1: "attempt 3"}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("machine", ["0", "1"])
def test_f09_a_rank_that_fails_before_it_joins_is_not_waited_for(monkeypatch, capfd, failing, machine):
    """Its sentence is printed once on each machine."""
    monkeypatch.setattr(heartbeat, "VERDICT_SECONDS", 0.3)
    monkeypatch.setattr(os, "_exit", end)
    store = dist.HashStore()
    with monkeypatch.context() as patch:
        patch.setenv("GROUP_RANK", machine)
        heartbeat.announce_failure_before_joining(store, failing, "no such file")
    waiting = 1 - failing
    assert str(join_all(store, ranks=[waiting])[waiting]) == "75"
    said = capfd.readouterr().err
    expected = (
        f"error: rank {failing} (machine {socket.gethostname()}, process {os.getpid()}) has failed: no such file\n"
    )
    assert said == ("" if machine == "0" else expected)


def test_f09_a_failure_of_an_earlier_attempt_ends_nothing():
    store = dist.HashStore()
    heartbeat.announce_failure_before_joining(store, 1, "no such file")
    assert join_all(store) == {0: "attempt 1", 1: "attempt 1"}


@pytest.mark.slow
def test_f07_a_run_with_a_dead_rank_ends_as_one_without(checkpoint_folder, reviews, tmp_path):
    """--max-restarts starts all ranks again, and run.resume = auto continues; the dead rank is named within seconds."""
    for name, env in ("dies", {DIES: "1"}), ("through", {}):
        settings = {"train.max_steps": 10, "run.resume": "auto"}
        config = tiny_config(checkpoint_folder, reviews, tmp_path / name, settings)
        with torchrun(config, tmp_path, "--max-restarts=1", **env) as process:
            out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert out.count("all steps done") == 1
        assert "Traceback" not in err
        assert err.count("error: rank 1 (machine ") == err.count(") has ended unexpectedly. ") == len(env)
    assert_same_run(tmp_path / "dies", tmp_path / "through")


@pytest.mark.slow
def test_f06_a_stopped_rank_is_named_with_stacks(tiny, tmp_path):
    config = tiny(**{"train.max_steps": 5000, "eval.every_steps": 1000, "distributed.timeout_seconds": 5})
    with torchrun(config, tmp_path) as process:
        wait_for_step(process)
        os.kill(children_of(process)[1], signal.SIGSTOP)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("has not answered for 5 s (distributed.timeout_seconds)") == 2  # ours, and torchrun's root cause
    assert "the stacks of rank 0:" in err
    assert err.count("in all_sum") + err.count("in backward") >= 1
    assert "exitcode  : 75" in err.split("Root Cause")[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_f05_a_signal_to_torchrun_stops_the_ranks(tiny, tmp_path, number):
    """torchrun passes SIGTERM on, and dies of the other two, which its ranks notice."""
    config = tiny(**{"train.max_steps": 5000, "eval.every_steps": 1000})
    with torchrun(config, tmp_path) as process:
        wait_for_step(process)
        ranks = children_of(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)  # until every rank has closed its end of the pipes
        assert process.returncode == (1 if number == signal.SIGTERM else -number)
        assert "; the same command with --resume continues the run" in out, err
        assert checkpoint.verify(Path(config.run.folder) / "last") is None
        assert [pid for pid in ranks if is_running(pid)] == []


if __name__ == "__main__":
    cli.run_command(main)


@pytest.mark.parametrize(
    ("own", "others"), [({"run.seed": 1}, "run.seed = 2"), ({"run.seed": 2, "data": "a"}, "data = 'b'")]
)
def test_ranks_that_differ_are_told_so(monkeypatch, own, others):
    theirs = {"run.seed": 2, "data": "b"}
    own = theirs | own
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, value, theirs])
    with pytest.raises(ConfigError, match=f"rank 2 has {others}, and rank 0 .*: start all ranks with the same recipe"):
        distributed.check_agreement(own)
    distributed.check_agreement(theirs)


def test_names_of_files_may_differ_between_ranks(tiny):
    here, there = tiny(), tiny(**{"run.folder": "elsewhere", "data.train": "mine.jsonl"})
    assert validate.shared_settings(here) == validate.shared_settings(there)
    assert validate.shared_settings(here) != validate.shared_settings(tiny(**{"optim.lr": 1.0}))


def test_a_closed_terminal_stops_a_run_unless_it_is_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert signal.SIGHUP not in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.SIGHUP in stop_signals()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE = 'many' should be a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1' should be a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK = 0 and WORLD_SIZE = 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2 and WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "needs MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_variables_of_another_launcher_are_checked(monkeypatch, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as raised:
        distributed.setup("cpu")
    monkeypatch.setenv("WORLD_SIZE", variables["WORLD_SIZE"] if variables.get("WORLD_SIZE") == "many" else "1")
    cli._print_once(str(raised.value))
    assert message in capsys.readouterr().err
