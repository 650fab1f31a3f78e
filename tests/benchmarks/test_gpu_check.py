"""benchmarks.gpu_check on a CPU: every part runs with tiny models, a fault is seen, and no row is lost."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import zoo
from support.runs import CPU, run_module

from benchmarks import record, switches
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import correctness, inference, machine, pieces, recovery, table, training_speed, waits
from benchmarks.gpu_check.attention import CASES
from benchmarks.gpu_check.check import Check, first_line
from benchmarks.throughput import FailedError
from engine.precision import Precision
from engine.tasks import TASKS


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """A part on the CPU with tiny models and much time."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    end = time.monotonic() + 1000
    return Check(CPU.device, True, tmp_path / "files", scratch, tmp_path / "rows.jsonl", end)


def rows_of(part: ModuleType, check: Check) -> list[dict[str, Any]]:
    """Run a part and return its rows."""
    part.run(check)
    return [json.loads(line) for line in check.rows.read_text().splitlines()]


def failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["runs"] and row["runs"][0].get("ok") is False]


def test_machine_measures_products_and_copies(check):
    rows = rows_of(machine, check)
    assert {"versions", "device", "product", "copy"} == {row["work"] for row in rows}
    assert all(row["runs"][0]["value"] > 0 for row in rows if row["work"] in ("product", "copy"))


def test_correctness_compares_every_architecture_and_head(check):
    rows = rows_of(correctness, check)
    assert failed(rows) == []
    works = {row["work"] for row in rows}
    assert {f"without {name}" for name in switches.NAMES} <= works
    assert {f"{model_type} {head}" for model_type, head in zoo.cases()} <= works
    assert {"dropout", "dropout of attention", "bert regression", "t5 seq2seq-lm, wide"} <= works


def test_correctness_sees_a_fault_of_one_number_format(check, monkeypatch):
    attention = F.scaled_dot_product_attention

    def wrong(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return attention(query * (1.02 if query.dtype == torch.float32 else 1), *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    monkeypatch.setattr(correctness, "cases", lambda: [("gpt2", "gpt2", "causal-lm", {}, "single-label")])
    monkeypatch.setattr(correctness, "check_pieces", lambda check: None)
    found = [(row["work"], row["variant"]) for row in failed(rows_of(correctness, check))]
    assert found == [*((f"attention, {case.name}", "fp32") for case in CASES), ("gpt2", "fp32")]


def test_piece_that_changes_the_loss_is_seen(check, monkeypatch):
    monkeypatch.setattr(switches, "NAMES", ("fetch-ahead", "wrong"))
    monkeypatch.setitem(switches.PIECES, "wrong", ("models.heads", "classification_loss", lambda x, *_: x.sum()))
    pieces.check_pieces(check)
    right, wrong = (json.loads(line) for line in check.rows.read_text().splitlines())
    assert right["runs"][0] == {"ok": True, "loss_error": 0.0}
    assert wrong["runs"][0]["ok"] is False


def test_waits_trains_every_task(check):
    rows = rows_of(waits, check)
    assert failed(rows) == []
    assert {*TASKS} <= {row["work"] for row in rows}
    assert "text-classification R-Drop" in {row["work"] for row in rows}


def test_waits_name_the_place_of_an_error(check, monkeypatch):
    def backward(*args: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(Precision, "backward", backward)
    monkeypatch.setattr(waits, "OPTIONS", {})
    monkeypatch.setattr(waits, "TASKS", ["text-classification"])
    (row,) = failed(rows_of(waits, check))
    assert row["runs"][0]["where"].startswith("RuntimeError: called a synchronizing CUDA operation (tests/benchmarks/")


def test_recovery_equals_the_undisturbed_runs(check):
    rows = rows_of(recovery, check)
    works = ["micro-batch auto", "out of memory", "resume", "run.deterministic", "one rank of DDP"]
    assert [row["work"] for row in rows] == works
    assert failed(rows) == []
    assert rows[1]["runs"][0]["where"].startswith("halved to [")


def test_prediction_equals_transformers(check):
    pytest.importorskip("transformers")
    inference.compare_prediction(check, "fp32")
    ours, theirs = (json.loads(line) for line in check.rows.read_text().splitlines())
    assert theirs["runs"][0]["ok"]
    assert ours["runs"][0]["samples_per_second"] > 0


def test_failed_and_late_cases_are_notes(check, monkeypatch):
    def run_case(*args: object, **options: object) -> None:
        check.end = 0.0
        raise FailedError("no kernel")

    monkeypatch.setattr(training_speed.Bench, "run_case", run_case)
    first, second, third = rows_of(training_speed, check)
    assert first["note"] == "fp32: no kernel"
    assert second["note"] == third["note"] == "not started: 0 s were left"


def test_cases_on_a_gpu_leave_out_every_piece(check):
    check.device = torch.device("cuda")
    variants = [case.variant for case in training_speed.cases(check)]
    assert {f"bf16 without={name}" for name in switches.NAMES} <= {*variants}
    assert variants[:5] == ["bf16"] * 5


# The command


def arguments(tmp_path: Path, *given: str) -> list[str]:
    return ["--shrink", "--device", "cpu", "--output", str(tmp_path / "out" / "record.json"), *given]


def test_command_writes_a_record_and_a_table(tmp_path, capsys):
    assert command.main(arguments(tmp_path, "--parts", "1", "--minutes", "2")) == 0
    printed = capsys.readouterr().out
    assert "### machine" in printed
    assert "| product  |" in printed
    content = record.read(tmp_path / "out" / "record.json")
    assert content["benchmark"] == "gpu_check"
    assert {row["part"] for row in content["results"]} == {"machine"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["record.json"]


def test_killed_part_keeps_its_rows_and_others_are_skipped(tmp_path, monkeypatch, capsys):
    """The part starts a process of its own, which is ended with it."""
    program = (
        "import json, pathlib, subprocess, sys, time; job = json.loads(sys.argv[2]);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "row = {'work': str(child.pid), 'variant': '', 'runs': [{}]};"
        "pathlib.Path(job['rows']).write_text(json.dumps(row) + '\\n');"
        "time.sleep(60)"
    )
    start = command.start
    monkeypatch.setattr(command, "start", lambda given, output: start(["-c", program, *given[2:]], output))
    monkeypatch.setattr(command, "LEAST_SECONDS", 1.5)
    monkeypatch.setattr(command, "PARTS", {"machine": 5, "waits": 1})
    assert command.main(arguments(tmp_path, "--minutes", "0.06")) == 0
    first, ending, *rest = record.read(tmp_path / "out" / "record.json")["results"]
    assert ending["note"].startswith("killed after 3 s")
    assert not Path(f"/proc/{first['work']}/cmdline").exists() or is_zombie(int(first["work"]))
    assert [row["note"][:8] for row in rest if row["work"] == "waits"] == ["skipped:"]
    assert "- waits: skipped" in (printed := capsys.readouterr().out)
    assert "not finished: machine, waits; --parts machine,waits runs them alone" in printed


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_crashed_part_is_named_and_fails_the_command(tmp_path, monkeypatch, capsys):
    start = command.start
    monkeypatch.setattr(command, "start", lambda given, output: start(["-c", "raise OSError('no device')"], output))
    assert command.main(arguments(tmp_path, "--parts", "machine")) == 1
    assert "NOT OK: machine: the whole part" in (printed := capsys.readouterr().out)
    assert "ended with code 1: OSError: no device" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--parts", "8"], "--parts: '8' is not one of 1 to 7, machine, "),
        (["--device", "cpu"], "there is no GPU; --shrink runs all parts"),
    ],
)
def test_command_names_a_mistake_in_its_arguments(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_time_that_a_part_leaves_goes_to_the_later_ones():
    parts = [*command.PARTS]
    total = sum(command.PARTS.values())
    assert command.share_of_time(total, parts) == command.PARTS["machine"]
    assert command.share_of_time(total, parts[1:]) > command.PARTS["correctness"]
    assert command.share_of_time(100, parts[-1:]) == 100


def test_table_compares_ours_with_other_trainers():
    ours = {"samples_per_second": 300.0, "tokens_per_second": 3000.0, "peak_memory_mb": 50, "flops_per_second": 4e14}
    theirs = {"samples_per_second": 200.0, "tokens_per_second": 1500.0, "peak_memory_mb": 100}
    rows = [
        {"part": "machine", "work": "product", "variant": "bf16", "runs": [{"value": 800.0}]},
        {"part": "training_speed", "work": "bert", "variant": "bf16 compiled", "runs": [ours]},
        {"part": "other_trainers", "work": "bert", "variant": "hf bf16 compiled", "runs": [theirs]},
        {"part": "other_trainers", "work": "bert", "variant": "hf bf16", "runs": [theirs]},
        {"part": "training_speed", "work": "bert", "variant": "bf16", "runs": [ours | {"samples_per_second": 150.0}]},
        {"part": "waits", "work": "dialogue", "variant": "bf16", "runs": [{"ok": False, "where": "heads.py:3"}]},
    ]
    printed = table.format_tables(record.describe("gpu_check", rows, []))
    assert "ours is as fast" in printed
    (compared,) = [line for line in printed.splitlines() if line.startswith("| bert | hf bf16 compiled")]
    assert " 2.00 " in compared
    assert " 0.50 " in compared
    assert re.search(r"\| bert \| bf16 compiled +\| 300.0 +\| 3,000 +\| 2.00 ", printed)
    assert " 50% " in printed
    assert table.failures(rows) == ["NOT OK: waits: dialogue bf16 heads.py:3 "]


def test_first_line_of_an_error_has_its_place():
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("one\ntwo")
    assert first_line(raised.value).startswith("JSONDecodeError: Expecting value: line 1 column 1 (char 0) (tests/")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    pytest.importorskip("transformers")
    done = run_module("benchmarks.gpu_check", *arguments(tmp_path, "--minutes", "4.5"))
    assert done.returncode == 0, done.stdout
    rows = record.read(tmp_path / "out" / "record.json")["results"]
    assert {row["part"] for row in rows} == {*command.PARTS}
    endings = {row["part"]: row["note"] for row in rows if row["work"] == "the whole part"}
    assert endings == dict.fromkeys(command.PARTS, "")
