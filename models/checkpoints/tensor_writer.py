"""A safetensors file written tensor by tensor, for tensors that are not all in memory at once.

The library's save_file needs all of them. The file has the bytes that save_file would give it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from models.checkpoints.tensor_files import DTYPES

NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}
# save_file sorts by this order, reversed, so that each tensor begins at a multiple of its item size.
ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
ALIGNMENT = 8  # bytes, of the header


class Layout(NamedTuple):
    """The dtype and the shape of a tensor, which are known before its values are."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """A new safetensors file; a context manager that flushes it to the disk. Every tensor is written once.

    layouts: {name: its dtype and shape}. metadata: the texts of the header. Raises OSError where the disk is full.
    """

    def __init__(self, path: Path, layouts: Mapping[str, Layout], metadata: Mapping[str, str]):
        self.layouts = layouts
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in sorted(layouts, key=lambda name: (-ORDER.index(NAMES[layouts[name].dtype]), name)):
            layout = layouts[name]
            self._starts[name], end = end, end + layout.nbytes
            offsets = [self._starts[name], end]
            header[name] = {"dtype": NAMES[layout.dtype], "shape": [*layout.shape], "data_offsets": offsets}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._data_start = 8 + len(text)
        self._stream: BinaryIO = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the values of a tensor, which is on any device and has any strides."""
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if len(content) != self.layouts[name].nbytes:
            raise ValueError(f"{name} has {len(content):,} bytes, not {self.layouts[name].nbytes:,}")
        self._stream.seek(self._data_start + self._starts[name])
        self._stream.write(content.data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
