"""Runs of a tiny BERT on tiny data, in this process or by torchrun, and how two runs are compared."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models as native
from engine import config as configs
from engine.checkpoint import claim
from engine.cli import StopRequest
from engine.config import Config
from engine.distributed import Ranks
from engine.tasks import TASKS

WORDS = ["good", "great", "fine", "lovely", "bad", "awful", "poor", "dull", "film", "story", "actor", "plot", "scene"]
WORDS += ["music", "the", "a", "of", "and", "very", "so"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CPU = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def write_reviews(path: Path, count: int, seed: int = 0) -> Path:
    """`count` lines of jsonl, 3 to 30 words each; the label is whether good words outnumber bad ones."""
    rng = random.Random(seed)
    with path.open("w") as stream:
        for i in range(count):
            words = [rng.choice(WORDS) for _ in range(rng.randint(3, 30))]
            score = sum(w in WORDS[:4] for w in words) - sum(w in WORDS[4:8] for w in words)
            row = {"id": f"r{i}", "text": " ".join(words), "label": "positive" if score > 0 else "negative"}
            stream.write(json.dumps(row) + "\n")
    return path


def tiny_config(checkpoint_folder: Path, reviews: Path, folder: Path, overrides: dict[str, object]) -> Config:
    """20 steps of 16 of the 108 reviews that are left to train on, so that an epoch is 7 steps, the last of them short;
    dropout 0.1; an evaluation every 5 steps."""
    values: dict[str, object] = {
        "run.folder": str(folder),
        "run.device": "cpu",
        "model.name": str(checkpoint_folder),
        "model.pooling": "cls",
        "data.train": str(reviews),
        "data.max_length": 32,
        "train.global_batch_size": 16,
        "data.text_column": "text",
        "data.label_column": "label",
        "train.max_steps": 20,
        "optim.lr": 1e-3,
        "eval.every_steps": 5,
        "log.every_steps": 1,
    }
    config = configs.override(Config(), values | overrides)
    configs.check(config)
    return config


def run_training(config: Config, stop: StopRequest | None = None) -> dict[str, float] | None:
    """What `python -m engine.train` does, in this process."""
    from engine import train  # a test may; no module of the engine does

    with claim(config, CPU) as resumed:
        return train.train(config, CPU, QuietStop() if stop is None else stop, resumed)


class QuietStop(StopRequest):
    """pytest keeps its own handlers."""

    def listen(self, announce: bool) -> None:
        pass


class StopAfter(QuietStop):
    """A signal that arrives while the step after the first `steps` of this process is being fetched."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], metric: str = "accuracy") -> None:
    """One metric takes these values, one an evaluation."""
    script, task = iter(values), TASKS["text-classification"]
    patched = replace(
        task, compute_metrics=lambda statistics, labels: task.compute_metrics(statistics, labels) | {metric: next(script)}
    )
    monkeypatch.setitem(TASKS, "text-classification", patched)


MACHINE = {"samples_per_second", "tokens_per_second", "data_wait_seconds", "peak_memory_mb"}


def logged_rows(folder: Path | str) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MACHINE} for line in lines]


def assert_same_tensors(a: Path, b: Path):
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_same_run(folder, other):
    """Weights, best weights, optimizer, scaler, counters, best value, and every logged number."""
    folder, other = Path(folder), Path(other)
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"):
        assert_same_tensors(folder / name, other / name)
    for name in ("last", "best"):
        a, b = (json.loads((f / name / "state.json").read_text()) for f in (folder, other))
        assert a == b
    assert logged_rows(folder) == logged_rows(other)


def run_module(module: str, *arguments: object, ranks: int = 1, cwd: Path | None = None, **env: str):
    """`torchrun --nproc-per-node RANKS -m MODULE ...` (plain python for one rank), as a finished process."""
    launcher = [sys.executable, "-m", module]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["-m", module]
    root = Path(native.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def arguments_of(config: Config, recipe: Path) -> list[str]:
    """Write a config as a recipe file; the arguments that start it."""
    recipe.write_text(configs.to_toml(config))
    return [str(recipe)]
