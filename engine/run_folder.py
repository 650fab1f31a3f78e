"""The run folder on the disk: its lock, what a crash leaves in it, and how one checkpoint replaces another."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

from data.writing import WRITING
from engine.config import ConfigError
from engine.manifest import flush_folder

BEST, LAST, PREVIOUS = "best", "last", "previous"
SUMMARY = "summary.txt"  # what was said before the first step, in full
RESUMED = "\nresumed from step "  # begins what a resumed run adds to it
OLD, DAMAGED = ".old-", "damaged"  # names that only a crash leaves behind, like WRITING


def lock(folder: Path, stack: ExitStack) -> None:
    """Lock and repair a folder, created if need be, until the stack is closed; ConfigError where another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(folder / ".lock") and not (folder / ".lock").is_file():
        raise OSError(errno.EINVAL, "its .lock is not a regular file")  # a pipe would wait for a reader
    lock = stack.enter_context((folder / ".lock").open("a"))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        # lockf, not flock: a loader's worker that outlives a killed run for seconds does not inherit it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat()):
            raise OSError  # its owner has removed it since it was opened, and another run has created a new one
    except OSError:
        raise ConfigError(f"run.folder = {str(folder)!r} is in use by another run: choose another folder") from None
    stack.callback(remove_if_empty, folder)
    recover(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that wrote nothing, because its recipe or its data had an error."""
    with suppress(OSError):  # a link to a folder, or one that cannot be written any more
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def recover(folder: Path) -> None:
    """Undo the unfinished save of a process that died; the lock, which this process has, proves that it died."""
    for old in folder.glob(f"{OLD}*"):
        if not (new := folder / old.name.removeprefix(OLD)).exists():
            old.rename(new)
    unfinished = (*folder.glob(f"{WRITING}*"), *folder.glob(f"best*/{WRITING}*"))  # a model card is written into best/
    for leftover in (*folder.glob(f"{OLD}*"), *unfinished):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder, or a link to one, or a file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def replace(temporary: Path, target: Path, keep_previous: bool) -> None:
    """Rename `temporary` to `target`. After a crash between the two renames, recover finds the old checkpoint."""
    previous = target.with_name(PREVIOUS)
    old = previous if target.name == LAST and keep_previous else target.with_name(f"{OLD}{target.name}")
    exists = os.path.lexists(target)  # a link that leads nowhere, too
    if exists:
        remove(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if exists:
            old.rename(target)
        raise
    flush_folder(target.parent)
    if old != previous:
        remove(old)
    if target.name == LAST and not keep_previous:  # of a run that kept it
        remove(previous)
