"""Image files -> Pillow images of 8 bits per channel, upright, on white; or the reason why a file cannot be used."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.errors import DataError
from data.formats.image_kinds import READ, describe_unread
from data.formats.tar_index import TarMember

MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; Pillow too calls more a decompression bomb
MAX_RATIO = 100  # a shorter side of 1 pixel, resized to 256, would make the other one 256 times as long
THREADS = 4  # that decode at a time, when all images are checked

# What decoding found in an image, and what is said about the images in which it did.
EXIF, TRANSPARENT, BLANK, NARROW = "exif", "transparent", "blank", "narrow"
FINDINGS = {
    EXIF: "an EXIF block that cannot be read: not rotated",
    TRANSPARENT: "transparency: put on white",
    BLANK: "nothing but transparent or white pixels, so nothing is visible on white",
    NARROW: "16 bits, of which less than 1/16 of the range is used: 8 bits leave at most 16 levels of them",
}
ORIENTATION = 0x0112  # EXIF's tag. Its values, and how Pillow turns the stored image upright:
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags
GREY_KEY_SCALES = {"L;2": 85, "L;4": 17}  # PNG: grey levels of 2 and 4 bits become 8, a transparent level does not

_opening = threading.Lock()


class Checked(NamedTuple):
    """An image that was decoded once, or the reason why it cannot be."""

    image: Any  # what an example keeps: the path, the bytes, or a Pillow image
    digest: str = ""  # a checksum of the file, or of the pixels of an image in memory
    reason: str = ""
    findings: tuple[str, ...] = ()  # keys of FINDINGS


def decode(source: Path | TarMember | bytes, max_pixels: int = MAX_PIXELS) -> Any:
    """Return a Pillow image of 8 bits a channel, of a file or its content; DataError with the reason alone.

    The orientation that the camera noted (EXIF) is applied. Of 16 bits the upper 8 are kept, CMYK becomes RGB, and
    transparent pixels are put on white. Animations are refused, since a label belongs to one picture.
    """
    return decode_and_inspect(source, max_pixels)[0]


def decode_and_inspect(source: Path | TarMember | bytes, max_pixels: int) -> tuple[Any, tuple[str, ...]]:
    """Return the image as `decode` does, and the keys of FINDINGS that are true of it."""
    from PIL import UnidentifiedImageError

    _silence_pillow()
    if not _size_of(source):
        raise DataError("an empty file")
    try:
        with _opened(source) as image:
            return to_8_bits(image, max_pixels)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(describe_unread(source)) from None
    except Exception as error:  # decoders raise errors of every kind for broken files
        raise DataError(f"cannot be decoded: {error}") from None


def _size_of(source: Path | TarMember | bytes) -> int:
    if isinstance(source, TarMember):
        return source.size
    return len(source) if isinstance(source, bytes) else source.stat().st_size


@contextmanager
def _opened(source: Path | TarMember | bytes) -> Iterator[Any]:
    """Open an image of which little is read yet; a member of an archive is read as far as it is needed."""
    with nullcontext(source) if isinstance(source, Path | bytes) else source.open() as stream, _open(stream) as image:
        yield image


def _open(source: Path | BinaryIO | bytes) -> Any:
    """Open an image without Pillow's own limit of pixels, a global that would forbid what max_pixels allows."""
    from PIL import Image

    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=READ)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@functools.cache
def _silence_pillow() -> None:
    """Ignore the warnings about EXIF blocks, which are counted instead, and those about many pixels."""
    from PIL.Image import DecompressionBombWarning

    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
    warnings.filterwarnings("ignore", category=DecompressionBombWarning)


def to_8_bits(image: Any, max_pixels: int = MAX_PIXELS) -> tuple[Any, tuple[str, ...]]:
    """Return a Pillow image, perhaps not decoded yet, as `decode_and_inspect` does; DataError with the reason alone."""
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"{width:,} x {height:,} pixels; image_classification.max_pixels allows at most {max_pixels:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{width:,} x {height:,} pixels: one side is over {MAX_RATIO} times the other")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo with its preview
        raise DataError("several pictures in one file; a label belongs to one")
    stored_as = _storage(image)
    image.load()
    findings = []
    orientation, is_readable = _orientation(image)
    if not is_readable:
        findings.append(EXIF)
    result = _with_8_bits(image, stored_as)
    if orientation in TURNS:
        from PIL import Image

        result = result.transpose(Image.Transpose[TURNS[orientation]])
    if result.has_transparency_data:
        result, is_transparent = _on_white(result)
        findings += [TRANSPARENT] if is_transparent else []
        findings += [BLANK] if is_transparent and _range(result)[0] == 255 else []
    darkest, lightest = _range(result) if ";16" in stored_as else (0, 255)
    if lightest - darkest < 16:
        findings.append(NARROW)
    return result, tuple(findings)


def _storage(image: Any) -> str:
    """Return how the pixels are stored, by Pillow's name, as "L;4" or "RGB;16B"; it must be asked before they are read.

    Pillow keeps 8 of the 16 bits of a colour by itself, and reads a PGM of 16 bits as one of 32.
    """
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):
        return "I;16"
    tiles = getattr(image, "tile", ()) if image.format in ("PNG", "TIFF") else ()
    arguments = [tile[3] for tile in tiles][:1]
    return next((str(a if isinstance(a, str) else a[0]) for a in arguments if a), "")


def _orientation(image: Any) -> tuple[int, bool]:
    """Return EXIF's orientation of a decoded image, 1 for none, and whether its EXIF block can be read."""
    try:
        tags = image.getexif()
        return tags.get(ORIENTATION, 1), bool(tags) or not image.info.get("exif")
    except Exception:  # as many kinds of errors as of broken blocks; the pixels are whole
        return 1, False


def _with_8_bits(image: Any, stored_as: str) -> Any:
    """Return a decoded image with 8 bits a channel, in a mode that Pillow converts to RGB."""
    from PIL import Image

    key = image.info.get("transparency")  # a colour
    if stored_as == "I;16":
        tags = getattr(image, "tag_v2", {})
        levels = np.asarray(image)
        grey = (levels >> (int(np.max(tags.get(BITS_PER_SAMPLE, 16))) - 8)).clip(0, 255).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8 bits by itself, 16 not
            grey = 255 - grey
        if not isinstance(key, int) or not (levels == key).any():
            return Image.fromarray(grey)
        return Image.fromarray(np.stack([grey, np.where(levels == key, 0, 255).astype(np.uint8)], 2), "LA")
    if image.mode in ("I", "F"):
        raise DataError(f"levels of 32 bits or with a sign (mode {image.mode}): nothing says which is white")
    if image.mode == "LAB":
        from PIL import ImageCms

        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if stored_as.startswith("RGB;16") and isinstance(key, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in key)
    elif stored_as in GREY_KEY_SCALES and isinstance(key, int):
        image.info["transparency"] = key * GREY_KEY_SCALES[stored_as]
    return image


def _on_white(image: Any) -> tuple[Any, bool]:
    """Return an image with transparent pixels on white, as RGB, and whether there are any."""
    from PIL import Image

    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][0] == 255:  # opaque
        return rgba if "transparency" in image.info else image, False
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), True


def _range(image: Any) -> tuple[int, int]:
    """Return the lowest and the highest level of all colours."""
    extrema = image.getextrema()
    pairs = extrema[:3] if isinstance(extrema[0], tuple) else (extrema,)
    return min(low for low, _ in pairs), max(high for _, high in pairs)


def from_memory(value: Any, max_pixels: int = MAX_PIXELS) -> tuple[Any, tuple[str, ...]]:
    """Return the Pillow image of a value in memory, one already or an array of uint8, and its findings.

    Raises DataError with the reason.
    """
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
        raise DataError(f"should be a Pillow image, an array of uint8 or a path, not {value!r:.80}")
    try:
        return to_8_bits(value, max_pixels)
    except DataError:
        raise
    except Exception as error:  # an image opened from a broken file is decoded only here
        raise DataError(f"cannot be decoded: {error}") from None


def check_image(value: Any, max_pixels: int = MAX_PIXELS) -> Checked:
    """Decode an image once: a path, a member of an archive, the bytes of a file, or an image in memory."""
    try:
        if isinstance(value, Path | TarMember):
            if isinstance(value, Path) and value.exists() and not value.is_file():  # a pipe would wait for a writer
                return Checked(value, reason="not a regular file")
            with value.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return Checked(value, digest, findings=decode_and_inspect(value, max_pixels)[1])
        if isinstance(value, bytes):
            return Checked(value, hashlib.sha256(value).hexdigest(), "", decode_and_inspect(value, max_pixels)[1])
        image, findings = from_memory(value, max_pixels)
        pixels = repr((image.mode, image.size)).encode() + image.tobytes()
        return Checked(image, hashlib.sha256(pixels).hexdigest(), "", findings)
    except DataError as error:
        return Checked(value, reason=str(error))
    except OSError as error:
        return Checked(value, reason=f"cannot be read: {error.strerror}")


def check_images(values: Sequence[Any], max_pixels: int = MAX_PIXELS) -> Iterator[Checked]:
    """Yield what check_image returns of each; only a few files are in memory at a time."""
    check = functools.partial(check_image, max_pixels=max_pixels)
    if not all(isinstance(value, Path | TarMember | bytes) for value in values):
        yield from map(check, values)  # one Pillow image may stand in several rows, and threads would share it
        return
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(check, values)


def describe_findings(found: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Return a note on each of FINDINGS that occurs; found: (name of an image, its findings)."""
    notes = []
    for finding, meaning in FINDINGS.items():
        names = [name for name, findings in found if finding in findings]
        if names:
            have = "1 image has" if len(names) == 1 else f"{len(names):,} images have"
            notes.append(f"{have} {meaning} (first: {names[0]})")
    return notes
