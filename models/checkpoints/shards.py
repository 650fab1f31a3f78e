"""The files of a sharded checkpoint: of each kind one a rank, which has that rank's pieces of all tensors.

They are what HuggingFaceStorageWriter of torch.distributed.checkpoint writes with save_distributed, under other names:
safetensors files whose header has {tensor: where this file's piece begins} as JSON under DCP_SHARDING_INFO.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.errors import ModelError

OFFSETS, OFFSETS_OF_TENSOR = "DCP_SHARDING_INFO", "saved_offsets"
VERSION = ("DCP_VERSION", "1.0")
PATTERN = re.compile(r"([a-z]+)-shard-(\d{5})-of-(\d{5})\.safetensors")


def name_of(kind: str, number: int, count: int) -> str:
    """Return the name of a file of a kind such as "model"; number: from 1."""
    return f"{kind}-shard-{number:05}-of-{count:05}.safetensors"


def find(folder: Path, kind: str) -> list[Path]:
    """Return the files of a kind in a folder, in order; ModelError unless they are all files of one checkpoint."""
    matches = [match for path in folder.glob(f"{kind}-shard-*") if (match := PATTERN.fullmatch(path.name))]
    if problem := describe_gap(kind, [match[0] for match in matches]):
        raise ModelError(f"{folder} {problem}")
    return sorted(folder / match[0] for match in matches)


def describe_gap(kind: str, names: Sequence[str]) -> str:
    """Return a phrase on which file of a kind is missing from these names, or is of another checkpoint; or ""."""
    matches = [match for name in names if (match := PATTERN.fullmatch(name)) and match[1] == kind]
    counts = {int(match[3]) for match in matches}
    if len(counts) > 1:
        return f"has {kind} shards of two checkpoints, of {min(counts)} and of {max(counts)} ranks"
    wanted = [name_of(kind, number, count) for count in counts for number in range(1, count + 1)]
    missing = [name for name in wanted if name not in names]
    return f"lacks {missing[0]}" if missing else ""


def metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the texts of a header that say where each tensor's piece begins."""
    listed = {key: {OFFSETS_OF_TENSOR: [*begin]} for key, begin in offsets.items()}
    return {OFFSETS: json.dumps(listed), VERSION[0]: VERSION[1], "format": "pt"}
