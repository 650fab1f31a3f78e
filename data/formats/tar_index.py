"""The members of a .tar archive, found by its headers alone, and their bytes, read in place by offset.

Nothing is unpacked, and no name of a member is ever used as a path. A header may claim anything: what is read of one
member's headers is limited, and no seek goes back.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data.errors import DataError
from data.notes import count_of

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
PACKED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\x03\x04")
BLOCK = tarfile.BLOCKSIZE
MAX_HEADERS = 1 << 15  # bytes of one member's headers; a long name and attributes need a few thousand
MAX_NAME = 4_096  # bytes, as Linux allows in a path
MAX_GLOBAL = 1_000  # attributes that the archive gives to all its members
BUFFER = 1 << 16
# Kinds of members that are left out, as the notes call them.
OUTSIDE, LONG_NAMED, SPECIAL, SYMBOLIC, DANGLING, SPARSE = (
    "absolute names or with ..",
    f"names of more than {MAX_NAME:,} bytes",
    "devices, pipes or unknown kinds",
    "symbolic links (tar --dereference packs the files)",
    "links to files that the archive does not have before",
    "sparse files (tar without --sparse packs all their bytes)",
)
NOTE_OF_END = "no mark of the end, which a complete archive has: members may be missing after the last one"


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside a .tar archive; like a Path, it can be opened and names itself."""

    archive: Path
    name: str  # without "./" at its start
    offset: int  # of its first byte in the archive
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def is_file(self) -> bool:
        """Return true: only regular files are members."""
        return True

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Return the content as a stream of its own, so that threads and processes can read at the same time."""
        return io.BufferedReader(_Section(self), BUFFER)


class _Section(io.RawIOBase):
    """The bytes of a member, read at their offset without a position that others could move."""

    def __init__(self, member: TarMember):
        self._descriptor = os.open(member.archive, os.O_RDONLY)
        self._begin, self._size, self._position = member.offset, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._descriptor, [view], self._begin + self._position) if len(view) else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


@dataclass
class TarIndex:
    """What an archive has: its files by name, the names of its folders, and what is to be said about it."""

    files: dict[str, TarMember] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)  # {kind: count}
    num_replaced: int = 0  # members that another of the same name follows
    notes: list[str] = field(default_factory=list)


class _HeaderError(Exception):
    """A header that no program writes."""


class _Headers:
    """The file object from which tarfile reads headers: few bytes at a time, and never backwards."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.left, self.position = stream, MAX_HEADERS, 0

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; _HeaderError for more than the headers of a member may have."""
        if not 0 <= size <= self.left:
            raise _HeaderError(f"headers of more than {MAX_HEADERS:,} bytes")
        self.left -= size
        content = self.stream.read(size)
        self.position += len(content)
        return content

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if position < self.position - 1:
            raise _HeaderError("a size below 0")
        self.position = self.stream.seek(position)


def is_archive(path: Path) -> bool:
    """Return whether a name ends as those of .tar archives, plain or compressed."""
    return path.name.lower().endswith((SUFFIX, *COMPRESSED))


def read_index(path: Path) -> TarIndex:
    """Return the members of an archive, from its headers alone.

    - Of several members of one name the last counts, as in unpacking. A hard link is the file that it names.
    - Left out and counted: devices, symbolic links, sparse files, absolute names, names with "..".

    DataError for a file that is no plain .tar archive, or is damaged or incomplete.
    """
    index = TarIndex()
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):  # not what follows a header
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            _check_start(path, stream)
            _read_members(path, stream, index)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if index.num_replaced:
        index.notes.append(
            f"left out {count_of(index.num_replaced, 'member')} that a later one of the same name replaces"
        )
    for kind, count in index.left_out.items():
        index.notes.append(f"left out {count_of(count, 'member')} of the archive: {kind}")
    return index


def _check_start(path: Path, stream: BinaryIO) -> None:
    start = stream.read(BLOCK)
    stream.seek(0)
    if path.name.lower().endswith(COMPRESSED) or start.startswith(PACKED_STARTS):
        raise DataError(
            f"{path}: a compressed archive, in which no image can be read by its place; unpack it with tar -xf, and "
            "name the folder, or pack it again without compression (images hardly shrink)"
        )
    if not start:
        raise DataError(f"{path}: an empty file")


def _read_members(path: Path, stream: BinaryIO, index: TarIndex) -> None:
    headers, size = _Headers(stream), os.fstat(stream.fileno()).st_size
    place = 0  # of the header that is read
    try:
        archive = tarfile.TarFile(fileobj=headers, mode="r", errorlevel=0)  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0 or len(archive.pax_headers) > MAX_GLOBAL:
                raise _HeaderError(
                    "a size below 0" if member.size < 0 else f"more than {MAX_GLOBAL:,} attributes of all"
                )
            if member.isreg() and member.offset_data + (0 if member.issparse() else member.size) > size:
                needed = f"{member.name[:MAX_NAME]} ends at byte {member.offset_data + member.size:,}"
                raise DataError(f"{path}: incomplete: {needed}, and the file has {size:,}")
            _add(path, member, index)
            place, headers.left = archive.offset, MAX_HEADERS
        place = archive.offset
    except (tarfile.TarError, _HeaderError, ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(_describe_damage(path, place, str(error))) from None
    _check_end(path, stream, place, index)


def _describe_damage(path: Path, place: int, reason: str) -> str:
    what = f"damaged after byte {place:,}" if place else "not a .tar archive, by its first bytes"
    return f"{path}: {what}: {reason}"


def _add(path: Path, member: tarfile.TarInfo, index: TarIndex) -> None:
    """Add a member to the index, or to what is left out."""
    parts = member.name.split("/")
    name = _clean(member.name)
    target = index.files.get(_clean(member.linkname)) if member.islnk() else None
    if member.isdir():
        index.folders |= {name} if name and ".." not in parts and len(name) <= MAX_NAME else set()
        return
    kind = ""
    if member.name.startswith("/") or ".." in parts or not name:
        kind = OUTSIDE
    elif len(name) > MAX_NAME:
        kind = LONG_NAMED
    elif member.issym():
        kind = SYMBOLIC
    elif member.islnk() and target is None:
        kind = DANGLING
    elif member.issparse():
        kind = SPARSE
    elif not member.isreg() and target is None:
        kind = SPECIAL
    if kind:
        index.left_out[kind] += 1
        return
    index.num_replaced += name in index.files
    place = (member.offset_data, member.size) if target is None else (target.offset, target.size)
    index.files[name] = TarMember(path, name, *place)


def _clean(name: str) -> str:
    """Return a name without "." and empty parts."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _check_end(path: Path, stream: BinaryIO, place: int, index: TarIndex) -> None:
    """Check that the headers ended as an archive does: with zeros, and nothing behind them."""
    stream.seek(place)
    block = stream.read(BLOCK)
    if not block:
        index.notes.append(NOTE_OF_END)
    elif block.strip(b"\0"):
        incomplete = len(block) < BLOCK
        raise DataError(
            _describe_damage(path, place, "an incomplete header" if incomplete else "no header of a member")
        )
    elif stream.read(BUFFER).strip(b"\0"):
        raise DataError(
            f"{path}: more follows the end at byte {place:,}, as where archives were joined by cat; tar --concatenate "
            "joins them, and a folder of archives is read as one"
        )
