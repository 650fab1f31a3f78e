"""The pieces of the engine that make a GPU faster, so that a benchmark can do without one of them.

A run without a piece computes the same loss, but for rounding and for the random numbers of dropout.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from engine.precision import Precision
from engine.prefetch import StepFetcher

CHUNKS = "models.ops.linear_cross_entropy"
PIECES: dict[str, tuple[str, str, Any]] = {  # name -> (module, what is replaced, by what)
    "flash": ("models.ops.attention", "_can_use_flash", lambda *_: False),  # texts of several lengths are then padded
    "joint-projections": ("models.ops.joint_linear", "_can_join", lambda *_: False),  # of queries, keys and values
    "skipped-tokens": ("models.task_model", "states_what_it_reads", lambda _: False),  # that the head does not read
    "large-chunks": (CHUNKS, "LARGEST_CHUNK_BYTES", 2**25),  # of a language model's logits; then those of a CPU
    "aligned-vocabulary": (CHUNKS, "VOCABULARY_MULTIPLE", 1),
}
OTHERS = ("launched-optimizer", "fetch-ahead")  # before the norm is read; the next step's data
NAMES = (*PIECES, *OTHERS)


def without(name: str) -> AbstractContextManager[object]:
    """Return a context in which models are built and trained without the piece `name`."""
    if name == "fetch-ahead":
        return patch.object(StepFetcher, "fetch", lambda self: None)
    if name == "launched-optimizer":
        return patch.object(Precision, "__init__", _init_that_reads_first)
    module, attribute, replacement = PIECES[name]
    return patch.object(importlib.import_module(module), attribute, replacement)


_init = Precision.__init__


def _init_that_reads_first(self: Precision, *args: Any) -> None:
    _init(self, *args)
    self.reads_wait = False  # so the norm is read before the clipping and the step
