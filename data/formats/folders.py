"""A folder of images, with a folder for each class -> rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.errors import DataError, ErrorList
from data.formats.image_kinds import (
    SUFFIXES,
    UNREAD_SUFFIXES,
    describe_unread,
    is_image_start,
    read_head,
    unread_kind,
)
from data.formats.tar_index import TarMember
from data.notes import list_some
from data.row import Row

# What operating systems, cameras' and editors' programs leave in a folder of pictures. Hidden names are left out too.
LEFT_BEHIND = re.compile(
    r"\..*|.*~|@eadir|__macosx|lost\+found|\$recycle\.bin|system volume information|#recycle|[_@]?(thumbs|thumbnails?)|"
    r"(eh)?thumbs\.db|desktop\.ini|icon\r|.*\.(bak|tmp|part|crdownload)|.*:zone\.identifier",
    re.IGNORECASE,
)
# Names of folders that hold a split of a data set, as train, Training, test_set, seg_train and val2017.
SPLIT = re.compile(
    r"((data(set)?|seg|images?|imgs?|split)[ ._-]*)?"
    r"((?P<train>train(ing)?)|(?P<validation>val(id(ation)?)?|dev(elopment)?|eval(uation)?)|(?P<test>test(ing)?|holdout))"
    r"([ ._-]*(set|data(set)?|images?|imgs?|split|[0-9]+))?",
    re.IGNORECASE,
)
LISTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # which the Hugging Face hub puts beside images
SHOWN = 5  # names in a note


def read_folder(root: Path, image: str, label: str, errors: ErrorList, labels: Sequence[str] = ()) -> list[Row]:
    """Return a row for each image below a folder, sorted by path; the label is the first folder on the way.

    Ids are the paths below `root`. Images that cannot be rows are added to `errors`. Other files and the folders that
    programs leave behind are counted in its notes. label: "" where there are no classes. labels: the declared names,
    which are folders of classes whatever they are called.
    """
    if label:
        check_layout(root, labels)
    files, left_behind = _list_files(root, labels)
    if label:
        _check_flat(root, files)
    rows: list[Row] = []
    others = []
    for path in sorted(files, key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        reason = reason_against(path)
        if reason is None:
            others.append(relative.as_posix())
            continue
        line = len(rows) + 1
        if not reason and label and len(relative.parts) == 1:
            reason = f"in no folder of a class; {root} should have one for each class"
        rows.append(
            Row(as_utf8(relative.as_posix()), line, {image: path, **({label: relative.parts[0]} if label else {})})
        )
        if reason:
            errors.add(root, line, reason, place=rows[-1].id)
    errors.notes += describe_left_out(left_behind, others)
    return rows


def describe_left_out(left_behind: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return notes on the names that are no images: what programs leave behind, and other files."""
    kinds = {"which programs leave behind": left_behind, "without the name or content of an image": others}
    return [
        f"left out {_count(len(names), meaning)}: {list_names(names)}"
        for meaning, names in ((meaning, sorted(names)) for meaning, names in kinds.items())
        if names
    ]


def class_folders(root: Path, labels: Sequence[str] = ()) -> list[str]:
    """Return the names of the folders of classes in `root`, sorted."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from None
    return sorted(name for name in names if not is_left_behind(name, labels))


def check_layout(root: Path, labels: Sequence[str] = ()) -> None:
    """Raise DataError for a folder whose folders are the splits of a data set, or whose classes contain them."""
    folders = class_folders(root, labels)
    splits = [name for name in folders if split_of(name) and name not in labels]
    others = [name for name in folders if name not in splits]
    if others and [name.lower() for name in splits] == ["train"] and not class_folders(root / splits[0]):
        splits = []  # a vehicle, among other classes
    if splits:
        has_classes = others and not any(split_of(name) == "train" for name in splits)
        beside = f"; move {'it' if len(splits) == 1 else 'them'} out of {root}" if has_classes else ""
        raise DataError(
            f"{root}: {_are('folder', splits)} named as a split of a data set, not as a class: "
            f"{name_splits(root, splits)}{beside} (a class may be called so if data.labels names all classes)"
        )
    inner = {name.lower() for folder in folders for name in class_folders(root / folder) if split_of(name)}
    if len({split_of(name) for name in inner}) > 1:
        if len(folders) == 1:
            raise DataError(f"{root}: the one folder {folders[0]} is not a class{hint_at_nested(root, folders[0], '')}")
        raise DataError(
            f"{root}: the folders of classes contain the splits {', '.join(sorted(inner))}, "
            "which would be read as one; make a folder for each split with the classes in it, or list the images of "
            "each split in a .csv file"
        )


def split_of(name: str) -> str:
    """Return train, validation or test for the name of a folder of that split; "" for any other name."""
    match = SPLIT.fullmatch(name)
    return next((split for split, found in match.groupdict().items() if found), "") if match else ""


def name_splits(root: Path, splits: Sequence[str]) -> str:
    """Return the settings that read the folders of a data set's splits."""
    order = ("train", "validation", "test")
    by_split = sorted(splits, key=lambda name: (order.index(split_of(name)), name))
    return ", ".join(f"data.{split_of(name)} = {root / name}" for name in by_split)


def hint_at_nested(root: Path, folder: str, setting: str) -> str:
    """Return what to set if a folder of `root` contains those of the classes; else "". setting: that of `root`."""
    within = root / folder
    inner = class_folders(within) if within.is_dir() else []
    if len(inner) < 2 or any(map(_is_image, within.iterdir())):
        return ""
    splits = [name for name in inner if split_of(name)]
    if splits:
        return f"; {within} contains the splits of a data set: {name_splits(within, splits)}"
    return f"; {within} contains the folders {list_names(inner)}: if these are the classes, {setting} = {within}"


def list_names(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    return as_utf8(list_some(names, SHOWN))


def _are(noun: str, names: Sequence[str]) -> str:
    return f"the {noun} {names[0]} is" if len(names) == 1 else f"the {noun}s {', '.join(names)} are"


def _count(number: int, meaning: str) -> str:
    return f"1 entry {meaning}" if number == 1 else f"{number:,} entries {meaning}"


def _check_flat(root: Path, files: Sequence[Path]) -> None:
    """Raise DataError for a folder of images without a folder for a class."""
    if class_folders(root) or not any(_is_image(path) for path in files):
        return
    lists = [name for name in LISTS if (root / name).is_file()]
    way_on = f"data.train = {root / lists[0]} and data.text_column = file_name read the list there" if lists else ""
    raise DataError(
        f"{root}: images, but no folder for each class; "
        + (way_on or "make one for each, or list the images and their labels in a .csv file")
    )


def is_left_behind(name: str, labels: Sequence[str] = ()) -> bool:
    """Return whether a name is one that programs leave behind; labels: names that are classes."""
    return LEFT_BEHIND.fullmatch(name) is not None and name not in labels


def _is_image(path: Path) -> bool:
    return path.is_file() and reason_against(path) == ""


def reason_against(path: Path | TarMember) -> str | None:
    """Return "" for an image by its name or content, None for another file, else why the image cannot be read."""
    suffix = path.suffix.lower()
    if as_utf8(str(path)) != str(path):
        return "its name is not UTF-8"
    if suffix in SUFFIXES:
        return ""
    if not path.is_file():  # a pipe would wait for a writer
        return None
    try:
        head = read_head(path)
        if suffix in UNREAD_SUFFIXES and (head.startswith((b"II", b"MM")) or not is_image_start(head)):
            return describe_unread(path)
        return "" if is_image_start(head) else describe_unread(path) if unread_kind(head) else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def as_utf8(name: str) -> str:
    """Return a name as text that can be written as UTF-8; Python reads other bytes as halves of surrogate pairs."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _list_files(root: Path, labels: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return every file below a folder, and the paths below it that programs leave behind.

    Links are followed, but not in circles.
    """

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    found: list[Path] = []
    left_behind: list[str] = []
    for name, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folder = Path(name)
        declared = labels if folder == root else ()
        around = {path.resolve() for path in (folder, *folder.parents)}
        left_behind += [(folder / f).relative_to(root).as_posix() for f in folders if is_left_behind(f, declared)]
        left_behind += [(folder / f).relative_to(root).as_posix() for f in files if is_left_behind(f)]
        folders[:] = [f for f in folders if not is_left_behind(f, declared) and (folder / f).resolve() not in around]
        found += [folder / f for f in files if not is_left_behind(f)]
    return found, left_behind
