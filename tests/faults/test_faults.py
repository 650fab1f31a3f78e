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

from engine import config as configs
from faults import damage, stops
from faults import ranks as ranks_module
from faults.catalogue import FAULTS
from faults.crashes import check_flushes
from faults.runs import Result, Run, without_paths

ROOT = Path(__file__).resolve().parents[2]
CONFIG = configs.Config()
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


def write_shares(folder, ranks, steps, spoil=None):
    """Write what ranks.compare_ids reads: the ids of 40 examples, and those of each step dealt to the ranks."""
    names = [f"r{i}" for i in range(40)]
    for rank in range(ranks):
        lines = [names, *([step, ranks_module.chosen(names, step, CONFIG)[rank::ranks]] for step in range(*steps))]
        if spoil and rank == 0:
            spoil(lines)
        (folder / f"part{ranks}.{rank}").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (None, ""),
        (lambda lines: lines[2][1].reverse(), "in another order"),
        (lambda lines: lines[2][1].__setitem__(0, lines[2][1][1]), "had other examples"),
        (lambda lines: lines[2][1].pop(), "had other examples"),
        (lambda lines: lines.pop(2), "rank 0 read the steps"),
    ],
    ids=["same", "reversed", "repeated", "lost", "step lost"],
)
def test_f08_another_order_is_seen(tmp_path, spoil, found):
    write_shares(tmp_path, 1, (0, 6))
    write_shares(tmp_path, 2, (0, 6), spoil)
    through = tmp_path / "part1"
    (tmp_path / "part1.0").rename(tmp_path / "through.0")
    problem = ranks_module.compare_ids(tmp_path / "part2", 2, (0, 6), through.with_name("through"), CONFIG)
    assert found in problem
    assert bool(found) == bool(problem)


def test_f08_another_permutation_is_seen(tmp_path):
    write_shares(tmp_path, 1, (0, 6))
    (tmp_path / "part1.0").rename(tmp_path / "through.0")
    other = configs.override(CONFIG, {"run.seed": 7})
    problem = ranks_module.compare_ids(tmp_path / "through", 1, (0, 6), tmp_path / "through", other)
    assert "other examples than the permutation" in problem


@pytest.mark.parametrize(("at", "found"), [(8, ""), (9, ""), (7, "came after 7 steps"), (10, "came after 10 steps")])
def test_f05_a_stop_two_steps_later_is_seen(tmp_path, at, found):
    (tmp_path / "last").mkdir()
    (tmp_path / "last/state.json").write_text('{"train": {"step": 9}}')
    run = Run.__new__(Run)
    run.folder = tmp_path
    assert found in (problem := stops.check_step(run, "stopped at step 9; resume", at))
    assert bool(found) == bool(problem)


def test_f06_late_ranks_are_seen():
    seconds = {"others down": 7.9, "torchrun down": 25.0}
    assert ranks_module.check_seconds("kill", **seconds) == ranks_module.check_seconds("stop", **seconds) == ""
    assert "others down" in ranks_module.check_seconds("kill", **seconds | {"others down": 10.5})
    assert "others down" in ranks_module.check_seconds("stop", **seconds | {"others down": 8.5})
    assert "torchrun down" in ranks_module.check_seconds("stop", **seconds | {"torchrun down": 60.0})


def test_f09_a_sentence_that_is_not_the_last_is_seen():
    sentence, rule = "error: only this rank knows this", "=" * 60
    assert ranks_module.check_screen(1, f"{sentence}\nRoot Cause\n  traceback : {sentence}\n{rule}\n", "mistake") == ""
    assert "not the last" in ranks_module.check_screen(1, f"{sentence}\nRoot Cause\n  traceback : other", "mistake")
    assert "not one" in ranks_module.check_screen(1, f"data.errors.DataError: {sentence}\n{sentence}", "mistake")


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
