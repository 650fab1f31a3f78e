"""The manifest of a checkpoint: the size and the SHA-256 of each of its files, compared before any of them is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.tokenizers.load import COMPANIONS, FILES
from data.writing import sha256_of, to_json
from models.adapter import FOLDER as ADAPTER
from models.checkpoints import shards
from models.checkpoints.sentence_files import POOLING

SCHEMA = 1
MANIFEST = "manifest.json"
FOLDERS = (ADAPTER, POOLING)  # of a checkpoint, beside its own files
OPTIMIZER, OBJECTIVE = "optimizer.safetensors", "objective.safetensors"
CORE = ("model.safetensors", "config.json", "recipe.toml", "state.json")  # each checkpoint has them
SHARDABLE = {"model.safetensors": "model", OPTIMIZER: "optimizer"}  # may be in shards of this kind instead
MAX_MANIFEST = 1_000_000  # bytes; one has some two thousand, and 300 for each rank of a sharded run
READERS = 8  # files that are compared at a time: a sharded checkpoint has several of many gigabytes
# A reader of a checkpoint also opens files of these names, where they exist.
OPTIONAL = (*FILES, *COMPANIONS, "adapter_config.json", "modules.json", "model.safetensors.index.json")


def seal(folder: Path, written: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Flush every file to the disk, then write and flush the manifest. All files get the mode of the umask.

    written: the entries of files that have been flushed already, by other ranks.
    """
    files = dict(written or {})
    for name in sorted(_names_of(folder) - files.keys()):
        shutil.copymode(folder / "recipe.toml", folder / name)  # Python wrote it; safetensors' have mode 0600
        files[name] = flush(folder / name)
    for name in FOLDERS:
        if (folder / name).is_dir():
            flush_folder(folder / name)
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(to_json({"schema": SCHEMA, "files": files}, indent=2))
        stream.flush()
        os.fsync(stream.fileno())
    flush_folder(folder)


def flush(path: Path) -> dict[str, Any]:
    """Flush a file to the disk; return its entry in the manifest."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def verify(folder: Path, to_resume: bool = False) -> str | None:
    """Return a sentence on what is wrong with a checkpoint, or None.

    Every file is compared with the size and the SHA-256 in the manifest. The manifest has to name all files that a
    checkpoint must have, and each file that a reader would open.
    to_resume: whether the optimizer's state is needed too.
    """
    try:
        manifest = json.loads(_read_regular(folder / MANIFEST))
        if manifest["schema"] != SCHEMA:
            return (
                f"{folder} has checkpoint schema {manifest['schema']!r}, this version reads {SCHEMA}: "
                "use the version that wrote it"
            )
        files = {name: (int(entry["size"]), entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return f"{folder} has no readable {MANIFEST}: the checkpoint is incomplete or damaged"
    for name in (*CORE, *((OPTIMIZER,) if to_resume else ())):
        if problem := _find_gap(name, files):
            return f"{folder / MANIFEST} {problem}: the checkpoint is incomplete or damaged"
    with ThreadPoolExecutor(READERS) as pool:
        problems = pool.map(lambda entry: _compare(folder, entry[0], *entry[1]), files.items())
        if problem := next((problem for problem in problems if problem), ""):
            return problem
    if added := _added_files(folder, files):
        return (
            f"{folder / added[0]} was added after the checkpoint was written, since {MANIFEST} does not name it: "
            "move it away"
        )
    return None


def _find_gap(name: str, files: Collection[str]) -> str:
    """Return a phrase on a file, or a shard of it, that a manifest should name and does not; or ""."""
    if name in files:
        return ""
    kind = SHARDABLE.get(name, "")
    named = [other for other in files if (match := shards.PATTERN.fullmatch(other)) and match[1] == kind]
    return shards.describe_gap(kind, named) if named else f"does not name {name}"


def _compare(folder: Path, name: str, size: int, sha256: str) -> str | None:
    """Return a sentence on how a file differs from what was written, or None."""
    path = folder / name
    if Path(name).name not in {name, *(name.removeprefix(f"{inner}/") for inner in FOLDERS)}:
        return f"{folder / MANIFEST} names {name!r}, which is not a file of its own folder"
    if not path.is_file():
        return f"{path} is not a file" if path.exists() else f"{path} is missing"
    try:
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
        if sha256_of(path) != sha256:
            return f"{path} differs from what was written (sha256)"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def _added_files(folder: Path, files: dict[str, tuple[int, str]]) -> list[str]:
    """Return the names of files that a reader of the checkpoint would open, and that its manifest does not have."""
    names = _names_of(folder) - files.keys()
    return sorted(name for name in names if Path(name).name in OPTIONAL or name.endswith(".safetensors"))


def _names_of(folder: Path) -> set[str]:
    """Return the names of all files of a checkpoint, those in FOLDERS with their folder."""
    own = {path.name for path in folder.iterdir() if path.name not in FOLDERS}
    inner = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    return own | {f"{path.name}/{file.name}" for path in inner for file in path.iterdir()}


def _read_regular(path: Path) -> str:
    """Return the text of a small file; OSError for any other, such as a pipe, which would wait for a writer."""
    if not path.is_file() or path.stat().st_size > MAX_MANIFEST:
        raise FileNotFoundError(path)
    return path.read_text(encoding="utf-8")


def flush_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
