"""Image files -> Pillow images of 8 bits per channel, upright; a file that cannot be used is refused with a reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError

# File formats, by Pillow's names. The content decides: a PNG named .jpg is read. Other formats run programs (EPS) or
# rarely have photos.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; Pillow too calls more a decompression bomb
MAX_RATIO = 100  # a shorter side of 1 pixel, resized to 256, would make the other one 256 times as long
THREADS = 4  # that decode at a time, when all images are checked


def decode(path: Path) -> Any:
    """Return a Pillow image of 8 bits a channel, upright; DataError with the reason alone.

    The orientation that the camera noted (EXIF) is applied. Of 16 bits the upper 8 are kept, CMYK becomes RGB, and
    transparency is dropped. Animations are refused, since a label belongs to one picture.
    """
    from PIL import Image, UnidentifiedImageError

    if path.stat().st_size == 0:
        raise DataError("an empty file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_8_bits(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"not an image of a kind that is read: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"a decompression bomb; at most {MAX_PIXELS:,} pixels are decoded") from None
    except Exception as error:  # decoders raise errors of every kind for broken files
        raise DataError(f"cannot be decoded: {error}") from None


def to_8_bits(image: Any) -> Any:
    """Return a Pillow image, perhaps not decoded yet, as `decode` does; DataError with the reason alone."""
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are decoded")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{width:,} x {height:,} pixels: one side is over {MAX_RATIO} times the other")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo with its preview
        raise DataError("several pictures in one file; a label belongs to one")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise DataError(f"levels of 32 bits (mode {upright.mode}), of which nothing says which is white")
    return upright.convert("RGBA") if "transparency" in upright.info else upright


def from_memory(value: Any) -> Any:
    """Return the Pillow image of a value in memory: one already, or an array of uint8. DataError with the reason."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (1, 3, 4)):
            raise DataError(
                f"an array of {value.dtype}, shape {value.shape}, should be uint8, (height, width) or "
                "(height, width, channels) with 1, 3 or 4 channels"
            )
        if not value.size:
            raise DataError(f"an empty image, shape {value.shape}")
        value = Image.fromarray(value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value)
    if not isinstance(value, Image.Image):
        raise DataError(f"should be a Pillow image, an array of uint8 or a path, this is {value!r:.80}")
    try:
        return to_8_bits(value)
    except DataError:
        raise
    except Exception as error:  # an image opened from a broken file is decoded only here
        raise DataError(f"cannot be decoded: {error}") from None


def checksum(image: Any) -> str:
    """Return a checksum of the pixels of a Pillow image."""
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()


def check_all(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (checksum, reason why it is bad, or "") of each file; only a few are in memory at a time."""

    def check(path: Path) -> tuple[str, str]:
        try:
            if path.exists() and not path.is_file():  # a pipe would wait for a writer
                return "", "not a regular file"
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            decode(path)
        except DataError as error:
            return "", str(error)
        except OSError as error:
            return "", f"cannot be read: {error.strerror}"
        return digest, ""

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(check, paths)
