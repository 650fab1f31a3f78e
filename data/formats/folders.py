"""A folder of images, with a folder for each class -> rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.row import Row

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini"}  # files that operating systems leave in a folder of pictures


def read_folder(root: Path, image: str, label: str, bad: list[str]) -> list[Row]:
    """Return a row for each image below a folder, sorted by path; the label is the first folder on the way.

    Files that are no images, or in no folder of a class, are added to `bad`. label: "" where there are no classes.
    """
    rows: list[Row] = []
    for path in sorted(_files_below(root), key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        if not _is_utf8(str(relative)):  # it becomes an id, which is written as UTF-8
            bad.append(f"{path!a}: its name is not UTF-8")
        elif path.suffix.lower() not in SUFFIXES:
            bad.append(f"{path}: not an image by its name; those end in {', '.join(sorted(SUFFIXES))}")
        elif label and len(relative.parts) == 1:
            bad.append(f"{path}: in no folder of a class; {root} should have one for each class")
        else:
            values = {image: path, **({label: relative.parts[0]} if label else {})}
            rows.append(Row(relative.as_posix(), len(rows) + 1, values))
    return rows


def _is_utf8(name: str) -> bool:
    """Return whether a file's name is text; Python reads other bytes as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _files_below(root: Path) -> Iterator[Path]:
    """Yield every file but hidden ones and those of LEFT_BY_SYSTEMS. Links are followed, but not in circles."""

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    for name, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folder = Path(name)
        around = {path.resolve() for path in (folder, *folder.parents)}
        folders[:] = [f for f in folders if not f.startswith(".") and (folder / f).resolve() not in around]
        yield from (folder / f for f in files if not f.startswith(".") and f.lower() not in LEFT_BY_SYSTEMS)
