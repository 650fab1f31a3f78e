"""The C library's memory allocator, set up before anything is computed. It affects only speed and memory."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # values from glibc's malloc.h
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# The first values of glibc (mallopt(3)), which raises the threshold to the largest block that was ever freed.
RETURN = {M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: 128 * 1024, M_TRIM_THRESHOLD: 128 * 1024}


def keep_freed_memory(device: torch.device) -> bool:
    """Make glibc keep the memory of freed CPU tensors for later ones; return whether it does.

    By default glibc returns every large block to the kernel, which must zero its pages when the next step asks for the
    memory again. The gradient of an embedding matrix alone is tens of megabytes a step. The call has no effect
    - with another C library (macOS, musl);
    - where the user has set GLIBC_TUNABLES or a MALLOC_... variable;
    - on a GPU, where torch keeps freed memory itself.
    """
    return _set_malloc(device, KEEP)


def return_freed_memory(device: torch.device) -> bool:
    """Undo keep_freed_memory for a sharded model; return whether glibc now returns large blocks.

    Layers are gathered and freed between states that stay. Kept blocks would lie in pieces between those: a rank of two
    had twice the memory.
    """
    return _set_malloc(device, RETURN)


def _set_malloc(device: torch.device, parameters: dict[int, int]) -> bool:
    """Set these parameters of glibc, unless the user has set any; return whether they were set."""
    is_tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or is_tuned or mallopt is None:
        return False
    return all(mallopt(name, value) for name, value in parameters.items())
