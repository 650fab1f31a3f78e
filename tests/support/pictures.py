"""Pictures of one colour with noise, and folders of them by class."""

from __future__ import annotations

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
