"""Images with one class each, or with sets of labels: checked rows of any format, and examples decoded on demand.

The formats: a folder for each class, .tar archives, a list of paths with labels, MNIST's IDX files, and images in
memory. Every image is decoded once before training starts, by the function that reads it later. So bad images are
reported with their paths, and a resumed run skips the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augmentation.image import ImageAugmentation, choose_mix
from data.batch import Batch
from data.errors import DataError, ErrorList
from data.formats import idx
from data.formats.folders import class_folders, list_names, read_folder
from data.formats.image_files import MAX_PIXELS, check_images, decode, describe_findings
from data.formats.image_kinds import SUFFIXES
from data.formats.image_paths import find_images
from data.formats.lines import locate
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.parquet import is_table_folder
from data.formats.rows import read_rows
from data.formats.tar_images import find_archives, read_archives
from data.formats.tar_index import TarMember, is_archive
from data.image_preprocessing import Preprocessing, normalize, resize_and_crop, to_pixels
from data.labels import class_numbers
from data.row import Row, Rows
from data.text_classification import check_texts
from data.workers import note_example
from data.writing import replace_file

SEVERAL = "multi-label-image-classification"  # the task that reads several labels to an image
DIGEST = "<digest>"  # an internal column: a checksum of the image; no file has this column
# (file, rows, label column, where errors are added): check the targets, and write them into the label column.
ReadTargets = Callable[[str, list[Row], str, ErrorList], None]

# Files -> rows


def read_images(
    name: str,
    *,
    image: str = "path",
    label: str = "label",
    group: str = "",
    labels: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    options: FileOptions = FileOptions(),
    read_targets: ReadTargets | None = None,
    target_columns: Sequence[str] = (),
) -> Rows:
    """Return rows with an image in column `image` and its `label` ("": without labels).

    - A folder (format folder): its folders are the classes. Ids are the paths below it. The image is a Path.
    - A .tar archive, or a folder of them (format tar): read as the unpacked folder, or as webdataset's files
      (tar_images.py). The image is a TarMember.
    - A file of rows, or a folder of tables (format as in read_rows): the column has paths, relative to the file, or the
      content of files. The image is a Path or bytes.
    - An IDX file of images (format idx), such as train-images-idx3-ubyte[.gz], with the file of its labels beside it.
      Labels are numbers, the positions in `labels` where these are given. The image is (height, width) uint8.
    - Rows in memory: the column has Pillow images, arrays of uint8, paths or bytes. The image is a Pillow image, a Path
      or bytes.

    format "auto" decides by the name. group: a column that a file of rows must have.
    read_targets: reads targets that are no classes, which folders and IDX files cannot have; None: they are classes.
    target_columns: the columns of the targets in a file of rows, if these are not in the label column.
    Rows of image files and of images in memory get a column DIGEST, a checksum.
    Notes count what was left out or changed in decoding.
    """
    path, format = locate(name), find_format(name, options)
    if group and format in ("folder", "idx", "tar"):
        raise DataError(
            f"{name}: data.group_column = {group!r} is a column, and there are none; list the images in a .csv file"
        )
    if label and read_targets is not None and format in ("folder", "idx"):
        raise DataError(
            f"{name}: one class for each image; list the images, with their labels, in a .csv or .jsonl file"
        )
    errors = ErrorList()
    classes: list[str] = []  # that have a folder
    if format == "auto" and path.suffix.lower() in SUFFIXES and path.is_file():
        raise DataError(f"{name}: one image; name the folder that has it, or a .csv or .jsonl file with its path")
    if format == "idx":
        rows = _read_idx(name, path, image, label, labels, max_pixels, errors)
    elif format == "folder":
        if not path.is_dir():
            raise DataError(f"{name}: no such folder")
        rows = read_folder(path, image, label, errors, labels)
        for row in rows if options.kept_label and not label else ():
            row.values[options.kept_label] = row.id.partition("/")[0] if "/" in row.id else None
        classes = class_folders(path, labels) if label else []
        _check_images(name, rows, image, max_pixels, errors)
    elif format == "tar":
        rows, classes = read_archives(path, image, label, errors, labels, has_sets=read_targets is not None)
        if label and read_targets is not None:
            read_targets(name, rows, label, errors)
        _check_images(name, rows, image, max_pixels, errors)
    else:
        columns = [image, *filter(None, (*(target_columns or [label]), group))]
        rows = read_rows(name, columns, replace(options, format=format), errors)
        check_texts(name, rows, [], label if read_targets is None else "", errors, SEVERAL)
        if label and read_targets is not None:
            read_targets(name, rows, label, errors)
        folder = Path() if is_in_memory(name) else path if path.is_dir() else path.parent
        given = find_images(name, folder, rows, image, errors)
        _check_images(name, rows, image, max_pixels, errors, given)
    if not rows and not errors:
        raise DataError("\n".join([f"{name}: no images", *errors.notes]))
    if options.bad_rows == "skip" and len(errors.reasons) > 1:
        errors.notes.append(f"images left out: {list_names([row.id for row in rows if row.line in errors.reasons])}")
    settled = errors.settle(rows, options)
    if classes:
        without = sorted(set(classes) - {row.values[label] for row in settled})
        settled.notes += [f"no image in the folder of a class: {list_names(without)}"] if without else []
    return settled


def find_format(name: str, options: FileOptions) -> str:
    """Return folder, tar, idx, memory, or the format of a list of images as in `options`."""
    path = locate(name)
    if is_in_memory(name):
        return "memory"
    if options.format != "auto":
        return options.format
    if path.is_dir():
        found = "auto" if is_table_folder(path) else "tar" if find_archives(path) else "folder"
        return found if found == "folder" or not class_folders(path) else "folder"
    if is_archive(path):
        return "tar"
    return "idx" if idx.is_image_file(path) else "auto"


def _check_images(
    name: str,
    rows: Sequence[Row],
    image: str,
    max_pixels: int,
    errors: ErrorList,
    given: Mapping[int, str] | None = None,
) -> None:
    """Decode the image of each row once, and add its digest to the row.

    Bad images are added to `errors`, and what decoding changed to its notes. given: {line: path} in a list; without it,
    the images are those of a folder or an archive, which their ids name.
    """
    rows = [row for row in rows if row.line not in errors.reasons]
    found = []
    checks = check_images([row.values[image] for row in rows], max_pixels)
    for row, checked in zip(rows, checks, strict=True):
        row.values[image], row.values[DIGEST] = checked.image, checked.digest
        path = (given or {}).get(row.line, "")
        found.append((path or row.id, checked.findings))
        if checked.reason and isinstance(checked.image, TarMember):
            errors.add(checked.image.archive, row.line, checked.reason, place=checked.image.name)
        elif checked.reason and given is None:
            errors.add(name, row.line, checked.reason, place=row.id)
        elif checked.reason:
            errors.add(name, row.line, f"{path}: {checked.reason}" if path else checked.reason)
    errors.notes += describe_findings(found)


def image_digest(row: Row, image: str) -> str:
    """Return a checksum of a row's image, which equal images share."""
    digest: str = row.values.get(DIGEST, "")
    return digest or hashlib.sha256(np.ascontiguousarray(row.values[image]).tobytes()).hexdigest()


def _read_idx(
    name: str, path: Path, image: str, label: str, labels: Sequence[str], max_pixels: int, errors: ErrorList
) -> list[Row]:
    pixels = idx.read(path, dimensions=3)
    rows = [Row(str(i), i, {image: picture}) for i, picture in enumerate(pixels, start=1)]
    height, width = pixels.shape[1:]
    if rows and height * width > max_pixels:
        raise DataError(
            f"{name}: images of {width:,} x {height:,} pixels; image_classification.max_pixels allows at most "
            f"{max_pixels:,}"
        )
    if rows and label:
        numbers = idx.read(beside := idx.labels_path(path), dimensions=1)
        if len(numbers) != len(rows):
            raise DataError(f"{beside}: {len(numbers):,} labels for the {len(rows):,} images of {path.name}")
        for row, number in zip(rows, numbers.tolist(), strict=True):
            if labels and number >= len(labels):
                errors.add(beside, row.line, f"label {number}, but data.labels has {len(labels)} names, from 0")
            row.values[label] = labels[number] if labels and number < len(labels) else str(number)
    return rows


# Rows -> examples


@dataclass(frozen=True)
class ImageExamples:
    """N images, made into tensors when they are needed: decoded from files, or taken from memory."""

    images: Sequence[Any] | np.ndarray  # (N,) a Path, TarMember, bytes or Pillow image; or (N, height, width) uint8
    digests: Sequence[str]  # (N,) checksums of the files; "" in an IDX file
    labels: np.ndarray | None  # (N,) int64; (N, C) float32, 1 where the image has the label, for sets of labels
    ids: Sequence[str]
    preprocessing: Preprocessing  # of one size for all images
    num_labels: int = 0
    augmentation: ImageAugmentation | None = None  # in training only
    max_pixels: int = MAX_PIXELS  # of a file
    truncated: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each image: its cost. All are equal, and stored once."""
        return np.broadcast_to(np.int64(self.preprocessing.tokens), len(self))

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """Return (num_labels,) the number of images of each class."""
        if self.labels is None or self.labels.ndim == 1:
            return None if self.labels is None else np.bincount(self.labels, minlength=num_labels)
        counts: np.ndarray = np.asarray(self.labels).sum(0).astype(np.int64)
        return counts

    def fingerprint(self) -> str:
        """Return a checksum that changes with any image, label or id, their order, and the preprocessing."""
        digest = hashlib.sha256(repr((self.ids, self.digests, self.preprocessing)).encode())
        for array in (self.images, self.labels):
            if isinstance(array, np.ndarray):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]:
        """Return lines about one image: its id and label, its size, and the statistics of its tensor."""
        x = self.tensor(index, None)
        label = "" if self.labels is None else f"  {self._label_names(index, labels)}"
        height, width = self.pixels(index).shape[1:]
        return [
            f"id {self.ids[index]}{label}",
            f"{width} x {height} pixels -> {list(x.shape)}, mean {x.mean():.3f}, deviation {x.std():.3f}",
        ]

    def _label_names(self, index: int, labels: Sequence[str]) -> str:
        own: Any = None if self.labels is None else self.labels[index]
        if np.ndim(own) == 0:
            return str(labels[own])
        return ", ".join(labels[k] for k in np.flatnonzero(own).tolist()) or "no label"

    def pixels(self, index: int) -> Tensor:
        """Return (channels, height, width) uint8 in the file's size; DataError for a file that has changed."""
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return torch.from_numpy(image).expand(len(self.preprocessing.mean), -1, -1)
        if not isinstance(image, Path | TarMember | bytes):
            return to_pixels(image, self.preprocessing)
        try:
            return to_pixels(decode(image, self.max_pixels), self.preprocessing)
        except (DataError, OSError) as error:
            name = self.ids[index] if isinstance(image, bytes) else image
            raise DataError(f"{name}: {error}; it was an image when the run began") from None

    def tensor(self, index: int, epoch: int | None) -> Tensor:
        """Return (channels, height, width) fp32, in training augmented by (seed, epoch, id), but not mixed."""
        note_example(index)
        pixels = self.pixels(index)
        if epoch is None or self.augmentation is None:
            return normalize(resize_and_crop(pixels, self.preprocessing), self.preprocessing)
        return self.augmentation.apply(pixels, self.preprocessing, epoch, self.ids[index])

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the micro-batch of these images, in this order; an empty one for no indices.

        epoch: of training, for the augmentation. Where it mixes images, labels are (B, C) shares of the classes,
        or of the two sets of labels.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        tensors = [self.tensor(int(i), epoch) for i in chosen]
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen])
        if epoch is not None and labels is not None and self.augmentation is not None and self.augmentation.mixes:
            if labels.ndim == 1:
                labels = torch.nn.functional.one_hot(labels, self.num_labels).float()
            self._mix(chosen, epoch, self.augmentation, tensors, labels)
        shape = (len(self.preprocessing.mean), *(self.preprocessing.shape or (0, 0)))
        return Batch(
            lengths=(),
            cu_seqlens=torch.zeros(1, dtype=torch.int32),
            labels=labels,
            num_targets=0 if labels is None else labels.numel() if self._has_sets else len(labels),
            indices=tuple(chosen.tolist()),
            ids=tuple(self.ids[i] for i in chosen),
            pixel_values=torch.stack(tensors) if tensors else torch.empty(0, *shape),
            image_tokens=self.preprocessing.tokens * len(chosen),
        )

    @property
    def _has_sets(self) -> bool:
        """Whether an image has a set of labels, each of which is a target."""
        return self.labels is not None and self.labels.ndim == 2

    def _mix(
        self, chosen: np.ndarray, epoch: int, augmentation: ImageAugmentation, images: list[Tensor], labels: Tensor
    ) -> None:
        """Mix images and labels, (B, C), in place: each with another training image, drawn by (seed, epoch, id)."""
        for i, index in enumerate(chosen):
            mix = choose_mix(augmentation, epoch, self.ids[index], len(self))
            if mix is not None and self.labels is not None:
                images[i], share = mix.blend(images[i], self.tensor(mix.partner, epoch))
                labels[i] *= share
                if self._has_sets:
                    labels[i] += (1 - share) * torch.from_numpy(self.labels[mix.partner])
                else:
                    labels[i, self.labels[mix.partner]] += 1 - share


def encode_images(
    rows: Sequence[Row],
    preprocessing: Preprocessing,
    *,
    image: str = "path",
    label: str = "label",
    labels: Sequence[str],
    max_pixels: int = MAX_PIXELS,
) -> ImageExamples:
    """Return examples of rows of read_images whose labels are known; label: "" for unlabelled rows."""
    images = [row.values[image] for row in rows]
    return ImageExamples(
        images=np.stack(images) if images and isinstance(images[0], np.ndarray) else images,
        digests=[row.values.get(DIGEST, "") for row in rows],
        labels=class_numbers(rows, label, labels) if label else None,
        ids=[row.id for row in rows],
        preprocessing=preprocessing,
        num_labels=len(labels),
        max_pixels=max_pixels,
    )


def save_augmented_images(examples: ImageExamples, path: Path, count: int = 8, epochs: int = 6) -> None:
    """Write a PNG with a line for each of `count` images from the whole data set: as evaluated, then by epoch."""
    from PIL import Image

    if not len(examples):
        raise DataError("there are no images to show")
    indices = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    preprocessing = examples.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    lines = []
    for index in indices.tolist():
        views = [examples.batch([index], epoch).pixel_values for epoch in (None, *range(epochs))]
        tiles = [(x[0] * std + mean) / preprocessing.scale for x in views if x is not None]
        tiles = [torch.nn.functional.pad(tile, (0, 4, 0, 4), value=255.0) for tile in tiles]
        lines.append(torch.cat(tiles, 2))
    pixels = torch.cat(lines, 1).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    with replace_file(path) as temporary:
        Image.fromarray(pixels.squeeze()).save(temporary, "PNG")
