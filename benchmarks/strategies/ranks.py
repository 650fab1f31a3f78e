"""One rank of our runs; torchrun starts it: every subject, accumulation and strategy in one process group.

    torchrun --nproc-per-node 2 -m benchmarks.strategies.ranks FOLDER STRATEGY ...

Rank 0 writes FOLDER/losses.STRATEGY.W.json: {subject: {accumulation: [loss of each step]}}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from benchmarks.strategies.models_and_data import GLOBAL_BATCH_SIZE, SUBJECTS
from engine import checkpoint, distributed, train
from engine import config as configs
from engine.cli import StopRequest, run_command
from engine.config import Config
from engine.distributed import Ranks

ACCUMULATIONS = (1, 4)


def losses_of(config: Config, ranks: Ranks) -> list[float]:
    """Train; return the loss of every step."""
    with (
        patch.object(checkpoint, "save", lambda *args: 0.0),
        redirect_stdout(StringIO()),
        checkpoint.claim(config, ranks) as resumed,
    ):
        train.train(config, ranks, StopRequest(), resumed)
    if not ranks.is_main:
        return []
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def main(argv: Sequence[str]) -> int:
    """Train every subject with the named strategies; "one" is a single process."""
    folder, strategies = Path(argv[0]), argv[1:]
    ranks = distributed.setup("cpu")
    for strategy in strategies:
        found: dict[str, dict[int, list[float]]] = {}
        for name in SUBJECTS:
            recipe = configs.read_recipe(str(folder / name / "recipe.toml"))
            for accumulation in ACCUMULATIONS:
                values = {
                    "run.folder": str(folder / name / f"run.{strategy}.{ranks.world_size}.{accumulation}"),
                    "train.micro_batch_size": GLOBAL_BATCH_SIZE // (ranks.world_size * accumulation),
                    "distributed.strategy": "ddp" if strategy == "one" else strategy,
                }
                losses = losses_of(configs.override(recipe, values), ranks)
                found.setdefault(name, {})[accumulation] = losses
        if ranks.is_main:
            (folder / f"losses.{strategy}.{ranks.world_size}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.argv[0] = "benchmarks.strategies.ranks"
    run_command(main)
