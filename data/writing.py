"""Writing of files: whole or not at all, through links, into devices and pipes; and of JSON without NaN.

Commands write all their files by these functions, except those of a checkpoint, whose folder is renamed as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

WRITING = ".writing-"  # how the names of unfinished files and folders begin
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}  # how texts are written
MAX_LINKS = 40  # as of the Linux kernel


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces it once the block has ended without an error.

    A link stays, and the file that it points to is replaced. The new file has the mode of the umask, whatever wrote it.
    Raises OSError. The temporary file is removed in every case in which the process lives on.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{WRITING}{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)  # some libraries write a file of mode 0600 in its place
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write texts one after another in UTF-8: a regular file as a whole, a device, pipe or descriptor as it is.

    A lone surrogate becomes an escape, such as \\ud800, which means the same in a string of JSON. Raises OSError.
    """
    if is_stream(path):
        with open_stream(path) as stream:
            stream.writelines(parts)
    else:
        with replace_file(path) as temporary, temporary.open("w", **TEXT) as stream:
            stream.writelines(parts)


@contextmanager
def open_stream(path: Path) -> Iterator[TextIO]:
    """Open a device, pipe or descriptor to write texts into, as write_text does."""
    sys.stdout.flush()  # which may be the same file
    descriptor = _find_descriptor(path)
    with open(path if descriptor is None else os.dup(descriptor), "w", **TEXT) as stream:
        yield stream


def is_stream(path: Path) -> bool:
    """Return whether a path leads to a device, a pipe or an open descriptor, whose name no other file may take."""
    return _find_descriptor(path) is not None or (path.exists() and not path.is_file() and not path.is_dir())


def is_same_stream(path: Path, stream: TextIO) -> bool:
    """Return whether a path leads to the file, pipe or terminal that `stream` is open on."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except (OSError, ValueError):  # not there, closed, or not a file of the system
        return False


def _find_descriptor(path: Path) -> int | None:
    """Return the descriptor that a path such as /dev/stdout stands for; None of any other path.

    It is written through a copy: opened by its name, a file would be written from its beginning again.
    """
    own = (Path("/dev/fd"), Path(f"/proc/{os.getpid()}/fd"))
    for _ in range(MAX_LINKS):
        if path.name.isdecimal() and Path(os.path.realpath(path.parent)) in own:
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Any, **options: Any) -> str:
    """Return a value as JSON, with null for NaN and the infinities, which JSON does not have.

    options: those of json.dumps.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
