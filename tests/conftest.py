"""Shared fixtures: a tiny BERT checkpoint, a tiny data set, and a recipe for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runs import SPECIAL, WORDS, tiny_config, write_reviews
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import models as native
from engine.config import Config

torch.set_num_threads(1)  # three times as fast on models this small


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a random BERT of 2 layers and width 32, with a word-level tokenizer of WORDS."""
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


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", 120)


@pytest.fixture
def tiny(checkpoint_folder: Path, reviews: Path, tmp_path: Path):
    """tiny(**{"section.key": value}) returns the Config of a small run in a new folder."""

    def make(**overrides: object) -> Config:
        return tiny_config(checkpoint_folder, reviews, tmp_path / "run", overrides)

    return make
