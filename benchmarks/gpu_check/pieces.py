"""The losses of a run do not depend on the pieces of the engine that make it faster; called by part 2.

Each piece (benchmarks/switches.py) is left out of a tiny run without dropout, in bf16 on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

from benchmarks import switches
from benchmarks.gpu_check.check import Check, first_line, relative_difference, run_training
from engine import checkpoint

CHUNKED = ("large-chunks", "aligned-vocabulary")  # pieces of the loss of a language model
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of losses
STEPS = 4


def check_pieces(check: Check) -> None:
    """Write a row for each piece: how far the losses without it are from those with it."""
    precision = "bf16" if check.device.type == "cuda" else "fp32"
    expected: dict[str, list[float]] = {}
    for name in switches.NAMES:
        if not check.has_time_for(5, f"without {name}"):
            return
        workload = "gpt2-1024" if name in CHUNKED else "bert-base-ragged"
        try:
            if workload not in expected:
                expected[workload] = losses(check, workload, "", precision)
            error = relative_difference(losses(check, workload, name, precision), expected[workload])
            check.add(f"without {name}", precision, ok=error <= TOLERANCES[precision], loss_error=error)
        except RuntimeError as problem:
            check.add(f"without {name}", precision, ok=False, where=first_line(problem))


def losses(check: Check, workload: str, piece: str, precision: str) -> list[float]:
    """Return the losses of a tiny run, without a piece unless it is ""."""
    settings = {"train.max_steps": STEPS, "log.every_steps": 1, "train.precision": precision, "optim.lr": 1e-3}
    settings |= {"model.dropout.all": 0.0, "run.folder": str(check.scratch / f"{workload} {piece}".strip())}
    left_out = switches.without(piece) if piece else nullcontext()
    with left_out, patch.object(checkpoint, "save", lambda *args: 0.0):
        return run_training(check, check.recipe(workload, shrink=True, **settings))
