"""What this process asks of the machine before it computes: speed alone depends on it."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library keep the memory that tensors on a CPU give back, for the next ones; says whether it does.

    By default glibc hands every large block back to the kernel, which must zero its pages when the next step asks for
    it again: the gradient of an embedding matrix alone is tens of megabytes a step. Nothing is done where the C library
    is another one (macOS, musl), where the user has tuned it by MALLOC_*_ or GLIBC_TUNABLES, and on a GPU, where torch
    keeps memory itself.
    """
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or tuned or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
