"""A task written by hand: the example in engine/tasks/task.py runs as it stands, and the defaults of the slots."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import torch
from support.runs import run_training
from support.task_data import write

from engine import config as configs
from engine import evaluate, plugins
from engine.config import Config
from engine.tasks import TASKS, task
from engine.tasks.task import Task, no_labels


def test_the_example_of_a_task_of_ones_own_runs(tmp_path, capsys):
    code = task.__doc__.partition("recalled worst:\n")[2]
    plugin = tmp_path / "my_tasks.py"
    plugin.write_text(textwrap.dedent(code))
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    settings = write("text-classification", tmp_path)
    for name in ("train", "validation"):
        path = Path(settings[f"data.{name}"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"review": r["text"], "stars": r["label"]}) + "\n" for r in rows))
    changes = {
        "run.task": "stars",
        "run.plugins": (str(plugin),),
        "run.folder": str(tmp_path / "run"),
        "eval.mode": "max",
    }
    try:
        plugins.load_plugins([str(plugin)])
        config = configs.override(Config(), settings | changes | {"train.max_steps": 4})
        result = run_training(config)
        assert set(result) == {"best_worst_recall", "best_step"}
        arguments = ["--data.test", settings["data.validation"], "--run.plugins", str(plugin)]
        assert evaluate.main([config.run.folder, *arguments]) == 0
        assert "worst_recall" in capsys.readouterr().out
    finally:
        plugins.load_plugins([])
    assert "stars" not in TASKS


def test_a_task_needs_only_what_has_no_default():
    minimal = Task(
        head="causal-lm",
        metrics=("loss",),
        read=lambda name, settings, labelled: [],
        encode=lambda rows, processor, settings, labels, labelled: None,
        evaluate_batch=lambda model, batch, examples, generate: torch.zeros(1),
        compute_metrics=lambda statistics, labels: {"loss": statistics[0].item()},
        predict_batch=lambda model, batch, examples, generate: [],
    )
    assert minimal.find_labels is no_labels
    assert minimal.find_labels("FILE", [], None) == []
    assert minimal.check_labels("FILE", [], None, []) is None
    assert minimal.format_table(torch.zeros(1), []) == minimal.show_generations(None, None, None, 3) == ""
