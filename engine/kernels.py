"""Which kernels a GPU may use: TF32 or not, deterministic ones or the fastest. A CPU has no choice."""

from __future__ import annotations

import os

import torch

from engine.config import RunSettings, TrainSettings

# Parts of torch's messages where use_deterministic_algorithms refuses an operation or a matrix product.
NOT_DETERMINISTIC = ("does not have a deterministic implementation", "CUBLAS_WORKSPACE_CONFIG")
AMPERE = (8, 0)  # the first compute capability with bf16 and TF32


def choose_kernels(device: torch.device, tf32: bool, deterministic: bool) -> None:
    """Apply train.tf32 and run.deterministic to this process. Call it before the first product on a GPU.

    torch computes convolutions in TF32 unless it is told not to; here fp32 means fp32. With deterministic kernels torch
    raises RuntimeError for an operation that has none. Attention's backward in flash kernels obeys the switch too.
    """
    if device.type != "cuda":
        return
    # Set for every run, since torch reads it only once, at the first product of the process: a later run with
    # run.deterministic would be refused. On Hopper it is the default.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def explain_missing_kernel(error: BaseException) -> str:
    """Return a sentence on an error of torch that an operation has no deterministic kernel; "" for other errors."""
    said = str(error)
    if not isinstance(error, RuntimeError) or not any(part in said for part in NOT_DETERMINISTIC):
        return ""
    return (
        "run.deterministic = true: an operation of this run has no deterministic kernel on a GPU; leave the setting "
        f"out, train on a CPU, or replace the operation where it is your own: {said.splitlines()[0]}"
    )


def describe_kernels(device: torch.device, train: TrainSettings, run: RunSettings) -> list[str]:
    """Return a sentence for each setting without effect on this device, and the advice of bf16 where it is faster."""
    is_gpu = device.type == "cuda"
    has_tensor_cores = is_gpu and torch.cuda.get_device_capability(device) >= AMPERE
    lines = []
    if train.tf32 and not has_tensor_cores:
        lines.append(f"train.tf32 has no effect on {'this GPU' if is_gpu else 'a CPU'}, which has no TF32")
    if run.deterministic and not is_gpu:
        lines.append("run.deterministic has no effect on a CPU, where equal runs are bit-equal anyway")
    if train.precision == "fp32" and has_tensor_cores:
        lines.append(
            "train.precision = fp32: --train.precision bf16 is several times as fast in the products of this GPU; "
            "weights, gradients and optimizer stay fp32"
        )
    return lines
