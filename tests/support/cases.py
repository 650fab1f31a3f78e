"""A command on files of one's own, in this process: what it prints, or the sentence with which it refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import config as configs
from engine import evaluate, predict, train
from engine.cli import StopRequest
from engine.plugins import load_plugins
from support.runs import CPU, QuietStop
from support.task_data import write_model

Content = bytes | str | list[Any]  # of a file; a list is written as JSON lines


def write_file(path: Path, content: Content) -> Path:
    """Write a file as UTF-8 without changing its line ends; a list as a JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def settings_for(task: str, folder: Path, train: Content | Path, name: str = "train.jsonl", **settings: Any) -> dict:
    """Return the settings of a short run of a task on `train`, a file's content or a path; other settings as a__b."""
    path = train if isinstance(train, Path) else write_file(folder / name, train)
    model = folder / "model"
    if not model.is_dir():
        write_model(task, model)
    known = {
        "run.task": task,
        "run.device": "cpu",
        "run.folder": str(folder / "run"),
        "model.name": str(model),
        "model.init": "scratch",
        "data.train": str(path),
        "data.max_length": 24,
        "train.max_steps": 2,
        "train.global_batch_size": 8,
    }
    return known | {key.replace("__", "."): value for key, value in settings.items()}


def run(settings: dict[str, Any], capsys: pytest.CaptureFixture[str], stop: StopRequest | None = None) -> str:
    """Train as `python -m engine.train` does; return all that is printed. Raises what the command would refuse."""
    config = configs.override(configs.Config(), settings)
    load_plugins(config.run.plugins)
    configs.check(config)
    from engine.checkpoint import claim

    capsys.readouterr()
    with claim(config, CPU) as resumed:
        train.train(config, CPU, QuietStop() if stop is None else stop, resumed)
    printed = capsys.readouterr()
    return printed.out + printed.err


def dry_run(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what --dry-run prints below the resolved recipe."""
    printed = run(settings | {"run.dry_run": True}, capsys)
    return printed[printed.index("weights:") :]


def predictions(run_folder: Path | str, source: Path, *more: str) -> list[dict[str, Any]]:
    """Return the lines that engine.predict writes for a file."""
    output = source.with_suffix(".predictions.jsonl")
    predict.main([str(run_folder), "--input", str(source), "--output", str(output), "--run.device=cpu", *more])
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def evaluation(run_folder: Path | str, source: Path, *more: str) -> dict[str, Any]:
    """Return the JSON object that engine.evaluate writes for a labelled file."""
    output = source.with_suffix(".metrics.json")
    evaluate.main([str(run_folder), "--data.test", str(source), "--output", str(output), "--run.device=cpu", *more])
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result
