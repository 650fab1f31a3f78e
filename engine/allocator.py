"""The C library's memory allocator, set up before anything is computed. Only the speed depends on it."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Make glibc keep the memory of freed CPU tensors for the next ones; return whether it does.

    By default glibc returns every large block to the kernel, which must zero its pages when the next step asks for the
    memory again: the gradient of an embedding matrix alone is tens of megabytes a step. Nothing is done
    - with another C library (macOS, musl);
    - where the user has tuned it by MALLOC_*_ or GLIBC_TUNABLES;
    - on a GPU, where torch keeps memory itself.
    """
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or tuned or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
