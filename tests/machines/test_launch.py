"""engine/launch: the scripts for SLURM and ssh, with stubs of ssh, srun, scontrol and scancel.

The two machines are 127.0.0.1 and 127.0.0.2. torchrun, its rendezvous and the ranks are real.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import arguments_of

import models
from engine.checkpoint import LAST, verify

ROOT = Path(models.__file__).parent.parent
SCRIPTS = sorted((ROOT / "engine" / "launch").glob("*.sh"))
STUBS = {
    "ssh": 'while [ "$1" = -o ]; do shift 2; done; shift; exec sh -c "$*"',
    "scontrol": 'case "$1" in show) printf "127.0.0.1\\n127.0.0.2\\n";; *) echo "scontrol $*" >>"$CALLS";; esac',
    "scancel": 'echo "scancel $*" >>"$CALLS"; kill -TERM $(cat "$CALLS.tasks")',
    "srun": """
        for node in 1 2; do SLURMD_NODENAME=127.0.0.$node "$@" & tasks+=($!); done
        echo "${tasks[*]}" >"$CALLS.tasks"
        for task in "${tasks[@]}"; do wait "$task" || result=$?; done
        exit "${result:-0}" """,
}


@pytest.fixture
def environment(tmp_path):
    """Return the environment in which the stubs are found before the programs."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "127.0.0.[1-2]"}
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PORT": str(20_000 + os.getpid() % 10_000)}
    return os.environ | own | slurm | {"CALLS": str(tmp_path / "calls")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_the_script(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ssh_without_hosts_says_its_usage():
    done = subprocess.run(["bash", str(ROOT / "engine/launch/ssh.sh"), "--", "recipe"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bash ssh.sh HOST ... -- ")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "number"), [("ssh.sh", signal.SIGINT), ("slurm.sh", signal.SIGUSR1)])
def test_two_machines_train_stop_and_go_on(script, number, tiny, tmp_path, environment):
    """Ctrl-C, and the signal before the time limit, end the run after a checkpoint; the next start goes on."""
    config = tiny(**{"train.max_steps": 100_000, "eval.every_steps": 50_000})
    command = [
        "bash",
        str(ROOT / "engine" / "launch" / script),
        *(["127.0.0.1", "127.0.0.2", "--"] * (script == "ssh.sh")),
    ]
    arguments = arguments_of(config, tmp_path / "recipe.toml")
    code, printed = finish([*command, *arguments], environment, tmp_path / "first", number)
    assert "= 2 ranks x" in printed
    (stopped_at,) = re.findall(r"stopped at step (\d+)", printed)
    assert code != 0
    assert verify(Path(config.run.folder) / LAST) is None
    if script == "slurm.sh":
        assert Path(environment["CALLS"]).read_text() == "scancel --signal=TERM 77\nscontrol requeue 77\n"
    changes = ["--train.max_steps", str(int(stopped_at) + 20), "--run.allow_changes", "true"]
    code, printed = finish([*command, *arguments, *changes], environment, tmp_path / "second", None)
    assert code == 0
    assert f"after step {stopped_at}" in printed
    assert "all steps done" in printed


def finish(command, environment, screen, number):
    """Run a script to its end, with a signal to it after step 5, if any; return (exit code, what it printed)."""
    with screen.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=screen.parent, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + 100
        while number and f"step {5:>6}  loss" not in screen.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        if number:
            process.send_signal(number)
        return process.wait(100), screen.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
