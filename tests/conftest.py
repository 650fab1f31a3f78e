"""Small things that many tests share: a tiny BERT checkpoint, a tiny data set, and a recipe that joins them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import models as native
from engine import config as configs
from engine.checkpoint import claim
from engine.config import Config
from engine.distributed import Ranks, StopRequest

WORDS = ["good", "great", "fine", "lovely", "bad", "awful", "poor", "dull", "film", "story", "actor", "plot", "scene"]
WORDS += ["music", "the", "a", "of", "and", "very", "so"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CPU = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


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
    save_file(
        native.weights.export(model, native.bert.WEIGHTS, with_prefix=True),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
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


@pytest.fixture
def tiny(checkpoint_folder: Path, reviews: Path, tmp_path: Path):
    """tiny(**{"section.key": value}) -> Config of a small run in a fresh folder."""

    def make(**overrides: object) -> Config:
        values: dict[str, object] = {
            "run.folder": str(tmp_path / "run"),
            "run.device": "cpu",
            "model.name": str(checkpoint_folder),
            "model.pooling": "cls",
            "data.train": str(reviews),
            "data.max_length": 32,
            "train.batch_size": 16,
            "train.max_steps": 20,
            "optim.lr": 1e-3,
            "eval.every": 5,
            "log.every": 1,
        }
        config = configs.override(Config(), values | overrides)
        configs.check(config)
        return config

    return make


def run_training(config: Config, stop: StopRequest | None = None) -> dict[str, float] | None:
    """What `python -m engine.train` does, in this process."""
    from engine import train  # a test may; no module of the engine does

    with claim(config.run, CPU) as resumed:
        return train.train(config, CPU, stop or StopRequest(), resumed)


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
