"""Mutated recipes and command lines of engine.train."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from engine import help_pages
from engine.config import Config, all_settings, override, parse, shipped_recipes, to_toml
from engine.config.recipe import RECIPES
from faults.mutation import attempt, count, mutate

VALUES = [
    "1",
    "-1",
    "0",
    "1e400",
    "nan",
    "true",
    "auto",
    "none",
    "",
    "[]",
    '["a"]',
    "[",
    "a,b",
    "9" * 99,
    "\0",
    "\udcff",
]
VALUES += [
    "x" * 9_999,
    "'",
    '"',
    "../x",
    "2026-01-01",
    "{}",
    "{a = 1}",
    "0x7f",
    "1_0",
    "inf",
    "--",
    "-",
    "=",
    "é",
    "1.5",
]
OTHERS = [
    "--resume",
    "--dry-run",
    "--help",
    "-h",
    "movie_reviews",
    "",
    "-",
    "--",
    "--=1",
    "--optim",
    "--optim=1",
    "a.toml",
]


def command_line(rng: random.Random) -> list[str]:
    """Return arguments: settings in both forms, with right and wrong names, and others."""
    keys = [
        *all_settings(Config()),
        "optim.lrr",
        "lr",
        "train",
        "a.b.c",
        "learning_rate",
        "train.batch_size",
        "",
        "é.\0",
    ]
    found: list[str] = []
    for _ in range(rng.randint(0, 6)):
        key, value = rng.choice(keys), rng.choice(VALUES)
        found += rng.choice([[f"--{key}={value}"], [f"--{key}", value], [rng.choice(OTHERS)], [f"--{key}"]])
    return found


def read(arguments: list[str]) -> None:
    try:
        with redirect_stdout(StringIO()):
            help_pages.answer(arguments, "usage")
            config = parse(arguments, "usage")
    except SystemExit as error:  # of --help
        if error.code:
            raise
        return
    to_toml(config)


def run(count_: int, seed: int) -> dict[str, Any]:
    """Change and read `count_` recipes and command lines."""
    return count(outcomes(count_, seed))


def outcomes(count_: int, seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    recipes = [(RECIPES / f"{name}.toml").read_bytes() for name in shipped_recipes()]
    recipes += [to_toml(override(Config(), {"data.train": "a", "model.name": "b"})).encode()]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        path = Path(name) / "recipe.toml"
        for i in range(count_):
            arguments = command_line(rng)
            if rng.random() < 0.6:
                path.write_bytes(mutate(rng, rng.choice(recipes)))
                arguments = [str(path), *(arguments if rng.random() < 0.3 else [])]
            yield f"try {i}", attempt(read, arguments)
