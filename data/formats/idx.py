"""MNIST's file format, IDX (LeCun et al. 1998): a header of sizes, then bytes; plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from data.errors import DataError

IMAGES, LABELS = "images-idx3", "labels-idx1"
UINT8 = 8  # the code of the only type that image sets use


def is_image_file(path: Path) -> bool:
    """Return whether a file has the usual name, like train-images-idx3-ubyte or t10k-images-idx3-ubyte.gz."""
    return IMAGES in path.name


def labels_path(path: Path) -> Path:
    """Return the file of the labels: train-images-idx3-ubyte.gz -> train-labels-idx1-ubyte.gz."""
    return path.with_name(path.name.replace(IMAGES, LABELS))


def read(path: Path, dimensions: int) -> np.ndarray:
    """Return the array of bytes in a file. DataError where it is missing, broken or has other dimensions.

    The header: two zeros, the code of the type, the number of dimensions, and each of them as a big-endian uint32.
    """
    try:
        packed = path.suffix == ".gz"
        with gzip.open(path) if packed else path.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, UINT8, dimensions]):
                raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimensions, by its first bytes")
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
            size = math.prod(shape)
            # gzip compresses at most 1,032 times, so a header that claims more is wrong.
            if size > path.stat().st_size * (1032 if packed else 1):
                raise DataError(f"{path}: incomplete: {size:,} bytes should follow the header")
            content = stream.read(size)
            if len(content) != size or stream.read(1):
                found = "more" if len(content) == size else f"{len(content):,}"
                raise DataError(f"{path}: {size:,} bytes should follow the header, there are {found}")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(shape)
