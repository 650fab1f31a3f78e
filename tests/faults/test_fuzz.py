"""A sample of each fuzzer. `python -m tests.faults --count 10000 F14` runs them all at length."""

from __future__ import annotations

import ctypes
import importlib
import json
import random
from pathlib import Path

import pytest

from faults import mutation

FUZZERS = sorted(path.stem for path in Path(__file__).parent.glob("fuzz_*.py"))


@pytest.mark.parametrize("name", FUZZERS)
def test_a_mutated_file_is_read_or_a_sentence(name):
    found = importlib.import_module(f"faults.{name}").run(200, seed=3)
    assert found["failures"] == []
    assert found["survived"] == found["tries"] == 200


def never_end() -> None:
    while True:
        pass


def test_the_fuzzer_finds_faults(monkeypatch):
    """What a reader must not do is a failure: another exception, a hang, much memory, a long message."""
    from data import DataError

    if mutation.memory():  # Linux
        ctypes.CDLL(None).malloc_trim(0)  # a worker that has run other tests keeps what they freed, and would reuse it
        assert mutation.attempt(lambda: bytearray(b"x") * (300 << 20)).startswith("allocated ")
    monkeypatch.setattr(mutation, "SECONDS", 0.05)
    assert mutation.attempt(int, "x").startswith("ValueError: invalid literal")
    assert mutation.attempt(never_end) == "hung for 0.05 s"
    assert mutation.attempt(random.Random().seed, 1) == ""
    monkeypatch.setattr(DataError, "LONGEST", 10**6)
    assert mutation.attempt(json.loads, "[]") == ""

    def fail() -> None:
        raise DataError("x" * 30_000)

    assert mutation.attempt(fail) == "a message of 30,000 characters"


def test_mutations_change_every_kind_of_file():
    rng, content = random.Random(0), b'{"text": "a cat", "label": "x"}\n' * 3
    changed = [mutation.mutate(rng, content) for _ in range(200)]
    assert len(set(changed)) > 190
