"""Images in .tar archives -> rows. The images are read in place, by their offsets (tar_index.py).

The label of an image is the first folder of its name, as in a folder of images. Where members have a file `.cls` beside
them, or images without a folder a file `.json`, the archive is one of the library webdataset: then the files of an
example share a name up to its first dot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError, ErrorList
from data.formats.folders import (
    as_utf8,
    describe_left_out,
    is_left_behind,
    list_names,
    reason_against,
    split_of,
)
from data.formats.image_kinds import SUFFIXES
from data.formats.tar_index import TarMember, is_archive, read_index
from data.row import Row

CLASS_FILE, JSON_FILE = ".cls", ".json"
MAX_CLASS_FILE, MAX_JSON_FILE = 1 << 12, 1 << 20  # bytes


def find_archives(path: Path) -> list[Path]:
    """Return the archives of a set: the file itself, or those directly in a folder, sorted by name; [] without any."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if is_archive(file) and not file.name.startswith("."))
    return [path] if is_archive(path) else []


def read_archives(
    path: Path, image: str, label: str, errors: ErrorList, labels: Sequence[str] = (), has_sets: bool = False
) -> tuple[list[Row], list[str]]:
    """Return a row for each image of an archive, or of all archives in a folder, and the names of the classes' folders.

    The rows are those of the unpacked folder: sorted by name, which is the id. Where two archives have a member of the
    same name, all ids begin with the name of the archive. label: "" where there are no classes; labels: the declared
    names. has_sets: whether a label is a list or a text with several labels, which files beside the images have, and
    folders do not. Images that cannot be rows are added to `errors`; what else there is is counted in its notes.
    """
    files: list[tuple[str, TarMember]] = []  # (id, member) of all that programs do not leave behind
    folders: set[str] = set()
    left_behind: set[str] = set()
    for archive in find_archives(path):
        index = read_index(archive)
        errors.notes += [f"{archive.name}: {note}" if path != archive else note for note in index.notes]
        folders |= {name.split("/")[0] for name in index.folders}
        files += [
            (name, member) for name, member in index.files.items() if not _is_left_behind(name, labels, left_behind)
        ]
    if len({name for name, _ in files}) < len(files):
        files = [(f"{member.archive.name}/{name}", member) for name, member in files]
        errors.notes.append("several archives have members of the same name: ids begin with the name of the archive")
    files.sort(key=lambda item: item[0].split("/"))
    beside = _Beside(files)
    classes: list[str] = []
    if label and has_sets and not beside.suffix:
        raise DataError(f"{path}: no {CLASS_FILE} or {JSON_FILE} file with the labels beside each image")
    if label and not beside.suffix:
        folders |= {member.name.split("/")[0] for _, member in files if "/" in member.name}
        classes = sorted(name for name in folders if not is_left_behind(name, labels))
        _check_layout(path, classes, [member for _, member in files], labels)
    rows: list[Row] = []
    others = []
    for name, member in files:
        reason = reason_against(member)
        if reason is None:
            others += [] if beside.is_part(member) else [name]
            continue
        values: dict[str, Any] = {image: member}
        if label:
            in_folder = not beside.suffix
            read = _folder_of(member, path) if in_folder else beside.read_label(member, label, has_sets)
            values[label], missing = read
            reason = reason or missing
        rows.append(Row(as_utf8(name), len(rows) + 1, values))
        if reason:
            errors.add(member.archive, rows[-1].line, reason, place=as_utf8(member.name))
    errors.notes += describe_left_out(left_behind, others)
    return rows, classes


def _is_left_behind(name: str, labels: Sequence[str], found: set[str]) -> bool:
    """Return whether a program left a member or a folder of it behind; its name is added to `found`."""
    parts = name.split("/")
    for i, part in enumerate(parts):
        if is_left_behind(part, labels if i == 0 < len(parts) - 1 else ()):
            found.add("/".join(parts[: i + 1]))
            return True
    return False


def _folder_of(member: TarMember, path: Path) -> tuple[str, str]:
    """Return the label that a member's folder is, and the reason where it has none."""
    folder, _, rest = member.name.partition("/")
    return folder, "" if rest else f"in no folder of a class; {path} should have one for each class"


class _Beside:
    """The files that have the labels of images: of the same archive, with the same name up to its first dot."""

    def __init__(self, files: Sequence[tuple[str, TarMember]]):
        members = [member for _, member in files]
        flat = {_key_of(m) for m in members if "/" not in m.name and m.suffix.lower() in SUFFIXES}
        suffixes = {_ending(m) for m in members if _ending(m) == CLASS_FILE or (_key_of(m) in flat)}
        self.suffix = next((suffix for suffix in (CLASS_FILE, JSON_FILE) if suffix in suffixes), "")
        self.members = {_key_of(m): m for m in members if _ending(m) == self.suffix} if self.suffix else {}
        self.keys = {_key_of(m) for m in members if m.suffix.lower() in SUFFIXES} if self.suffix else set()

    def is_part(self, member: TarMember) -> bool:
        """Return whether a member belongs to an image, as its label or a text about it does."""
        return _key_of(member) in self.keys

    def read_label(self, member: TarMember, column: str, has_sets: bool) -> tuple[Any, str]:
        """Return the label of an image and "", or None and the reason why there is none.

        has_sets: whether the label may be a list, and empty.
        """
        file = self.members.get(_key_of(member))
        if file is None:
            return None, f"no {self.suffix} file beside it, as other images have"
        most = MAX_CLASS_FILE if self.suffix == CLASS_FILE else MAX_JSON_FILE
        if file.size > most:
            return None, f"its label {file.name} has {file.size:,} bytes; at most {most:,} are read"
        try:
            with file.open() as stream:
                text = stream.read().decode("utf-8").strip()
            value = text if self.suffix == CLASS_FILE else _column_of(json.loads(text), column)
        except (ValueError, RecursionError) as error:
            return None, f"its label {file.name} cannot be read: {error}"
        if has_sets and isinstance(value, list | str):
            return value, ""
        if isinstance(value, bool | int | float | str) and str(value).strip():
            return str(value), ""
        return None, f"its label in {file.name} is {value!r:.80}" if value else f"its label in {file.name} is empty"


def _column_of(record: Any, column: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"an object is expected, not {record!r:.40}")
    if column not in record:
        raise ValueError(f"no {column!r} (data.label_column) among {list_names([*record]) or 'its columns'}")
    return record[column]


def _ending(member: TarMember) -> str:
    """Return all that follows the key: ".jpg", ".seg.png"."""
    return member.name.removeprefix(_key_of(member)[1]).lower()


def _key_of(member: TarMember) -> tuple[Path, str]:
    """Return what the files of one example share: the archive, and the name up to the first dot of its last part."""
    folder, slash, name = member.name.rpartition("/")
    return member.archive, folder + slash + name.partition(".")[0]


def _check_layout(path: Path, classes: Sequence[str], files: Sequence[TarMember], labels: Sequence[str]) -> None:
    """Raise DataError for an archive whose folders are not classes: the splits of a set, or one folder around all."""
    inner: dict[str, set[str]] = {}  # the folders in each folder
    has_images = set()
    for member in files:
        top, *more = member.name.split("/")
        if len(more) > 1:
            inner.setdefault(top, set()).add(more[0])
        elif more and member.suffix.lower() in SUFFIXES:
            has_images.add(top)
    splits = [name for name in classes if split_of(name) and name not in labels]
    if len(classes) > 1 and [name.lower() for name in splits] == ["train"] and not inner.get(splits[0]):
        splits = []  # a vehicle, among other classes
    if splits:
        raise DataError(
            f"{path}: folders named as splits of a data set, not as classes: {list_names(splits)}; pack each by "
            f"itself, tar -cf {splits[0]}.tar -C {splits[0]} . (a class may be called so if data.labels names all)"
        )
    if len(classes) == 1 and len(inner.get(classes[0], ())) > 1 and not has_images:
        raise DataError(
            f"{path}: the one folder {classes[0]} is not a class: it contains the folders "
            f"{list_names(sorted(inner[classes[0]]))}; pack what is in it, by tar -cf NEW.tar -C {classes[0]} ."
        )
    if not classes and any(member.suffix.lower() in SUFFIXES for member in files):
        raise DataError(
            f"{path}: images, but no folder for each class, and no {CLASS_FILE} or {JSON_FILE} file beside each image"
        )
