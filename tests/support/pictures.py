"""Pictures of one colour with noise, and folders of them by class."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}


def picture(colour=(120, 130, 140), size=(20, 16), seed=0) -> Image.Image:
    """Return a picture of one colour with noise; size is (width, height)."""
    noise = np.random.default_rng(seed).integers(-30, 31, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def write(path: Path, image: Image.Image, kind: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)
    return path


def folder_of_colours(root: Path, count: int) -> Path:
    """Write a folder for each colour with `count` pictures of several sizes and file formats."""
    for name, colour in COLOURS.items():
        for i in range(count):
            kind = ("png", "jpg", "bmp")[i % 3]
            write(root / name / f"{i:03d}.{kind}", picture(colour, (20 + i % 5, 16 + i % 3), seed=i))
    return root


def small_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims this size, with little data behind it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def bad_images(root: Path) -> dict[str, str]:
    """Write bad images and return {path: a piece of the reason}."""
    found: dict[str, str] = {}

    def add(name: str, content: bytes, reason: str) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        found[name] = reason

    def encoded(kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        picture(size=(60, 40)).save(buffer, kind, **options)
        return buffer.getvalue()

    for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("BMP", "bmp"), ("WEBP", "webp")):
        whole = encoded(kind)
        for share in (0.001, 0.02, *np.linspace(0.1, 0.9, 24)):
            add(f"a/truncated-{kind}-{share:.3f}.{ending}", whole[: max(1, int(len(whole) * share))], "")
    for i in range(21):
        add(f"b/empty-{i}.png", b"", "an empty file")
        add(f"b/text-{i}.jpg", b"hello, world " * i + b"!", "not an image of a kind")
        add(f"b/named-{i}.heic", b"x", "an image of the kind .heic, which is not read; save it as PNG or JPEG")
    frames = [picture(seed=i) for i in range(3)]
    for kind, ending in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        add(f"b/animated.{ending}", buffer.getvalue(), "several pictures in one file")
    too_many = "pixels; image_classification.max_pixels allows at most 89,478,485"
    add("b/bomb.png", small_png(50_000, 50_000), f"50,000 x 50,000 {too_many}")
    add("b/large.png", small_png(10_000, 9_999), f"10,000 x 9,999 {too_many}")
    add("b/long.png", small_png(20_000, 10), "20,000 x 10 pixels: one side is over 100 times the other")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    add("b/float.tif", buffer.getvalue(), "levels of 32 bits or with a sign (mode F)")
    add("b/program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "an image of PostScript, which is not")
    return found
