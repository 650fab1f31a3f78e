"""Other views of a training image: torchvision's transforms, each drawn by (seed, epoch, example id) and nothing else.

So an interrupted run sees the same images when it goes on, whoever makes them: this process or a worker, on one rank or
on eight. The order: random crop to the size of the model, flip, rotation, colours, policy, normalisation, erasing;
then mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) with another training image, whose labels are shared too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.image_preprocessing import BILINEAR, Preprocessing, fit, normalize

if TYPE_CHECKING:
    from data.image_classification import ImageExamples

POLICIES = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}  # Cubuk 2020; Mueller, Hutter 2021
SIZES, RATIOS = (0.02, 0.33), (0.3, 3.3)  # of an erased rectangle, as in Zhong et al. 2020


@dataclass(frozen=True)
class ImageAugmentation:
    """What is done to training images; 0 or "none" leaves an operation out."""

    seed: int
    random_crop_min_scale: float = 0.0  # smallest share of the area that a random crop leaves
    horizontal_flip: float = 0.0  # probability of left and right changing sides
    rotation_degrees: float = 0.0  # largest angle, in degrees
    color_jitter: float = (
        0.0  # brightness, contrast, saturation change by up to this factor, the hue by a quarter of it
    )
    auto_augment: str = "none"  # or a key of POLICIES
    random_erasing: float = 0.0  # probability of a rectangle becoming the mean colour
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), of which the share of the other image is drawn
    cutmix: float = 0.0  # the same; with both, one of them by the toss of a coin

    @property
    def is_on(self) -> bool:
        """Whether anything is done at all."""
        return self != ImageAugmentation(self.seed)

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of two classes."""
        return self.mixup > 0 or self.cutmix > 0

    @cached_property
    def _before(self) -> list[Any]:
        """Transforms of uint8 pixels of the model's size."""
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(self.horizontal_flip))
        if self.rotation_degrees:
            steps.append(v2.RandomRotation(self.rotation_degrees, interpolation=v2.InterpolationMode.BILINEAR))
        if self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter, self.color_jitter / 4))
        if self.auto_augment != "none":
            steps.append(getattr(v2, POLICIES[self.auto_augment])())
        return steps

    def apply(self, pixels: Tensor, how: Preprocessing, epoch: int, name: str) -> Tensor:
        """(channels, height, width) uint8 -> the fp32 tensor that the model reads in this epoch of the image `name`."""
        from torchvision.transforms import v2

        with drawn_from(self.seed, epoch, name):
            if self.random_crop_min_scale and how.shape is not None:
                mode = v2.InterpolationMode.BILINEAR if how.resample == BILINEAR else v2.InterpolationMode.BICUBIC
                pixels = v2.RandomResizedCrop(
                    how.shape, (self.random_crop_min_scale, 1.0), interpolation=mode, antialias=True
                )(pixels)
            else:
                pixels = fit(pixels, how)
            for step in self._before:
                pixels = step(pixels)
            x = normalize(pixels, how)
            return v2.RandomErasing(self.random_erasing, SIZES, RATIOS)(x) if self.random_erasing else x


@dataclass(frozen=True)
class Mix:
    """With which image another is mixed, and how."""

    partner: int  # its place in the data set
    share: float  # of the image itself, in [0, 1]
    cut: bool  # cutmix: a rectangle of the partner; mixup: a faint picture of it
    center: tuple[float, float]  # of the rectangle, as shares of height and width

    def join(self, x: Tensor, other: Tensor) -> tuple[Tensor, float]:
        """(channels, height, width), the same of the partner -> (the mixture, the share of x in it)."""
        if not self.cut:
            return self.share * x + (1 - self.share) * other, self.share
        height, width = x.shape[1:]
        side = (1 - self.share) ** 0.5  # of the rectangle, before it is cut at the edges
        (top, bottom), (left, right) = (
            (round(max(0.0, at - side / 2) * size), round(min(1.0, at + side / 2) * size))
            for at, size in zip(self.center, (height, width), strict=True)
        )
        mixed = x.clone()
        mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def mix_of(how: ImageAugmentation, epoch: int, name: str, count: int) -> Mix | None:
    """How the image `name` of a data set of `count` is mixed in this epoch; None where there is no other image.

    The partner may be any image, whatever else is in the micro-batch, which depends on the machine. Keyed by name as
    all else, with one number more, so that its draws are not those of the image's own augmentation.
    """
    if count < 2 or not how.mixes:
        return None
    rng = np.random.default_rng([*_key(how.seed, epoch, name), 0x313C])
    cut = how.cutmix > 0 and (how.mixup == 0 or rng.random() < 0.5)
    alpha = how.cutmix if cut else how.mixup
    return Mix(int(rng.integers(count)), float(rng.beta(alpha, alpha)), cut, (rng.random(), rng.random()))


def _key(seed: int, epoch: int, name: str) -> list[int]:
    return [seed, epoch, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")]


@contextmanager
def drawn_from(seed: int, epoch: int, name: str) -> Iterator[None]:
    """What torch draws on the CPU inside depends on these alone; outside it goes on as if nothing had been drawn."""
    state = torch.random.get_rng_state()
    # Of the CPU alone: torch.manual_seed would seed the GPUs too.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(_key(seed, epoch, name)).generate_state(1, "u8")[0]))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def sheet(examples: ImageExamples, path: Path, count: int = 8, epochs: int = 6) -> None:
    """Write a PNG with one line an image, of `count` spread over the data set: as evaluated, then as in each epoch."""
    from PIL import Image

    if not len(examples):
        raise DataError("there are no images to show")
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    how = examples.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (how.mean, how.std))
    lines = []
    for place in places.tolist():
        views = [examples.batch([place], epoch).pixel_values for epoch in (None, *range(epochs))]
        tiles = [(x[0] * std + mean) / how.scale for x in views if x is not None]
        tiles = [torch.nn.functional.pad(tile, (0, 4, 0, 4), value=255.0) for tile in tiles]
        lines.append(torch.cat(tiles, 2))
    pixels = torch.cat(lines, 1).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze()).save(path, "PNG")
