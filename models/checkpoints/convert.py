"""Convert a pickled checkpoint to safetensors, on request; no other module of the package reads pickles.

    python -m models.checkpoints.convert FOLDER/pytorch_model.bin [...]
    python -m models.checkpoints.convert ORG/NAME

This writes model.safetensors beside the file. For a name of the hub, pytorch_model.bin is first fetched into its cache.
Files are loaded in torch's weights_only mode, which builds tensors and plain containers and executes no code. A file
that needs more is refused.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import hub
from models.errors import ModelError


def convert(source: Path) -> Path:
    """Convert one .bin, .pt or .pth file; return the path of the safetensors file, which must not exist yet.

    A tensor stored under several names (tied weights) is written under the first. Dtypes stay. Raises ModelError for a
    file that cannot be converted or written.
    """
    name = "model.safetensors" if source.name == "pytorch_model.bin" else source.stem + ".safetensors"
    target = source.with_name(name)
    if target.exists():
        raise ModelError(f"{target} exists already; move it away to convert {source.name} again")
    tensors = _plain_tensors(source, _load(source))
    target = Path(os.path.realpath(target))  # a link stays
    temporary = target.with_name(target.name + ".writing")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        shutil.copymode(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise ModelError(f"{target} could not be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _load(source: Path) -> Any:
    if not source.is_file():
        raise ModelError(f"{source}: no such file")
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of many kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{source} has more than tensors, or is damaged; it is refused, and no code in it was executed ({reason})"
        ) from None


def _plain_tensors(source: Path, content: Any) -> dict[str, Tensor]:
    """Return {name: a new tensor}, from a state dict or a checkpoint that has one under "state_dict"."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{source} should have a dictionary of one tensor or more, not a {type(content).__name__}")
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{source}: {name!r} should be a tensor, not a {type(value).__name__}")
        memory = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if memory not in seen or not value.numel():
            seen.add(memory)
            tensors[str(name)] = value.clone().contiguous()
    return tensors


def _is_hub_name(argument: str) -> bool:
    """Return whether an argument is org/name without the ending of a pickle."""
    return argument.count("/") == 1 and argument[0].isalnum() and not argument.endswith((".bin", ".pt", ".pth"))


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    for argument in arguments:
        try:
            source = Path(argument)
            if not source.exists() and _is_hub_name(argument):
                source = hub.fetch_pickle(argument)
            print(f"{source} -> {convert(source)}")
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
