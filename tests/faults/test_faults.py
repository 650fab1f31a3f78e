"""A sample, with a fixed seed, of every fault of the harness; README.md says how to put them in full."""

from __future__ import annotations

import fnmatch
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from faults import damage
from faults.catalogue import FAULTS
from faults.crashes import check_flushes
from faults.runs import Result, without_paths

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ("F2", "F15", "F17")  # a crash within a save, a pickle, two runs in one folder: seconds each


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """Return {fault: its row} of the faults that were selected, from two processes at the same time."""
    chosen = [item.callspec.params["name"] for item in request.session.items if item.originalname == "test_sample"]
    folder = tmp_path_factory.mktemp("faults")
    parts = [part for part in (chosen[::2], chosen[1::2]) if part]
    commands = [[sys.executable, "-m", "tests.faults", "--sample", "--output", f"{i}.json"] for i in range(len(parts))]
    processes = [
        subprocess.Popen(
            [*command, *part],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, part in zip(commands, parts, strict=True)
    ]
    printed = [process.communicate()[0] for process in processes]
    rows = {}
    for i in range(len(parts)):
        report = folder / f"{i}.json"
        rows |= {row["fault"]: row for row in json.loads(report.read_text())["results"]} if report.is_file() else {}
    assert sorted(rows) == sorted(chosen), "\n".join(printed)[-3000:]
    return rows


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in FAULTS]
)
def test_sample(reports, name):
    row = reports[name]
    if "skipped" in row:
        pytest.skip(row["skipped"])
    assert row["failures"] == []
    assert row["survived"] == row["tries"] > 0


# What the harness itself could miss


def test_damage_changes_the_content():
    rng, whole = random.Random(0), bytes(range(200))
    for kind in ("bit", "truncated"):
        for _ in range(50):
            assert damage.damage(whole, kind, rng) != whole


SAVE = ["open /.writing-last/a", "write /.writing-last/a", "fsync /.writing-last/a", "fsync /.writing-last"]


def test_f02_a_save_that_does_not_flush_is_seen():
    rename = "rename /.writing-last"
    assert check_flushes([*SAVE, rename, "fsync "]) == ""
    assert "a was renamed before it was flushed" in check_flushes([*SAVE[:2], rename])
    assert "a was renamed" in check_flushes([*SAVE, "write /.writing-last/a", rename])
    tensors = ["open /.writing-last/.tmpX", "write /.writing-last/.tmpX", "rename /.writing-last/.tmpX"]
    assert check_flushes([*tensors, "fsync /.writing-last/model.safetensors", rename]) == ""
    assert check_flushes([*tensors, rename]) != ""


def test_a_report_names_no_folder_of_this_machine(tmp_path):
    text = f"{tmp_path}/run1/last and {ROOT}/engine/train.py and /usr/lib/python3.11/site-packages/torch/x.py"
    assert (
        without_paths(text, tmp_path) == "FOLDER/run1/last and REPOSITORY/engine/train.py and site-packages/torch/x.py"
    )


def test_tries_are_counted_by_what_happened():
    result = Result()
    result.add(None, "kill")
    result.add("hung", "kill")
    result.add("", "stop")
    assert (result.tries, result.survived, result.failures) == (3, 2, ["kill: hung"])
    assert result.details == {"kill": 2, "stop": 1}


def test_tests_that_security_md_names_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w*]+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, pattern in named:
        tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert fnmatch.filter(tests, pattern), (file, pattern)
