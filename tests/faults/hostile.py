"""F14, F15: files that nobody should trust: pickles in the place of weights, and what the fuzzers of fuzz_*.py make."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.payloads import PAYLOADS, Call

import models
from faults.runs import FORK, Bench, Result
from models import ModelError
from models.checkpoints.convert import convert

SECONDS = 600.0


def pickles(count: int, seed: int, folder: Path) -> Result:
    """F15: each payload in the place of each file of a checkpoint; none may run. count: at most so many."""
    bench, result = Bench(folder), Result()
    writers: dict[str, Callable[[Path, Any], object]] = {
        "pytorch_model.bin": lambda path, bad: path.write_bytes(pickle.dumps(bad)),
        "model.safetensors": lambda path, bad: path.write_bytes(pickle.dumps(bad)),
        "model.pt": lambda path, bad: torch.save({"a": bad}, path),
        "weights.npy": lambda path, bad: np.save(path, np.array([bad], dtype=object), allow_pickle=True),
        "config.json": lambda path, bad: path.write_bytes(pickle.dumps(bad)),
    }
    cases = [(name, payload) for name in writers for payload in PAYLOADS]
    random.Random(seed).shuffle(cases)
    for i, (name, payload) in enumerate(cases[:count]):
        place = folder / f"pickle{i}"
        place.mkdir()
        if name != "config.json":
            (place / "config.json").write_bytes((bench.model / "config.json").read_bytes())
        writers[name](place / name, Call(*payload))
        result.add(in_fork(lambda place=place, name=name: load_both(place, name), place), name)
    return result


def load_both(place: Path, name: str) -> str:
    """Load a folder, and convert its pickle; return what was wrong."""
    os.chdir(place)
    warnings.simplefilter("ignore")  # torch's, of a pickle's protocol
    before = sorted(os.listdir())
    for load in (lambda: models.from_pretrained(place), lambda: convert(place / name)):
        try:
            load()
        except ModelError:
            continue
        return "was loaded"
    return "" if sorted(os.listdir()) == before else f"left {sorted(os.listdir())}"


def in_fork(work: Callable[[], str], folder: Path, seconds: float = 60.0) -> str:
    """Return what a function returns in a fork, or how the fork ended otherwise."""
    answer = folder / "answer"

    def child() -> None:
        answer.write_text(work(), encoding="utf-8")

    process = FORK.Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        return f"hung for {seconds:g} s"
    text = answer.read_text(encoding="utf-8") if answer.is_file() else "no answer"
    answer.unlink(missing_ok=True)
    return text if process.exitcode == 0 else f"ended with code {process.exitcode}"


def fuzz(count: int, seed: int, folder: Path) -> Result:
    """F14: the fuzzers of fuzz_*.py, each with `count` tries: run(count, seed) -> {"tries", "survived", "failures"}."""
    result = Result()
    for path in sorted(Path(__file__).parent.glob("fuzz_*.py")):
        found = importlib.import_module(f"faults.{path.stem}").run(count, seed)
        result.tries += found["tries"]
        result.survived += found["survived"]
        result.failures += [f"{path.stem}: {failure}" for failure in found.get("failures", [])]
        result.note(path.stem.removeprefix("fuzz_"), found["tries"])
    return result
