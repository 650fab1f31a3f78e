"""Read and write the hub's weight files through one declarative table per architecture.

A row pairs a name of ours with a name in the file; `{i}` stands for the layer number. The same table is read in both
directions, so that what is exported is what was imported. Everything in a file is either a row, listed as ignorable, or
an error: nothing is skipped in silence.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.errors import ModelError


@dataclass(frozen=True)
class Row:
    """One tensor, ours <-> theirs. All of a `group` is in the file or none of it; "backbone" must be."""

    ours: str
    theirs: str
    group: str = "backbone"


@dataclass(frozen=True)
class Table:
    model_type: str  # config.json's model_type
    prefix: str  # may stand before every name of the file, e.g. "bert."
    rows: tuple[Row, ...]
    unprefixed: tuple[str, ...] = ()  # names that never carry the prefix (the classifier)
    renamed: tuple[tuple[str, str], ...] = ()  # legacy endings -> today's
    ignored: tuple[str, ...] = ()  # patterns of tensors that may be there and are not read

    def current_name(self, name: str) -> str:
        """A name of the file without prefix and in today's spelling."""
        name = name.removeprefix(self.prefix)
        for legacy, current in self.renamed:
            if name.endswith(legacy):
                name = name.removesuffix(legacy) + current
        return name

    def row_of(self, ours: str) -> tuple[str, str]:
        """(name in the file without prefix, group) of a parameter of ours."""
        number = re.search(r"\.(\d+)\.", ours)
        generic = ours.replace(f".{number[1]}.", ".{i}.", 1) if number else ours
        for row in self.rows:
            if row.ours == generic:
                return (row.theirs.replace("{i}", number[1]) if number else row.theirs), row.group
        raise KeyError(f"{ours} has no row in the {self.model_type} WEIGHTS table")

    def exported_name(self, ours: str, with_prefix: bool) -> str:
        name, _ = self.row_of(ours)
        return self.prefix + name if with_prefix and not name.startswith(self.unprefixed) else name

    def knows(self, current_name: str, num_layers: int) -> bool:
        """Does some row, or the ignorable list, name this tensor of the file?"""
        number = re.search(r"\.(\d+)\.", current_name)
        if number and int(number[1]) >= num_layers:
            return False
        generic = current_name.replace(f".{number[1]}.", ".{i}.", 1) if number else current_name
        return any(generic == row.theirs for row in self.rows) or self.ignorable(current_name)

    def ignorable(self, current_name: str) -> bool:
        return any(re.fullmatch(pattern, current_name) for pattern in self.ignored)


@dataclass
class LoadReport:
    """What happened to every tensor; names are the file's, except `initialised`, which are ours."""

    source: str
    loaded: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        lines = [
            f"weights: {self.source}",
            f"  loaded       {len(self.loaded)} tensors, {self.parameters:,} parameters",
        ]
        for what, names in (("renamed", self.renamed), ("initialised", self.initialised), ("ignored", self.ignored)):
            if names:
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"  {what:<12} {len(names)}: {shown}")
        return "\n".join(lines)


class TensorFiles:
    """The tensors of model.safetensors, or of the shards its index lists, memory-mapped and read by name."""

    def __init__(self, folder: Path, stack: ExitStack):
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").is_file():
            names = ["model.safetensors"]
        elif index.is_file():
            names = self._shards(index)
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            hint = (
                f" (it has {pickled[0]}, a pickle, which is never loaded: convert it to safetensors)" if pickled else ""
            )
            raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
        self.where: dict[str, Any] = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{folder / name} is not a complete safetensors file: {error}") from None
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key in self.where:
                    raise ModelError(f"{folder}: tensor {key!r} is in more than one shard")
                self.where[key] = file

    @staticmethod
    def _shards(index: Path) -> list[str]:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: not a safetensors index: {error}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"{index}: shard name {name!r} must be a plain file name")
            if not (index.parent / name).is_file():
                raise ModelError(f"{index}: shard {name} is missing")
        return names

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.where[key].get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        return self.where[key].get_tensor(key)


def has_group(folder: Path, table: Table, group: str) -> bool:
    """Does the file hold any tensor of this group (a head, a pooler)?"""
    theirs = {row.theirs for row in table.rows if row.group == group}
    with ExitStack() as stack:
        return any(table.current_name(key) in theirs for key in TensorFiles(folder, stack).where)


@torch.no_grad()
def load(model: nn.Module, table: Table, folder: Path, *, num_layers: int, reset: tuple[str, ...] = ()) -> LoadReport:
    """Copy the file's tensors into `model`, one at a time, raising fp16 and bf16 to the parameter's dtype.

    `reset` names groups to leave as initialised even where the file has them. Raises ModelError for a missing backbone
    tensor, a half-present head, a shape that differs, a tensor nobody knows, and a file of which nothing fits.
    """
    report = LoadReport(str(folder))
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        files = TensorFiles(folder, stack)
        in_file: dict[str, str] = {}
        for key in files.where:
            current = table.current_name(key)
            if current in in_file:
                raise ModelError(f"{folder}: {key!r} and {in_file[current]!r} are the same tensor under two names")
            in_file[current] = key
        wanted = {ours: table.row_of(ours) for ours in parameters}
        absent = _check_names(wanted, in_file, table, folder, num_layers, reset)
        for ours, (theirs, group) in wanted.items():
            if group in absent:
                report.initialised.append(ours)
                continue
            key = in_file[theirs]
            if files.shape(key) != tuple(parameters[ours].shape):
                raise ModelError(_shape_message(folder, key, files.shape(key), tuple(parameters[ours].shape), group))
            parameters[ours].copy_(files.read(key))
            report.loaded.append(key)
            report.parameters += parameters[ours].numel()
            if not key.endswith(theirs):
                report.renamed.append(f"{key} -> {theirs}")
    used = {wanted[ours][0] for ours in parameters if wanted[ours][1] not in absent}
    report.ignored = [key for current, key in in_file.items() if current not in used]
    return report


def _check_names(
    wanted: dict[str, tuple[str, str]],
    in_file: dict[str, str],
    table: Table,
    folder: Path,
    num_layers: int,
    reset: tuple[str, ...],
) -> set[str]:
    """The groups to initialise, after every name has been accounted for."""
    if not any(theirs in in_file for theirs, _ in wanted.values()):
        few = ", ".join(list(in_file.values())[:3]) or "the file is empty"
        raise ModelError(
            f"{folder}: none of its {len(in_file)} tensors belongs to a {table.model_type} model ({few} ...)"
        )
    strange = [key for name, key in in_file.items() if not table.knows(name, num_layers)]
    missing: dict[str, list[str]] = {}
    for theirs, group in wanted.values():
        if theirs not in in_file and group not in reset:
            missing.setdefault(group, []).append(theirs)
    if strange or "backbone" in missing:
        raise ModelError(_names_message(folder, table, missing.get("backbone", []), strange, list(in_file)))
    for group, names in missing.items():
        if any(theirs in in_file for theirs, g in wanted.values() if g == group):
            raise ModelError(
                f"{folder}: half of the {group} is missing ({', '.join(names)}); "
                "--model.head_init reset starts a new head"
            )
    return set(missing) | set(reset)


def _names_message(folder: Path, table: Table, missing: list[str], strange: list[str], have: list[str]) -> str:
    def listed(names: list[str], candidates: list[str]) -> Iterator[str]:
        for name in names[:5]:
            close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
            yield f"{name} (nearest: {close[0]})" if close else name
        if len(names) > 5:
            yield f"and {len(names) - 5} more"

    parts = []
    if missing:
        parts.append(f"misses {len(missing)} tensors of the backbone: " + ", ".join(listed(missing, have)))
    if strange:
        known = [row.theirs for row in table.rows]
        parts.append(f"has {len(strange)} tensors unknown to {table.model_type}: " + ", ".join(listed(strange, known)))
    return f"{folder} " + " and ".join(parts)


def _shape_message(folder: Path, key: str, theirs: tuple[int, ...], ours: tuple[int, ...], group: str) -> str:
    hint = (
        "; --model.head_init reset starts a new head" if group != "backbone" else "; config.json and the file disagree"
    )
    return f"{folder}: {key} has shape {list(theirs)}, the model needs {list(ours)}{hint}"


def export(model: nn.Module, table: Table, with_prefix: bool) -> dict[str, Tensor]:
    """The parameters under the hub's names, detached, contiguous, on the CPU."""
    return {
        table.exported_name(ours, with_prefix): parameter.detach().contiguous().cpu()
        for ours, parameter in model.named_parameters()
    }
