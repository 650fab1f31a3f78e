"""The console scripts, finetune-train and so on: each runs a module of the engine as `python -m` does."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

# {the end of a script's name: its module}; pyproject.toml lists the scripts.
MODULES = {
    name: f"engine.{name}"
    for name in ("train", "evaluate", "predict", "study", "export", "report", "new", "completion")
}


def as_started(text: str) -> str:
    """Return a text with the commands in it as this process was started: by torchrun, or by a console script."""
    words = sys.orig_argv[1:5]  # the options of Python, and the module or script
    script = Path(words[0]).name if words else ""
    if script.removeprefix("finetune-") in MODULES and script.startswith("finetune-"):
        for name, module in MODULES.items():
            text = text.replace(f"python -m {module}", f"finetune-{name}")
    elif "TORCHELASTIC_RUN_ID" in os.environ and "-m" in words[:-1]:
        module = words[words.index("-m") + 1]
        text = text.replace(f"python -m {module} ", f"torchrun -m {module} ")
    return text


def _run(name: str) -> None:
    runpy.run_module(MODULES[name], run_name="__main__", alter_sys=True)


def train() -> None:
    """Run engine.train, in one process; torchrun -m engine.train runs several."""
    _run("train")


def evaluate() -> None:
    """Run engine.evaluate."""
    _run("evaluate")


def predict() -> None:
    """Run engine.predict."""
    _run("predict")


def study() -> None:
    """Run engine.study."""
    _run("study")


def export() -> None:
    """Run engine.export."""
    _run("export")


def report() -> None:
    """Run engine.report."""
    _run("report")


def new() -> None:
    """Run engine.new."""
    _run("new")


def completion() -> None:
    """Run engine.completion."""
    _run("completion")
