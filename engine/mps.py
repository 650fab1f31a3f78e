"""Apple's GPUs (run.device = "mps"), as far as torch supports them: one process, fp32 or bf16, no generation.

MPS has no fp64, in which metrics are summed. So in an evaluation the batches and the results are on the host, and the
model copies what it reads. An operation that MPS lacks runs on the CPU with PYTORCH_ENABLE_MPS_FALLBACK=1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config import ConfigError
from models import Output

DEVICE = "mps"
INSTEAD = "--run.device cpu computes everything"


def check_available(world_size: int) -> None:
    """Raise ConfigError where there is no MPS device, and for several processes, which cannot exchange gradients."""
    if not torch.backends.mps.is_available():
        why = "this torch is built without it" if not torch.backends.mps.is_built() else "there is none here"
        raise ConfigError(f"run.device = mps: {why}; it needs an Apple GPU and macOS 14; {INSTEAD}")
    if world_size > 1:
        raise ConfigError(f"run.device = mps takes one process, not {world_size}: start it without torchrun")


def check_supported(device: str, precision: str, generates: bool, fgm_epsilon: float) -> None:
    """Raise ConfigError for a part of a recipe that an MPS device cannot compute."""
    if device != DEVICE:
        return
    problem = ""
    if precision == "fp16":
        problem = "train.precision = fp16 scales the loss by kernels that MPS lacks: choose bf16 (macOS 14) or fp32"
    elif generates:
        problem = f"this task writes texts, whose search computes in fp64, which MPS lacks: {INSTEAD}"
    elif fgm_epsilon:
        problem = f"regularize.fgm_epsilon sums in fp64, which MPS lacks: {INSTEAD}"
    if problem:
        raise ConfigError(f"run.device = mps: {problem}")


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model to the device of a run. On MPS its evaluations then read from the host and answer there."""
    model.to(device)
    if device.type == DEVICE:
        keep_results_on_host(model, device)


def keep_results_on_host(model: nn.Module, device: torch.device) -> None:
    """Let the model, in evaluation mode, copy its inputs to `device` and its results to the host."""

    def read(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs if module.training else tuple(batch.to(device) for batch in inputs)

    def answer(module: nn.Module, inputs: tuple[Any, ...], output: Output) -> Output:
        return output if module.training else Output(*(tensor.cpu() for tensor in output))

    model.register_forward_pre_hook(read)
    model.register_forward_hook(answer)
