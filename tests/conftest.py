"""Small things that many tests share: a tiny BERT checkpoint, a tiny data set, and a recipe that joins them."""

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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import models as native
from engine import config as configs
from engine.checkpoint import claim
from engine.config import Config
from engine.distributed import Ranks, StopRequest
from engine.tasks import TASKS

WORDS = ["good", "great", "fine", "lovely", "bad", "awful", "poor", "dull", "film", "story", "actor", "plot", "scene"]
WORDS += ["music", "the", "a", "of", "and", "very", "so"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CPU = Ranks(rank=0, world_size=1, device=torch.device("cpu"))

torch.set_num_threads(1)  # on models this small, threads mostly wait for each other: a third of the time


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers, hidden size 32, in the hub's files, with a word-level tokenizer of WORDS."""
    folder = tmp_path_factory.mktemp("tiny-bert")
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
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    model = native.from_pretrained(folder, init="scratch", seed=1)
    native.save_pretrained(model, folder)
    return folder


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


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", 120)


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
        "train.batch_size": 16,
        "data.text": "text",
        "data.label": "label",
        "train.max_steps": 20,
        "optim.lr": 1e-3,
        "eval.every": 5,
        "log.every": 1,
    }
    config = configs.override(Config(), values | overrides)
    configs.check(config)
    return config


@pytest.fixture
def tiny(checkpoint_folder: Path, reviews: Path, tmp_path: Path):
    """tiny(**{"section.key": value}) -> Config of a small run in a fresh folder."""

    def make(**overrides: object) -> Config:
        return tiny_config(checkpoint_folder, reviews, tmp_path / "run", overrides)

    return make


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
        task, summarize=lambda statistics, labels: task.summarize(statistics, labels) | {metric: next(script)}
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
    root = str(Path(native.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def arguments_of(config: Config, recipe: Path) -> list[str]:
    """Write a config as a recipe file; the arguments that start it."""
    recipe.write_text(configs.to_toml(config))
    return [str(recipe)]
