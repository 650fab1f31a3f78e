"""Mutated safetensors headers, indexes of shards and config.json files, of a tiny model of each kind."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.tiny_models import config_folder
from support.zoo import ZOO

import models
from faults.mutation import attempt, count, mutate

VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e300, 0.5, "", "x", "\0", [], {}, [1], {"0": "a"}]
VALUES += ["x" * 2_000, ["a"] * 50, {"a": {"b": 1}}, "gelu", "F32", [[1]], [-1], [2**62, 2**62], "../../x"]


def change_value(rng: random.Random, value: Any) -> Any:
    """Return a JSON value in which one member, at any depth, is another value, removed, or has another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.15:
            del changed[key]
        elif kind < 0.3:
            changed[f"{key}x"] = changed.pop(key)
        else:
            changed[key] = change_value(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], change_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def damage_weights(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with a changed header: its bytes, its values, its length, or the data after it."""
    length = struct.unpack("<Q", content[:8])[0]
    header, tensors = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.4:
        header = mutate(rng, header, 2)
    elif kind < 0.85:
        header = json.dumps(change_value(rng, json.loads(header))).encode()
    elif kind < 0.9:
        tensors = tensors[: rng.randrange(len(tensors))]
    elif kind < 0.95:
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1])) + content[8:]
    else:
        return mutate(rng, content, 2)
    return struct.pack("<Q", len(header)) + header + tensors


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Return a JSON file with changed bytes or values."""
    if rng.random() < 0.3:
        return mutate(rng, content)
    return json.dumps(change_value(rng, json.loads(content))).encode()


def run(count_: int, seed: int) -> dict[str, Any]:
    """Change and load `count_` checkpoints: half of them the weights, the others config.json or the index of shards."""
    return count(outcomes(count_, seed))


def outcomes(count_: int, seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        good = {kind: write(Path(name) / kind, kind) for kind in ZOO}
        for i in range(count_):
            kind = rng.choice(list(good))
            folder, files = good[kind]
            file = rng.choice(
                [*["model.safetensors"] * 3, "config.json", "config.json", "model.safetensors.index.json"]
            )
            damage = damage_weights if file == "model.safetensors" else damage_json
            changed = files | {file: damage(rng, files[file])}
            if file.endswith("index.json"):  # of one shard
                changed["a.safetensors"] = changed.pop("model.safetensors")
            for name_, content in changed.items():
                (folder / name_).write_bytes(content)
            head = rng.choice([None, *(name for name in models.ARCHITECTURES[kind].heads if name)])
            yield f"{kind}, {file}, try {i}", attempt(load, folder, head, init(rng))
            for name_ in changed:
                (folder / name_).unlink()


def load(folder: Path, head: str | None, init: str) -> None:
    models.from_pretrained(folder, head=head, init=init)


def init(rng: random.Random) -> str:
    return "pretrained" if rng.random() < 0.8 else "scratch"


def write(folder: Path, kind: str) -> tuple[Path, dict[str, bytes]]:
    """Write a checkpoint; return its folder and the content of its files, with an index of one shard."""
    config_folder(folder, kind)
    model = models.from_pretrained(folder, init="scratch")
    models.save_pretrained(model, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    header = json.loads(files["model.safetensors"][8 : 8 + struct.unpack("<Q", files["model.safetensors"][:8])[0]])
    index = {"weight_map": {name: "a.safetensors" for name in header if name != "__metadata__"}}
    return folder, {**files, "model.safetensors.index.json": json.dumps(index).encode()}
