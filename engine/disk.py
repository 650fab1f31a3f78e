"""The bytes that the checkpoints of a run take on the disk, and how many are free, reported before training."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config import RunSettings
from engine.optimizer_state import state_bytes
from models import TaskModel
from models.multi_task import each_task


def describe_disk(
    run: RunSettings,
    keep: Sequence[str],
    weights: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    average: bool,
    model: TaskModel,
) -> list[str]:
    """Return the sizes of the checkpoints in a dry run, and in any run a warning if they do not fit on the disk.

    keep: checkpoint.keep. weights: those of the objective. average: whether an average of the weights is kept too.
    model: a model of several tasks has a folder of each beside best/.
    """
    sizes = estimate_sizes(weights, optimizer, average)
    of_each = {f"best-{name}": sum(p.nbytes for p in own.parameters()) for name, own in each_task(model).items()}
    sizes, keep = sizes | of_each, [*keep, *of_each]
    folder = Path(run.folder)
    # A new checkpoint is complete before an old one is removed.
    peak = sum(sizes[name] for name in keep) + max(sizes[name] for name in keep)
    free = free_bytes(folder)
    lines = []
    if run.dry_run:
        listed = ", ".join(f"{name}/ {format_bytes(sizes[name])}" for name in keep)
        lines.append(
            f"checkpoints: {listed}; about {format_bytes(peak)} while one is written, {format_bytes(free)} are free"
        )
    if peak - _used_bytes(folder, keep) > free:
        lines.append(
            f"warning: the checkpoints take about {format_bytes(peak)} while one is written, and {format_bytes(free)} "
            f"are free for {folder}: free some, or keep fewer (checkpoint.keep)"
        )
    return lines


def estimate_sizes(weights: Iterable[Tensor], optimizer: torch.optim.Optimizer, average: bool) -> dict[str, int]:
    """Return about how many bytes best/, last/ and previous/ take; beside the tensors there are only small files."""
    best = sum(tensor.nbytes for tensor in weights)
    last = best + sum(state_bytes(optimizer, average, part=lambda p: p))
    return {"best": best, "last": last, "previous": last}


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where `path` is or would be."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _used_bytes(folder: Path, names: Iterable[str]) -> int:
    """Return the bytes of the checkpoints of these names that are there already."""
    files = (path for name in names for path in (folder / name).glob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def format_bytes(count: float) -> str:
    """Return a number of bytes with its unit, in powers of 1000, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
