"""Runs of a tiny BERT on tiny data, in this process or under torchrun, and the comparison of two runs."""

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
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as vocabularies

import models as native
from engine import config as configs
from engine.checkpoint import claim
from engine.cli import StopRequest
from engine.config import Config, LogSettings
from engine.distributed import Ranks
from engine.log import RunLog
from engine.screen import Screen
from engine.tasks import TASKS
from support import warm

WORDS = ["good", "great", "fine", "lovely", "bad", "awful", "poor", "dull", "film", "story", "actor", "plot", "scene"]
WORDS += ["music", "the", "a", "of", "and", "very", "so"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CPU = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def write_reviews(path: Path, count: int, seed: int = 0) -> Path:
    """Write `count` reviews of 3 to 30 words as jsonl; a review is positive if it has more good words than bad ones."""
    rng = random.Random(seed)
    with path.open("w") as stream:
        for i in range(count):
            words = [rng.choice(WORDS) for _ in range(rng.randint(3, 30))]
            score = sum(w in WORDS[:4] for w in words) - sum(w in WORDS[4:8] for w in words)
            row = {"id": f"r{i}", "text": " ".join(words), "label": "positive" if score > 0 else "negative"}
            stream.write(json.dumps(row) + "\n")
    return path


def write_tiny_bert(folder: Path) -> Path:
    """Write a checkpoint: a random BERT of 2 layers and width 32, with a word-level tokenizer of WORDS."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "bert",
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(vocabularies.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    model = native.from_pretrained(folder, init="scratch", seed=1)
    native.save_pretrained(model, folder)
    return folder


def tiny_config(checkpoint_folder: Path, reviews: Path, folder: Path, overrides: dict[str, object]) -> Config:
    """Return the config of a run of 20 steps of 16 reviews, with dropout 0.1 and an evaluation every 5 steps.

    108 of 120 reviews are training examples, so an epoch has 7 steps, the last of them a short one.
    """
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
        "checkpoint.every_minutes": 0.0,  # saved at each evaluation, however long a save takes
    }
    config = configs.override(Config(), values | overrides)
    configs.check(config)
    return config


def run_training(config: Config, stop: StopRequest | None = None) -> dict[str, float] | None:
    """Do what `python -m engine.train` does, in this process."""
    from engine import train  # tests may import the loop; modules of the engine may not

    with claim(config, CPU) as resumed:
        return train.train(config, CPU, QuietStop() if stop is None else stop, resumed)


def open_log(folder: Path, start: int = 0, total: int = 9) -> RunLog:
    """Open the log of a run that resumes after step `start`."""
    settings = LogSettings()
    return RunLog(folder, CPU, settings, Screen(settings), start=start, total=total)


class QuietStop(StopRequest):
    """A stop request without signal handlers, since pytest has its own."""

    def listen(self, announce: bool) -> None:
        pass


class StopAfter(QuietStop):
    """A signal that arrives while the loop fetches the step after the first `steps` steps of this process."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def script_metric(
    monkeypatch: pytest.MonkeyPatch, values: list[float], metric: str = "accuracy", loss: float | None = None
) -> None:
    """Replace a metric by these values, one per evaluation; and the loss of each evaluation by `loss`, if given.

    Where two values are equal, the loss decides which evaluation is best, and the loss depends on the torch version.
    """
    script, task = iter(values), TASKS["text-classification"]
    losses = {} if loss is None else {"loss": loss}
    patched = replace(
        task,
        compute_metrics=lambda *inputs: task.compute_metrics(*inputs) | losses | {metric: next(script)},
    )
    monkeypatch.setitem(TASKS, "text-classification", patched)


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception | None = None, training: bool = True
) -> list[int]:
    """Raise out of memory for micro-batches of more than so many tokens; return the list of sizes that fitted.

    training: whether in training, or in evaluation.
    """
    forward, fitted = native.TaskModel.forward, list[int]()

    def limited(self, batch):
        size = sum(batch.lengths)
        if self.training == training and size > tokens:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        fitted.extend([size] * (self.training == training and size > 0))
        return forward(self, batch)

    monkeypatch.setattr(native.TaskModel, "forward", limited)
    return fitted


MACHINE = {"samples_per_second", "tokens_per_second", "data_wait_seconds", "peak_memory_mb"}


def logged_rows(folder: Path | str) -> list[dict]:
    """Return the rows of metrics.jsonl without the values that depend on the machine."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MACHINE} for line in lines]


def assert_same_tensors(a: Path, b: Path):
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_same_run(folder, other):
    """Assert equal weights, best weights, optimizer, scaler, counters, best value, and logged numbers."""
    folder, other = Path(folder), Path(other)
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"):
        assert_same_tensors(folder / name, other / name)
    for name in ("last", "best"):
        a, b = (json.loads((f / name / "state.json").read_text()) for f in (folder, other))
        assert a == b
    assert logged_rows(folder) == logged_rows(other)


def run_module(
    module: str,
    *arguments: object,
    ranks: int = 1,
    restarts: int = 0,
    cwd: Path | None = None,
    timeout: int = 300,
    is_new: bool = False,
    **env: str,
):
    """Run `torchrun --nproc-per-node RANKS -m MODULE ...`, or python for one rank; return the finished process.

    is_new: whether each process is a new Python, with hashes of its own, or a fork of one with torch (support/warm.py).
    """
    python = sys.executable if is_new else str(warm.folder() / "python")
    launcher = [python, "-m", module]
    if ranks > 1:
        launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["--max-restarts", str(restarts), "-m", module]
    root = Path(native.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout
    )


def arguments_of(config: Config, recipe: Path) -> list[str]:
    """Write a config to a recipe file and return the arguments that start it."""
    recipe.write_text(configs.to_toml(config))
    return [str(recipe)]
