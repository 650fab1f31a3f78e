"""Shared fixtures: a tiny BERT checkpoint, a tiny data set, and a recipe for both."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.runs import tiny_config, write_reviews, write_tiny_bert

from engine.config import Config

torch.set_num_threads(1)  # three times as fast on models this small

if threading.current_thread() is threading.main_thread():
    # A background shell ignores SIGINT, nohup SIGHUP, and processes inherit it. Tests of signals need the defaults.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_xdist_auto_num_workers() -> int:
    """Return a worker more than there are cores, since tests of several ranks and of commands wait for processes."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let what torchrun, W&B and compilers leave in the temporary folder go with the folders of pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t", numbered=False)))  # short: the names of sockets are
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", 120)


@pytest.fixture
def tiny(checkpoint_folder: Path, reviews: Path, tmp_path: Path):
    """tiny(**{"section.key": value}) returns the Config of a small run in a new folder."""

    def make(**overrides: object) -> Config:
        return tiny_config(checkpoint_folder, reviews, tmp_path / "run", overrides)

    return make
