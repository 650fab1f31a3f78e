"""Read and write the hub's weight files through one declarative table per architecture.

A row pairs a name of ours with a name in the file; `{i}` stands for the layer number. The same table is read in both
directions, so that an export has the names that were imported. Everything in a file is either in a row, listed as
ignorable, or an error: nothing is skipped in silence.

A head without rows in the table (one of a researcher's own) is saved under its own names, "head.x". So is the backbone
of a table without any rows, "backbone.x".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoints.tensor_files import TensorFiles
from models.errors import ModelError

REQUIRED = ("backbone", "decoder")  # groups of rows that are never initialised in silence


@dataclass(frozen=True)
class WeightRow:
    """One tensor, ours <-> theirs. A file has all rows of a `group` or none of them; it must have those of REQUIRED."""

    ours: str
    theirs: str
    group: str = "backbone"  # or "decoder"; "head", or a part of a head that a file may have without it ("pooler")
    transpose: bool = False  # the file has it transposed (GPT-2's Conv1D)
    untied: str = ""  # a second name, which takes precedence where the file has it: in files whose output is untied


def linear(ours: str, theirs: str, group: str = "backbone", transpose: bool = False) -> tuple[WeightRow, WeightRow]:
    """Return the two rows of a module with a weight and a bias; `transpose` is for the weight."""
    weight = WeightRow(f"{ours}.weight", f"{theirs}.weight", group, transpose)
    return weight, WeightRow(f"{ours}.bias", f"{theirs}.bias", group)


@dataclass(frozen=True)
class WeightTable:
    """The names of all tensors of one model_type."""

    model_type: str  # config.json's model_type
    prefix: str = ""  # may stand before every backbone name of the file, e.g. "bert."
    rows: tuple[WeightRow, ...] = ()  # the backbone; empty: its own names
    heads: Mapping[str, tuple[WeightRow, ...]] = field(default_factory=dict)  # head -> its rows, named head.* in ours
    tied: Mapping[str, str] = field(default_factory=dict)  # second name of a tensor -> its first; a file may lack it
    renamed: tuple[tuple[str, str], ...] = ()  # legacy endings -> today's
    ignored: tuple[str, ...] = ()  # patterns of tensors that a file may have and that are not read
    prefixed: tuple[str, ...] | None = None  # the heads whose files have the prefix; None: all of them

    def current_name(self, name: str) -> str:
        """Return a name of the file without prefix and in today's spelling."""
        name = name.removeprefix(self.prefix)
        for legacy, current in self.renamed:
            if name.endswith(legacy):
                name = name.removesuffix(legacy) + current
        return name

    def row_of(self, ours: str, head: str | None) -> WeightRow:
        """Return the row of a parameter of ours, its `{i}` filled in."""
        number = re.search(r"\.(\d+)\.", ours)
        generic = ours.replace(f".{number[1]}.", ".{i}.", 1) if number else ours
        for row in (*self.rows, *self.heads.get(head or "", ())):
            if row.ours == generic:
                return replace(row, theirs=row.theirs.replace("{i}", number[1])) if number else row
        if ours.startswith("head.") and head not in self.heads:
            return WeightRow(ours, ours, "head")
        if ours.startswith("backbone.") and not self.rows:
            return WeightRow(ours, ours)
        raise KeyError(f"{ours} has no row in the {self.model_type} WEIGHTS table")

    def exported_name(self, ours: str, head: str | None) -> str:
        """Return the hub's name of a parameter of ours, in the file of a model with this head (None: no prefix)."""
        row = self.row_of(ours, head)
        prefixed = head is not None and (self.prefixed is None or head in self.prefixed)
        return self.prefix + row.theirs if prefixed and row.group != "head" else row.theirs

    def knows(self, current_name: str, built: set[str], drop_from: int | None) -> bool:
        """Return whether the table accounts for a tensor of the file that this model does not read.

        It may belong to a head or a group that is not built or to a layer from `drop_from` on, be a second name, or be
        ignorable.
        """
        number = re.search(r"\.(\d+)\.", current_name)
        generic = current_name.replace(f".{number[1]}.", ".{i}.", 1) if number else current_name
        deep = number is not None and drop_from is not None and int(number[1]) >= drop_from
        return (
            any(row.theirs in (generic, current_name) and (deep or row.group not in built) for row in self.rows)
            or (deep and not self.rows)
            or any(current_name == row.theirs for rows in self.heads.values() for row in rows)
            or current_name in self.tied
            or any(re.fullmatch(pattern, current_name) for pattern in self.ignored)
        )


@dataclass
class LoadReport:
    """What happened to every tensor. Names are those of the file, except `initialised`, which has ours."""

    source: str
    loaded: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)  # a second name of a tensor that was loaded under its first
    initialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        lines = [
            f"weights: {self.source}",
            f"  loaded       {len(self.loaded)} tensors, {self.parameters:,} parameters",
        ]
        for what in ("renamed", "tied", "initialised", "ignored"):
            if names := getattr(self, what):
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"  {what:<12} {len(names)}: {shown}")
        return "\n".join(lines)


def has_head(files: TensorFiles, table: WeightTable, head: str) -> bool:
    """Return whether the file has any tensor of this head. (A pooler alone does not count: every BERT has one.)"""
    theirs = {row.theirs for row in table.heads[head] if row.group == "head"}
    return any(table.current_name(key) in theirs for key in files.where)


def is_tied(files: TensorFiles, table: WeightTable, head: str) -> bool:
    """Return whether the head's output matrix is the embedding: unless the file has both, and they differ."""
    decoder = table.row_of("head.decoder.weight", head).theirs
    keys = {table.current_name(key): key for key in files.where}
    if decoder not in keys:
        return True
    if head not in table.heads:  # under its own names, which a tied matrix does not have
        return False
    embedding = keys.get(table.tied.get(decoder, ""))
    if embedding is None:
        return True
    matrices = files.read(keys[decoder]), files.read(embedding)
    return matrices[0].dtype == matrices[1].dtype and torch.equal(*matrices)


@torch.no_grad()
def load(
    model: nn.Module,
    table: WeightTable,
    files: TensorFiles,
    *,
    head: str | None,
    reset: bool = False,
    drop_from: int | None = None,
    own_head: bool = False,
) -> LoadReport:
    """Read the tensors of the files into `model`, one at a time, raising fp16 and bf16 to the parameter's dtype.

    reset: leave the head as initialised even where the files have it. drop_from: leave out the layers of the files from
    this number on (the model is shallower). own_head: the files may have a head under its own names that is not read.
    Raises ModelError for a missing backbone tensor, a half-present head, a shape that differs, an unknown tensor,
    numbers that are not finite, and files of which nothing fits.
    """
    folder = files.folder
    report = LoadReport(str(folder))
    parameters = dict(model.named_parameters())  # shared ones once, under their first name
    in_file = _by_current_name(files, table)
    wanted = {ours: table.row_of(ours, head) for ours in parameters}
    unread = "head." if own_head and (reset or head is None or head in table.heads) else None
    absent = _check_names(wanted, in_file, table, folder, None if reset else head, drop_from, unread)
    for ours, row in wanted.items():
        if row.group in absent:
            report.initialised.append(ours)
            continue
        key = in_file.get(row.untied) or in_file[row.theirs]
        shape = files.where[key].shape[:: -1 if row.transpose else 1]
        if shape != tuple(parameters[ours].shape):
            raise ModelError(_shape_message(folder, key, shape, tuple(parameters[ours].shape), row.group))
        files.read_into(key, parameters[ours], row.transpose)
        report.loaded.append(key)
        report.parameters += parameters[ours].numel()
        if not key.endswith(row.theirs):
            report.renamed.append(f"{key} -> {row.theirs}")
    used = {row.theirs for row in wanted.values() if row.group not in absent}
    spare = {name: key for name, key in in_file.items() if key not in report.loaded}
    _check_second_names(spare, in_file, files, table)
    report.tied = [key for name, key in spare.items() if name in used or table.tied.get(name) in used]
    report.ignored = [key for key in spare.values() if key not in report.tied]
    return report


def _check_second_names(spare: dict[str, str], in_file: dict[str, str], files: TensorFiles, table: WeightTable) -> None:
    """Raise ModelError where the second name of a tensor has other numbers, unless it is the matrix of a head."""
    of_heads = {row.theirs for rows in table.heads.values() for row in rows}
    for name, key in spare.items():
        first = in_file.get(table.tied.get(name, ""))
        if first is None or first == key or name in of_heads or table.tied[name] in of_heads:
            continue
        if not torch.equal(files.read(key), files.read(first)):
            raise ModelError(f"{files.folder}: {key} and {first} should be one tensor, and differ")


def _by_current_name(files: TensorFiles, table: WeightTable) -> dict[str, str]:
    """Return {today's name without prefix: the file's}; ModelError where two names of the file are one.

    A second name without its first stands in for it (a decoder saved instead of the embedding it is tied to).
    """
    in_file: dict[str, str] = {}
    for key in files.where:
        current = table.current_name(key)
        if current in in_file:
            raise ModelError(f"{files.folder}: {key!r} and {in_file[current]!r} are the same tensor under two names")
        in_file[current] = key
    for second, first in table.tied.items():
        if second in in_file and first not in in_file:
            in_file[first] = in_file[second]
    return in_file


def _check_names(
    wanted: dict[str, WeightRow],
    in_file: dict[str, str],
    table: WeightTable,
    folder: Path,
    head: str | None,
    drop_from: int | None,
    unread: str | None,
) -> set[str]:
    """Check every name of the model and of the file; return the groups to initialise.

    head: None when it starts anew; else the file has all of it, or it is an error. unread: the beginning of the names
    of a head in the file that is not read.
    """
    reset = head is None
    expected = {row.theirs for row in wanted.values()}
    if not expected & in_file.keys():
        few = ", ".join(list(in_file.values())[:3]) or "the file is empty"
        raise ModelError(
            f"{folder}: none of its {len(in_file)} tensors belongs to a {table.model_type} model ({few} ...)"
        )
    built = {row.group for row in wanted.values()}
    strange = [
        key
        for name, key in in_file.items()
        if name not in expected
        and not table.knows(name, built, drop_from)
        and not (unread is not None and name.startswith(unread))
    ]
    missing: dict[str, list[str]] = {}
    for row in wanted.values():
        if row.theirs not in in_file and not (reset and row.group == "head"):
            missing.setdefault(row.group, []).append(row.theirs)
    required = [name for group in REQUIRED for name in missing.get(group, [])]
    if strange or required:
        raise ModelError(_names_message(folder, table, required, strange, list(in_file)))
    rows = (*wanted.values(), *table.heads.get(head or "", ()))
    present = {row.group for row in rows if row.theirs in in_file and not (reset and row.group == "head")}
    for group, names in missing.items():
        # A head that was trained on a pooler is worth nothing on a new one.
        if group in present or "head" in present or group == "head":
            raise ModelError(
                f"{folder}: half of the {group} is missing ({', '.join(names)}); "
                "--model.head_init reset starts a new head"
            )
    return set(missing) | ({"head"} if reset else set())


def _names_message(folder: Path, table: WeightTable, missing: list[str], strange: list[str], have: list[str]) -> str:
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
        known = [row.theirs for rows in (table.rows, *table.heads.values()) for row in rows]
        parts.append(f"has {len(strange)} tensors unknown to {table.model_type}: " + ", ".join(listed(strange, known)))
    return f"{folder} " + " and ".join(parts)


def _shape_message(folder: Path, key: str, theirs: tuple[int, ...], ours: tuple[int, ...], group: str) -> str:
    hint = (
        "; --model.head_init reset starts a new head"
        if group not in REQUIRED
        else "; config.json and the file disagree"
    )
    return f"{folder}: {key} has shape {list(theirs)}, the model needs {list(ours)}{hint}"


def export(parameters: Iterable[tuple[str, Tensor]], table: WeightTable, head: str | None) -> dict[str, Tensor]:
    """Return named parameters under the hub's names, detached, contiguous and on the CPU; each shared one once."""
    tensors = {}
    named = dict(parameters)
    for ours, value in named.items():
        row = table.row_of(ours, head)
        tensor = value.detach().cpu()
        tensors[table.exported_name(ours, head)] = (tensor.T if row.transpose else tensor).contiguous()
        if row.untied and "head.decoder.weight" in named:  # else it is shared, and the backbone has it
            tensors[row.untied] = tensor.clone()
    return tensors
