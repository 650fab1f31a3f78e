"""Files of images -> rows -> examples: a folder per class, a list of paths with labels, or MNIST's IDX files.

Every image is decoded once before anything is trained, by the same function that reads it later, so that what is broken
is known with its path and which images are left out does not depend on where a run stands.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augmentation.image import ImageAugmentation, mix_of
from data.batch import Batch
from data.errors import DataError, ErrorList
from data.formats import idx
from data.formats.rows import Row, locate, read_rows
from data.image_preprocessing import Preprocessing, fit, normalize, to_pixels
from data.text_classification import check_rows, label_name

# Kinds of files, by Pillow's names: what is read is decided by the content, so a PNG called .jpg is one image like any
# other. Those left out run other programs (EPS) or are hardly photos.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini"}
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; more is a decompression bomb to Pillow too
MAX_RATIO = 100  # a shorter side of 1 pixel that is resized to 256 makes the other one 256 times as long
THREADS = 4  # that decode at a time, when all images are checked
SHOWN = 20  # bad images that are named


def read_images(
    name: str,
    *,
    image: str = "path",
    label: str = "label",
    group: str = "",
    id_column: str = "id",
    labels: Sequence[str] = (),
    bad_images: str = "raise",
    format: str = "auto",
) -> list[Row]:
    """Rows with the image in column `image`, a Path, or (height, width) uint8 of an IDX file, and its `label`.

    name: a folder, whose folders are the classes (for `label` "", none is needed); a .jsonl, .csv or .tsv with paths in
    column `image`, relative to the file; or an IDX file of images, as train-images-idx3-ubyte[.gz], with that of its
    labels beside it. In IDX a label is a number, the place of its name in `labels` where they are given. Ids are
    the paths below the folder, those of the list (`id_column`, else row numbers), or the numbers from 1.
    Rows from files also have their "digest", a checksum. group: a column that the list must have.
    format: folder, idx, or one of read_rows; auto: as the name says.

    bad_images: "raise" a DataError that names all bad images and why, or "skip" them and say so.
    """
    path = locate(name)
    if format == "auto":
        format = "folder" if path.is_dir() else "idx" if idx.is_images(path) else "auto"
    if group and format in ("folder", "idx"):
        raise DataError(
            f"{name}: data.group_column = {group!r} is a column, and there are none; list the images in a .csv file"
        )
    if format == "idx":
        return _idx_rows(name, path, image, label, labels)
    bad: list[str] = []
    if format == "folder":
        if not path.is_dir():
            raise DataError(f"{name}: no such folder")
        rows = _folder_rows(path, image, label, bad)
        where = {id(row): f"{path / row.id}" for row in rows}
    else:
        errors = ErrorList()
        rows = read_rows(name, [image, *filter(None, (label, group))], id_column, errors, format)
        check_rows(name, rows, [image], label, errors)
        errors.raise_if_any()
        where = {id(row): f"{name}:{row.line}: {row.values[image]}" for row in rows}
        for row in rows:
            row.values[image] = path.parent / row.values[image]
    good = []
    for row, (digest, reason) in zip(rows, _check_all([row.values[image] for row in rows]), strict=True):
        row.values["digest"] = digest
        if reason:
            bad.append(f"{where[id(row)]}: {reason}")
        else:
            good.append(row)
    _report(name, bad, len(good), bad_images)
    return good


def _report(name: str, bad: list[str], good: int, policy: str) -> None:
    """Raise or print what is bad."""
    shown = "\n".join(bad[:SHOWN]) + (f"\n... and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else "")
    if bad and policy == "raise":
        raise DataError(f'{shown}\n(image_classification.bad_images = "skip" leaves bad images out)')
    if not good:
        raise DataError(f"{shown}\n{name}: no images".strip())
    if bad and os.environ.get("RANK", "0") == "0":  # every rank reads, one says it
        print(f"{name}: {len(bad):,} of {good + len(bad):,} images are bad and left out:\n{shown}", file=sys.stderr)


def _folder_rows(root: Path, image: str, label: str, bad: list[str]) -> list[Row]:
    """The images below a folder, in the order of their paths; the label is the first folder on the way."""
    rows: list[Row] = []
    for path in sorted(_files_below(root), key=lambda path: path.relative_to(root).parts):
        place = path.relative_to(root)
        if not _is_utf8(str(place)):  # it becomes an id, and those are written
            bad.append(f"{path!a}: its name is not UTF-8")
        elif path.suffix.lower() not in SUFFIXES:
            bad.append(f"{path}: not an image by its name; those end in {', '.join(sorted(SUFFIXES))}")
        elif label and len(place.parts) == 1:
            bad.append(f"{path}: in no folder of a class; {root} should have one for each class")
        else:
            values = {image: path, **({label: place.parts[0]} if label else {})}
            rows.append(Row(place.as_posix(), len(rows) + 1, values))
    return rows


def _is_utf8(name: str) -> bool:
    """Whether a file's name is text; bytes that are none are halves of surrogate pairs to Python."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _files_below(root: Path) -> Iterator[Path]:
    """Every file but hidden ones and what systems leave in a folder of pictures; links are followed, but no circles."""

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    for name, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folder = Path(name)
        around = {path.resolve() for path in (folder, *folder.parents)}
        folders[:] = [f for f in folders if not f.startswith(".") and (folder / f).resolve() not in around]
        yield from (folder / f for f in files if not f.startswith(".") and f.lower() not in LEFT_BY_SYSTEMS)


def _idx_rows(name: str, path: Path, image: str, label: str, labels: Sequence[str]) -> list[Row]:
    pixels = idx.read(path, dimensions=3)
    rows = [Row(str(i), i, {image: picture}) for i, picture in enumerate(pixels, start=1)]
    if not rows:
        raise DataError(f"{name}: no images")
    if label:
        numbers = idx.read(beside := idx.labels_of(path), dimensions=1)
        if len(numbers) != len(rows):
            raise DataError(f"{beside}: {len(numbers):,} labels for the {len(rows):,} images of {path.name}")
        errors = ErrorList()
        for row, number in zip(rows, numbers.tolist(), strict=True):
            if labels and number >= len(labels):
                errors.add(beside, row.line, f"label {number}, but data.labels has {len(labels)} names, from 0")
            row.values[label] = labels[number] if labels and number < len(labels) else str(number)
        errors.raise_if_any()
    return rows


def _check_all(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(checksum, why the image is bad or "") of each, decoded a few at a time and not kept."""

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


def decode(path: Path) -> Any:
    """A Pillow image of 8 bits a channel, upright; DataError says why a file is none, without its path.

    The camera's note on how it was held (EXIF) is followed. Of 16 bits the upper 8 are kept, CMYK becomes RGB, and
    transparency is dropped. Animations are refused, since a label belongs to one picture.
    """
    from PIL import Image, ImageOps

    if path.stat().st_size == 0:
        raise DataError("an empty file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are decoded")
            if max(width, height) > MAX_RATIO * min(width, height):
                raise DataError(f"{width:,} x {height:,} pixels: one side is over {MAX_RATIO} times the other")
            if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's preview beside its photo
                raise DataError("several pictures in one file; a label belongs to one")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.mode in ("I", "F"):
                raise DataError(f"levels of 32 bits (mode {upright.mode}), of which nothing says which is white")
            return upright.convert("RGBA") if "transparency" in upright.info else upright
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"not an image of a kind that is read: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"a decompression bomb; at most {MAX_PIXELS:,} pixels are decoded") from None
    except Exception as error:  # decoders meet broken files with errors of every kind
        raise DataError(f"cannot be decoded: {error}") from None


@dataclass(frozen=True)
class ImageExamples:
    """N images, made into tensors as they are asked for: decoded from files, or taken from an array of an IDX file."""

    images: Sequence[Path] | np.ndarray  # (N, height, width) uint8
    digests: list[str]  # of the files
    labels: np.ndarray | None  # (N,) int64
    ids: list[str]
    preprocessing: Preprocessing  # of one size for all images
    num_labels: int = 0
    augmentation: ImageAugmentation | None = None  # in training only
    truncated: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens: what each image costs."""
        return np.full(len(self), self.preprocessing.tokens, dtype=np.int64)

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """(num_labels,) images of each class."""
        return None if self.labels is None else np.bincount(self.labels, minlength=num_labels)

    def fingerprint(self) -> str:
        """Changes when any image, label, id, the order, or how images are prepared does."""
        digest = hashlib.sha256(repr((self.ids, self.digests, self.preprocessing)).encode())
        for array in (self.images, self.labels):
            if isinstance(array, np.ndarray):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]:
        """One image in words, with what its tensor is like."""
        x = self.tensor(index, None)
        label = "" if self.labels is None else f"  {labels[self.labels[index]]}"
        height, width = self.pixels(index).shape[1:]
        return [
            f"  id {self.ids[index]}{label}",
            f"    {width} x {height} pixels -> {list(x.shape)}, mean {x.mean():.3f}, deviation {x.std():.3f}",
        ]

    def pixels(self, index: int) -> Tensor:
        """(channels, height, width) uint8, as in the file; DataError names one that can no longer be read."""
        if isinstance(self.images, np.ndarray):
            grey = torch.from_numpy(self.images[index])
            return grey.expand(len(self.preprocessing.mean), -1, -1)
        path = self.images[index]
        try:
            return to_pixels(decode(path), self.preprocessing)
        except (DataError, OSError) as error:
            raise DataError(f"{path}: {error}; it was an image when the run began") from None

    def tensor(self, index: int, epoch: int | None) -> Tensor:
        """(channels, height, width) fp32, augmented by (seed, epoch, id) in training; not mixed with another."""
        pixels = self.pixels(index)
        if epoch is None or self.augmentation is None:
            return normalize(fit(pixels, self.preprocessing), self.preprocessing)
        return self.augmentation.apply(pixels, self.preprocessing, epoch, self.ids[index])

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """The micro-batch of these images, in this order; an empty one for no indices.

        epoch: of training, for the augmentation. Where it mixes images, labels are (B, C) shares of the classes.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        made = [self.tensor(int(i), epoch) for i in chosen]
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen])
        if epoch is not None and labels is not None and self.augmentation is not None and self.augmentation.mixes:
            labels = torch.nn.functional.one_hot(labels, self.num_labels).float()
            self._mix(chosen, epoch, self.augmentation, made, labels)
        pixels = (
            torch.stack(made)
            if made
            else torch.empty(0, len(self.preprocessing.mean), *(self.preprocessing.shape or (0, 0)))
        )
        return Batch(
            lengths=(),
            cu_seqlens=torch.zeros(1, dtype=torch.int32),
            labels=labels,
            num_targets=0 if labels is None else len(labels),
            indices=tuple(chosen.tolist()),
            ids=tuple(self.ids[i] for i in chosen),
            pixel_values=pixels,
            image_tokens=self.preprocessing.tokens * len(chosen),
        )

    def _mix(
        self, chosen: np.ndarray, epoch: int, how: ImageAugmentation, images: list[Tensor], labels: Tensor
    ) -> None:
        """Mix images and labels, (B, C), in place: each with another training image, drawn by (seed, epoch, id)."""
        for place, index in enumerate(chosen):
            mix = mix_of(how, epoch, self.ids[index], len(self))
            if mix is not None and self.labels is not None:
                images[place], share = mix.join(images[place], self.tensor(mix.partner, epoch))
                labels[place] *= share
                labels[place, self.labels[mix.partner]] += 1 - share


def encode_images(
    rows: Sequence[Row], how: Preprocessing, *, image: str = "path", label: str = "label", labels: Sequence[str]
) -> ImageExamples:
    """Examples of rows that read_images made and whose labels are known; `label` "" for unlabelled ones."""
    images = [row.values[image] for row in rows]
    number = {name: i for i, name in enumerate(labels)}
    return ImageExamples(
        images=np.stack(images) if images and isinstance(images[0], np.ndarray) else images,
        digests=[row.values.get("digest", "") for row in rows],
        labels=np.array([number[label_name(r.values[label])] for r in rows], dtype=np.int64) if label else None,
        ids=[row.id for row in rows],
        preprocessing=how,
        num_labels=len(labels),
    )
