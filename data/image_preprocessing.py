"""The preprocessing of images: a checkpoint's preprocessor_config.json, and one image -> one tensor.

The numbers equal those of the hub's image processors: the image is resized in whole grey levels (with antialiasing),
cropped, scaled to [0, 1] and normalised. A Pillow image and the tensor of its pixels give the same result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError

FILE = "preprocessor_config.json"
BILINEAR, BICUBIC = 2, 3  # as Pillow numbers its filters
HALF, CLIP_MEAN, CLIP_STD = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# Processors by name, with the default of each setting. `square`: a size of one number is both sides; without it, the
# shorter side.
COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
VIT = COMMON | {"square": True, "size": 224, "resample": BILINEAR, "image_mean": HALF, "image_std": HALF}
DEIT = VIT | {"size": 256, "resample": BICUBIC, "do_center_crop": True, "crop_size": 224}
BEIT = VIT | {"resample": BICUBIC}
BIT = DEIT | {"square": False, "size": 224, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}  # DINOv2 uses this one
PROCESSORS: dict[str, dict[str, Any]] = {"ViT": VIT, "DeiT": DEIT, "Beit": BEIT, "Bit": BIT}
# Settings without effect on images as they are read here: in RGB, and without maps of segments.
UNUSED = ("do_convert_rgb", "do_reduce_labels")


@dataclass(frozen=True)
class Preprocessing:
    """The operations on an image, in this order; None leaves one out. Sizes are (height, width) in pixels."""

    size: tuple[int, int] | int | None  # resize to it; one number is the shorter side, and proportions are kept
    resample: int  # BILINEAR or BICUBIC
    crop: tuple[int, int] | None  # keep the middle; padding is black
    scale: float  # factor of the grey levels, 0 to 255
    mean: tuple[float, ...]  # by channel; one channel means grey images
    std: tuple[float, ...]
    tokens: int = 0  # tokens that the model makes of an image; preprocessor_config.json does not say it

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of the result; None where it depends on the image, so that images cannot share a batch."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)


def read_preprocessing(folder: Path) -> Preprocessing:
    """Return the Preprocessing of a checkpoint folder; DataError for a missing, broken or unsupported file."""
    path = folder / FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no {FILE}, which says how its images are prepared") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: should be an object of settings")
    name = raw.get("image_processor_type") or raw.get("feature_extractor_type") or "ViTImageProcessor"
    family = str(name).split("Image")[0].split("Feature")[0]
    if family not in PROCESSORS:
        raise DataError(f"{path}: {name!r} is not supported; choose from {', '.join(PROCESSORS)} (ImageProcessor)")
    settings = PROCESSORS[family] | {key: value for key, value in raw.items() if value is not None}
    for key in settings:
        known = key in PROCESSORS[family] or key in UNUSED
        if (key.startswith("do_") or key == "crop_pct") and settings[key] and not known:
            raise DataError(f"{path}: {key} = {settings[key]!r} is not supported")
    try:
        return _preprocessing(settings)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _preprocessing(settings: dict[str, Any]) -> Preprocessing:
    """Return the Preprocessing of complete settings; ValueError names a setting that is invalid."""
    size = _size("size", settings["size"], settings["square"]) if settings["do_resize"] else None
    crop = _size("crop_size", settings.get("crop_size", 224), square=True) if settings["do_center_crop"] else None
    if isinstance(crop, int):
        raise ValueError(f"crop_size = {settings['crop_size']!r} should have height and width")
    if settings["resample"] not in (BILINEAR, BICUBIC):
        raise ValueError(f"resample = {settings['resample']!r} is not supported; 2 (bilinear) and 3 (bicubic) are")
    scale = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if not isinstance(scale, int | float):
        raise ValueError(f"rescale_factor = {scale!r} should be a number, like {1 / 255}")
    if not settings["do_normalize"]:
        return Preprocessing(size, settings["resample"], crop, scale, (0.0,) * 3, (1.0,) * 3)
    mean, std = (_channels(name, settings[name]) for name in ("image_mean", "image_std"))
    if len(mean) != len(std) or 0.0 in std:
        raise ValueError("image_mean and image_std should have one number a channel, no image_std of 0")
    return Preprocessing(size, settings["resample"], crop, scale, mean, std)


def _size(name: str, value: Any, square: bool) -> tuple[int, int] | int:
    """Return a size given as 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(value, dict):
        given = {key: number for key, number in value.items() if number is not None}
        numbers = [given[key] for key in ("height", "width") if key in given]
        if given.keys() == {"shortest_edge"}:
            numbers, square = [given["shortest_edge"]], False
        elif given.keys() != {"height", "width"}:
            raise ValueError(f"{name} = {value!r} should have height and width, or shortest_edge")
    else:
        numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, 2) or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"{name} = {value!r} should be in whole pixels, like 224")
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    return (numbers[0], numbers[0]) if square else numbers[0]


def _channels(name: str, value: Any) -> tuple[float, ...]:
    """Return one number per channel, 3 or 1."""
    numbers = value if isinstance(value, list) and len(value) in (1, 3) else [None]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"{name} = {value!r} should be a list of 3 numbers, or of 1 for grey images")
    return tuple(map(float, numbers))


def preprocess(image: Any, preprocessing: Preprocessing) -> Tensor:
    """Return (channels, height, width) fp32 of one image.

    image: a PIL image, converted to RGB (or to grey, for one channel), or a uint8 tensor (channels, height, width).
    DataError for any other tensor.
    """
    return normalize(resize_and_crop(to_pixels(image, preprocessing), preprocessing), preprocessing)


def to_pixels(image: Any, preprocessing: Preprocessing) -> Tensor:
    """Return (channels, height, width) uint8 in the image's own size, of a PIL image or such a tensor."""
    channels = len(preprocessing.mean)
    if not isinstance(image, Tensor):
        from torchvision.transforms.v2 import functional

        image = functional.pil_to_tensor(image.convert("RGB" if channels == 3 else "L"))
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != channels:
        wanted = f"uint8 ({channels}, height, width)"
        raise DataError(f"an image of type {image.dtype}, shape {list(image.shape)} should be {wanted}")
    pixels: Tensor = image
    return pixels


def resize_and_crop(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return uint8 pixels resized and cropped to the size that the model reads."""
    if preprocessing.size is not None:
        from torchvision.transforms.v2 import InterpolationMode, functional

        mode = InterpolationMode.BILINEAR if preprocessing.resample == BILINEAR else InterpolationMode.BICUBIC
        pixels = functional.resize(
            pixels, _resized(pixels.shape[1:], preprocessing.size), interpolation=mode, antialias=True
        )
    return pixels if preprocessing.crop is None else _center_crop(pixels, *preprocessing.crop)


def normalize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return uint8 pixels as fp32: scaled, minus the mean of each channel, divided by its standard deviation."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (pixels.float() * preprocessing.scale - mean) / std


def _resized(shape: torch.Size, size: tuple[int, int] | int) -> list[int]:
    """Return (height, width) after the resize; `size` of one number is the shorter side, and proportions are kept."""
    if isinstance(size, tuple):
        return list(size)
    height, width = shape
    return [size, int(size * width / height)] if height <= width else [int(size * height / width), size]


def _center_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Return the middle height x width pixels, half a pixel up and to the left where there is no exact middle."""
    for axis, wanted in ((1, height), (2, width)):
        missing = wanted - image.shape[axis]
        if missing > 0:
            padding = [missing // 2, missing - missing // 2]
            image = torch.nn.functional.pad(image, padding if axis == 2 else [0, 0, *padding])
        image = image.narrow(axis, (image.shape[axis] - wanted) // 2, wanted)
    return image
