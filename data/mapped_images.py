"""Images that were checked once, by an index in memory-mapped files: nothing of the size of the data is in memory.

A shard has, of each image, its id, class and checksum, and where it lies: the number of a path in the shard's table of
paths, and for a member of a .tar archive its place there. Images themselves stay where they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.formats.image_files import MAX_PIXELS
from data.formats.tar_index import TarMember
from data.image_classification import ImageExamples
from data.image_preprocessing import Preprocessing
from data.mapped import Facts, Part, Shard, ShardedArray, ShardedIds, ShardedSequence
from data.prepared import PreparedRows, checksum_of, open_parts, save_arrays
from data.writing import sha256_of

LOOSE = -1  # the offset of an image that is a file of its own
# The labels of a folder whose manifest does not describe them, as older ones: (dtype, shape of an element)
OF_CLASSES: tuple[str, Sequence[int]] = ("int64", ())


def write_image_shard(file: Path, examples: ImageExamples) -> dict[str, Any]:
    """Write the index of some images that were checked; return its description, as data.prepared.write_shard does.

    Paths are absolute: the images are found from any folder, but not after they were moved. DataError for an image that
    is no file.
    """
    numbers: dict[Path, int] = {}
    places = []
    for image, name in zip(examples.images, examples.ids, strict=True):
        if not isinstance(image, Path | TarMember):
            raise DataError(f"the image with id {name!r} is no file of its own: train from the file that has it")
        if isinstance(image, TarMember):
            path, place = image.archive.absolute(), (image.offset, image.size)
        else:
            path, place = image.absolute(), (LOOSE, 0)
        places.append((numbers.setdefault(path, len(numbers)), *place))
    sizes = [path.stat().st_size for path in numbers]
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    digests = np.frombuffer(bytes.fromhex("".join(examples.digests)), dtype=np.uint8).reshape(-1, 32)
    arrays: dict[str, np.ndarray] = {"digests": digests, "places": table, "path_sizes": np.array(sizes, dtype=np.int64)}
    for name, texts in (("id", examples.ids), ("path", [str(path) for path in numbers])):
        encoded = [text.encode(errors="surrogateescape") for text in texts]
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, encoded)])[:-1]
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    dtypes: dict[str, tuple[str, list[int]]] = {}
    if examples.labels is not None:
        arrays["labels"] = examples.labels
        dtypes["labels"] = (examples.labels.dtype.name, list(examples.labels.shape[1:]))
    save_arrays(file, arrays)
    return {
        "files": {file.name: file.stat().st_size},
        "sha256": {file.name: sha256_of(file)},
        "sizes": {"examples": len(examples), "sequences": 0, "tokens": 0, "targets": 0},
        "arrays": dtypes,
        "truncated": 0,
        "encoding_notes": list(examples.notes),
        "length_counts": [],
        "longest_sequence": 0,
        "largest": {},
        "num_empty": 0,
        "first_empty": "",
    }


class MappedDigests(ShardedSequence[str]):
    """(N,) the checksums of the images."""

    def _read(self, index: int, shard: Shard, place: int) -> str:
        digest: bytes = _array(shard, "digests")[place].tobytes()
        return digest.hex()


class MappedPlaces(ShardedSequence[Path | TarMember]):
    """(N,) the images: files, or members of archives, which take their ids as names."""

    def _read(self, index: int, shard: Shard, place: int) -> Path | TarMember:
        number, offset, size = _array(shard, "places")[place].tolist()
        path = Path(_read_text(shard, "path", number))
        return path if offset == LOOSE else TarMember(path, _read_text(shard, "id", place), offset, size)


def _array(shard: Shard, name: str) -> np.ndarray:
    values = shard.array(name)
    if values is None:
        raise DataError(f"{shard.paths[0]} has no array {name!r}: it is no index of images")
    return values


def _read_text(shard: Shard, name: str, number: int) -> str:
    """Return one of the texts that lie end to end in a shard: an id or a path."""
    begins, texts = _array(shard, f"{name}_offsets"), _array(shard, f"{name}_bytes")
    end = begins[number + 1] if number + 1 < len(begins) else len(texts)
    return texts[begins[number] : end].tobytes().decode(errors="surrogateescape")


@dataclass(frozen=True)
class MappedImageExamples(ImageExamples):
    """Images of an index in files; what is asked about all of them is known."""

    facts: Facts | None = None

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """Return (num_labels,) the number of images of each class."""
        return super().label_counts(num_labels) if self.facts is None else self.facts.label_counts

    def fingerprint(self) -> str:
        """Return a checksum that changes with any image, label or id, their order, and the preprocessing."""
        return super().fingerprint() if self.facts is None else self.facts.fingerprint


def open_prepared_images(
    rows: PreparedRows, preprocessing: Preprocessing, labels: Sequence[str], max_pixels: int
) -> MappedImageExamples:
    """Return the images of a prepared folder; DataError where they do not fit the model, or have changed."""
    facts, remap = rows.describe(labels)
    if checksum_of(preprocessing) != rows.manifest.tokenizer:
        digest = hashlib.sha256(repr((facts.fingerprint, preprocessing)).encode())
        facts = facts._replace(fingerprint=digest.hexdigest()[:16])
    parts = open_parts(rows.folder, rows.manifest)
    labels_as = rows.manifest.arrays.get("labels", OF_CLASSES)
    return open_images(parts, facts, preprocessing, len(labels), remap, max_pixels, labels_as)


def compute_fingerprint(
    parts: Sequence[Part], preprocessing: Preprocessing, arrays: Mapping[str, tuple[str, Sequence[int]]]
) -> str:
    """Return the fingerprint of the images, which is that of the examples of their rows; all ids are in memory.

    arrays: as in the manifest.
    """
    labels: Any = ShardedArray(parts, "labels", *arrays.get("labels", OF_CLASSES))
    ids, digests = [*ShardedIds(parts, are_blocks=False)], [*MappedDigests(parts)]
    return ImageExamples([], digests, np.asarray(labels[:]), ids, preprocessing).fingerprint()


def open_images(
    parts: Sequence[Part],
    facts: Facts,
    preprocessing: Preprocessing,
    num_labels: int,
    remap: np.ndarray | None = None,
    max_pixels: int = MAX_PIXELS,
    labels_as: tuple[str, Sequence[int]] = OF_CLASSES,
) -> MappedImageExamples:
    """Return the images of an index; DataError for an archive that is missing or has another size than it had.

    labels_as: their dtype, and the shape of those of an image; sets of labels are rows of 0 and 1.
    facts: its fingerprint has to depend on the shards, the labels and the preprocessing. remap: (C,) the model's number
    of each class of the shards.
    """
    for part in parts:
        _check_archives(part.shard)
    ids = ShardedIds(parts, are_blocks=False)
    labels: Any = ShardedArray(parts, "labels", *labels_as)
    labels.remap = remap
    return MappedImageExamples(
        MappedPlaces(parts), MappedDigests(parts), labels, ids, preprocessing, num_labels, None, max_pixels, facts=facts
    )


def _check_archives(shard: Shard) -> None:
    """Raise DataError unless the archives of a shard, or its first file, have the sizes that they had."""
    places, sizes = _array(shard, "places"), _array(shard, "path_sizes")
    are_archives = len(places) and places[0, 1] != LOOSE
    for number, size in enumerate(sizes[: len(sizes) if are_archives else 1].tolist()):
        path = Path(_read_text(shard, "path", number))
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; {shard.paths[0]} has its index: prepare another folder"
            ) from None
        if found != size:
            raise DataError(
                f"{path} has {found:,} bytes, {shard.paths[0]} was made when it had {size:,}: prepare another folder"
            )
