"""The C library's memory allocator, set up before anything is computed. It affects only speed and memory."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # values from glibc's malloc.h
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65_536  # of mallopt(3)


def keep_freed_memory(device: torch.device) -> bool:
    """Make glibc keep the memory of freed CPU tensors for later ones; return whether it does.

    By default glibc returns every large block to the kernel, which must zero its pages when the next step asks for the
    memory again. The gradient of an embedding matrix alone is tens of megabytes a step. The call has no effect
    - with another C library (macOS, musl);
    - where the user has set GLIBC_TUNABLES or a MALLOC_... variable;
    - on a GPU, where torch keeps freed memory itself.
    """
    return _set_malloc(device, mmap_max=0, trim_threshold=-1)


def return_freed_memory(device: torch.device) -> bool:
    """Undo keep_freed_memory for a sharded model; return whether glibc now returns large blocks.

    Layers are gathered and freed between states that stay. Kept blocks would lie in pieces between those: a rank of two
    had twice the memory.
    """
    return _set_malloc(device, mmap_max=DEFAULT_MMAP_MAX, trim_threshold=DEFAULT_TRIM_THRESHOLD)


def _set_malloc(device: torch.device, mmap_max: int, trim_threshold: int) -> bool:
    """Set the two parameters of glibc, unless the user has set any; return whether they were set."""
    is_tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or is_tuned or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, mmap_max) and mallopt(M_TRIM_THRESHOLD, trim_threshold))
