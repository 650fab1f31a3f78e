"""Evaluation on one CPU in this process, for tests of tasks."""

from __future__ import annotations

import torch

from engine.config import GenerateSettings
from engine.evaluation_batches import EvaluationContext
from engine.precision import Precision
from engine.tasks import TASKS
from support.runs import CPU

FP32 = Precision("fp32", torch.device("cpu"))


def evaluation_context(task: str, batch_tokens: int = 4096) -> EvaluationContext:
    """Return the context to evaluate a task in, on one CPU in fp32."""
    return EvaluationContext(TASKS[task], FP32, CPU, batch_tokens, GenerateSettings())
