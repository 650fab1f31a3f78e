"""Augmentation of training images by torchvision's transforms, a pure function of (seed, epoch, example id).

So a resumed run has the same images, in every process and on any number of ranks. The order:
1. random crop to the size of the model, flip, rotation, colours, policy, normalisation, erasing;
2. mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) with another training image; the labels are mixed too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.image_preprocessing import BILINEAR, Preprocessing, normalize, resize_and_crop
from data.random_streams import IMAGE_MIX

POLICIES = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}  # Cubuk 2020; Mueller, Hutter 2021
ERASED_AREAS, ERASED_RATIOS = (0.02, 0.33), (0.3, 3.3)  # of an erased rectangle, as in Zhong et al. 2020


@dataclass(frozen=True)
class ImageAugmentation:
    """The operations on training images; 0 or "none" leaves one out."""

    seed: int
    random_crop_min_scale: float = 0.0  # smallest share of the area that a random crop leaves
    horizontal_flip: float = 0.0  # probability of a mirrored image
    rotation_degrees: float = 0.0  # largest angle, in degrees
    color_jitter: float = 0.0  # largest change of brightness, contrast and saturation; of the hue a quarter of it
    auto_augment: str = "none"  # or a key of POLICIES
    random_erasing: float = 0.0  # probability of a rectangle becoming the mean colour
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), from which the share of the image is drawn
    cutmix: float = 0.0  # the same; with both, each image takes one of them with probability 1/2

    @property
    def is_on(self) -> bool:
        """Whether there is any operation."""
        return self != ImageAugmentation(self.seed)

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of two classes."""
        return self.mixup > 0 or self.cutmix > 0

    @cached_property
    def _before(self) -> list[Any]:
        """Transforms of uint8 pixels in the model's size."""
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

    def apply(self, pixels: Tensor, preprocessing: Preprocessing, epoch: int, id: str) -> Tensor:
        """Return the fp32 tensor that the model reads in this epoch; pixels: (channels, height, width) uint8."""
        from torchvision.transforms import v2

        shape = preprocessing.shape
        with seeded(self.seed, epoch, id):
            if self.random_crop_min_scale and shape is not None:
                is_bilinear = preprocessing.resample == BILINEAR
                mode = v2.InterpolationMode.BILINEAR if is_bilinear else v2.InterpolationMode.BICUBIC
                scale = (self.random_crop_min_scale, 1.0)
                pixels = v2.RandomResizedCrop(shape, scale, interpolation=mode, antialias=True)(pixels)
            else:
                pixels = resize_and_crop(pixels, preprocessing)
            for transform in self._before:
                pixels = transform(pixels)
            x = normalize(pixels, preprocessing)
            return v2.RandomErasing(self.random_erasing, ERASED_AREAS, ERASED_RATIOS)(x) if self.random_erasing else x


@dataclass(frozen=True)
class Mix:
    """The image with which another one is mixed, and the parameters."""

    partner: int  # its position in the data set
    share: float  # of the image itself, in [0, 1]
    is_cutmix: bool  # cutmix: a rectangle of the partner; mixup: a weighted mean
    center: tuple[float, float]  # of the rectangle, as shares of height and width

    def blend(self, x: Tensor, other: Tensor) -> tuple[Tensor, float]:
        """Return (the mixed image, the share of x in it); both images are (channels, height, width)."""
        if not self.is_cutmix:
            return self.share * x + (1 - self.share) * other, self.share
        height, width = x.shape[1:]
        side = (1 - self.share) ** 0.5  # of the rectangle, before it is clipped at the edges
        (top, bottom), (left, right) = (
            (round(max(0.0, at - side / 2) * size), round(min(1.0, at + side / 2) * size))
            for at, size in zip(self.center, (height, width), strict=True)
        )
        mixed = x.clone()
        mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def choose_mix(augmentation: ImageAugmentation, epoch: int, id: str, count: int) -> Mix | None:
    """Return the mix of an image of a data set of `count` in this epoch; None where there is no other image.

    The partner may be any training image, so the result does not depend on the micro-batch. The random stream is not
    that of the image's own augmentation.
    """
    if count < 2 or not augmentation.mixes:
        return None
    rng = np.random.default_rng([*_key(augmentation.seed, epoch, id), IMAGE_MIX])
    is_cutmix = augmentation.cutmix > 0 and (augmentation.mixup == 0 or rng.random() < 0.5)
    alpha = augmentation.cutmix if is_cutmix else augmentation.mixup
    return Mix(int(rng.integers(count)), float(rng.beta(alpha, alpha)), is_cutmix, (rng.random(), rng.random()))


def _key(seed: int, epoch: int, id: str) -> list[int]:
    return [seed, epoch, int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little")]


@contextmanager
def seeded(seed: int, epoch: int, id: str) -> Iterator[None]:
    """Seed torch's CPU generator from the arguments; restore its state at the end."""
    state = torch.random.get_rng_state()
    # Only the CPU's generator, since torch.manual_seed would seed the GPUs too.
    torch.default_generator.manual_seed(int(np.random.SeedSequence(_key(seed, epoch, id)).generate_state(1, "u8")[0]))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
