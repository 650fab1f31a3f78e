"""The C library's memory allocator, set up before anything is computed. It affects only the speed."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # values from glibc's malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Make glibc keep the memory of freed CPU tensors for later ones; return whether it does.

    By default glibc returns every large block to the kernel, which must zero its pages when the next step asks for the
    memory again. The gradient of an embedding matrix alone is tens of megabytes a step. The call has no effect
    - with another C library (macOS, musl);
    - where the user has set GLIBC_TUNABLES or a MALLOC_... variable;
    - on a GPU, where torch keeps freed memory itself.
    """
    is_tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or is_tuned or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
