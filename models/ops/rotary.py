"""Rotary positions (Su et al. 2021, "RoFormer"): queries and keys are rotated by angles that grow with the position.

A product of two rotated vectors depends on the distance of their positions only. The pairs that are rotated are the
first and the second half of a head's vector. Shapes: models/ops/packing.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from models.ops.layers import upcast
from models.ops.packing import to_device

Rotation = tuple[Tensor, Tensor]  # the cosines and the sines of the angles of each token, (T, 1, K / 2)


def rotation(positions: Tensor, theta: float, width: int, dtype: torch.dtype) -> Rotation:
    """Return the rotation of each token. positions: (T,) int64. width: K.

    The angle of pair i is position / theta^(2 i / K). Angles are computed in fp32, as in the published code.
    """
    angles = (positions[:, None].float() * _frequencies(theta, width, positions.device)).unsqueeze(1)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """(T, N, K) -> (T, N, K): N vectors of each token, rotated in fp32 or wider."""
    cos, sin = rotation
    first, second = upcast(x).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@functools.lru_cache(maxsize=16)
def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    """Return (K / 2,) fp32: theta^(-2 i / K). The CPU computes it, as powers may differ by device."""
    with torch.inference_mode(False), torch.no_grad():  # the entry is used in training too
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        return to_device(1.0 / theta**exponents, device)
