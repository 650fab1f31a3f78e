"""The parts of sharded tensors (DTensor) that this rank has; other tensors are their own only part.

A sharded tensor has the type DTensor, which is not imported here: a run that is not sharded never loads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is distributed over ranks."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank has, which shares its memory; perhaps of no rows."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return `local` of each tensor."""
    return [local(tensor) for tensor in tensors]


def sum_over_parts(value: Tensor, like: Tensor) -> Tensor:
    """Return the sum of a value over the ranks that share the tensor `like` among them; for a plain one the value.

    Each of them computed it from its own part. Under hsdp every machine has all parts, and sums its own.
    """
    if not is_sharded(like):
        return value
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    value = value.clone()
    dist.all_reduce(value, group=mesh.get_group(mesh.ndim - 1))
    return value


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters are gathered together (FSDPModule); none where nothing is sharded."""
    return [module for module in model.modules() if hasattr(module, "unshard")]
