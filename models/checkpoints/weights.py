"""Read and write the hub's weight files through one declarative table per architecture.

A row pairs a name of ours with a name in the file; `{i}` stands for the layer number. The same table is read in both
directions, so that what is exported is what was imported. Everything in a file is either a row, listed as ignorable, or
an error: nothing is skipped in silence.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.checkpoints import hub
from models.checkpoints.tensor_files import TensorFiles, read_json
from models.errors import ModelError
from models.lora import merged_parameters

MOST_TENSORS = 20_000  # of a model from scratch; a thousand layers have as many
REQUIRED = ("backbone", "decoder")  # groups of rows that are never initialised in silence


@dataclass(frozen=True)
class WeightRow:
    """One tensor, ours <-> theirs. All of a `group` is in the file or none of it; those of REQUIRED must be."""

    ours: str
    theirs: str
    group: str = "backbone"  # or "decoder"; "head", or a part of a head that may be there without it ("pooler")
    transpose: bool = False  # the file has it the other way round (GPT-2's Conv1D)
    untied: str = ""  # a second name; where the file has it, it is the one in use: so in files whose output is untied


def linear(ours: str, theirs: str, group: str = "backbone", transpose: bool = False) -> tuple[WeightRow, WeightRow]:
    """The two rows of a module with a weight and a bias; `transpose` is for the weight."""
    return WeightRow(f"{ours}.weight", f"{theirs}.weight", group, transpose), WeightRow(
        f"{ours}.bias", f"{theirs}.bias", group
    )


@dataclass(frozen=True)
class WeightTable:
    model_type: str  # config.json's model_type
    prefix: str  # may stand before every backbone name of the file, e.g. "bert."
    rows: tuple[WeightRow, ...]  # the backbone
    heads: Mapping[str, tuple[WeightRow, ...]] = field(default_factory=dict)  # head -> its rows, named head.* in ours
    tied: Mapping[str, str] = field(default_factory=dict)  # a second name of a tensor -> its first; may be absent
    renamed: tuple[tuple[str, str], ...] = ()  # legacy endings -> today's
    ignored: tuple[str, ...] = ()  # patterns of tensors that may be there and are not read
    prefixed: tuple[str, ...] | None = None  # the heads whose files have the prefix; None: all of them

    def current_name(self, name: str) -> str:
        """A name of the file without prefix and in today's spelling."""
        name = name.removeprefix(self.prefix)
        for legacy, current in self.renamed:
            if name.endswith(legacy):
                name = name.removesuffix(legacy) + current
        return name

    def row_of(self, ours: str, head: str | None) -> WeightRow:
        """The row of a parameter of ours, its `{i}` filled in."""
        number = re.search(r"\.(\d+)\.", ours)
        generic = ours.replace(f".{number[1]}.", ".{i}.", 1) if number else ours
        for row in (*self.rows, *self.heads.get(head or "", ())):
            if row.ours == generic:
                return replace(row, theirs=row.theirs.replace("{i}", number[1])) if number else row
        raise KeyError(f"{ours} has no row in the {self.model_type} WEIGHTS table")

    def exported_name(self, ours: str, head: str | None) -> str:
        """The hub's name of a parameter of ours, in the file of a model with this head (None: without prefix)."""
        row = self.row_of(ours, head)
        prefixed = head is not None and (self.prefixed is None or head in self.prefixed)
        return self.prefix + row.theirs if prefixed and row.group != "head" else row.theirs

    def knows(self, current_name: str, built: set[str], drop_from: int | None) -> bool:
        """Is a tensor of the file, that this model does not read, accounted for?

        It may be of a head or a group that is not built, of a layer from `drop_from` on, a second name, or ignorable.
        """
        number = re.search(r"\.(\d+)\.", current_name)
        generic = current_name.replace(f".{number[1]}.", ".{i}.", 1) if number else current_name
        deep = number is not None and drop_from is not None and int(number[1]) >= drop_from
        return (
            any(row.theirs in (generic, current_name) and (deep or row.group not in built) for row in self.rows)
            or any(current_name == row.theirs for rows in self.heads.values() for row in rows)
            or current_name in self.tied
            or any(re.fullmatch(pattern, current_name) for pattern in self.ignored)
        )


@dataclass
class LoadReport:
    """What happened to every tensor; names are the file's, except `initialised`, which are ours."""

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


def tensor_files(folder: Path, stack: ExitStack) -> TensorFiles:
    """The tensors of model.safetensors, or of the shards that its index lists; ModelError where there are neither."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return TensorFiles([folder / "model.safetensors"], stack)
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        name = hub.snapshot_name(folder)
        hint = ""
        if name and not pickled:  # it may be published as a pickle, which is not fetched unasked
            hint = f" (if the hub has its pytorch_model.bin: `python -m models.checkpoints.convert {name}` fetches and converts it)"
        elif pickled:
            way = f"python -m models.checkpoints.convert {folder / pickled[0]}"
            hint = f" (it has {pickled[0]}, a pickle, which is never loaded: `{way}` makes safetensors of it)"
        raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
    shard_of = _read_index(index)
    files = TensorFiles([folder / name for name in sorted(set(shard_of.values()))], stack)
    for key, name in shard_of.items():
        if key not in files.where:
            raise ModelError(f"{index}: tensor {reprlib.repr(key)} should be in {name}, which does not have it")
    return files


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: name of its shard}, every shard a file beside the index."""
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelError(f"{index}: not a safetensors index: no weight_map of tensors to shards")
    for name in shard_of.values():
        if not isinstance(name, str):
            raise ModelError(f"{index}: shard name {reprlib.repr(name)} must be a plain file name")
    for name in sorted(set(shard_of.values())):
        if Path(name).name != name or not name.isprintable() or len(name) > 200:
            raise ModelError(f"{index}: shard name {reprlib.repr(name)} must be a plain file name")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index}: shard {name} is missing")
    return shard_of


class Uninitialised(TorchFunctionMode):
    """Modules built inside have their memory, and no values yet: torch.nn.init does nothing.

    Every value comes from a file or from init_weights. (Building on the meta device, and Module.to_empty, would do too,
    but pull in torch's decompositions and its compiler: two seconds of start-up and 160 MB.)
    ModelError where `folder`'s config.json asks for more than so many tensors or numbers, or for more than the machine
    has; memory without values costs nothing, so that is in time.
    """

    def __init__(self, folder: Path, most_tensors: float, most_numbers: float):
        super().__init__()
        self.folder, self.most_tensors, self.most_numbers = folder, most_tensors, most_numbers
        self.tensors = self.numbers = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function in (torch.empty, torch.zeros, torch.ones):
            return self._allocate(args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _allocate(self, args: Any, kwargs: Any) -> Tensor:
        try:
            tensor = torch.empty(*args, **kwargs)
        except (RuntimeError, MemoryError):
            raise ModelError(f"{self.folder}: config.json describes a model that is larger than the memory") from None
        self.tensors += 1
        self.numbers += tensor.numel()
        if self.tensors > self.most_tensors or self.numbers > self.most_numbers:
            raise ModelError(
                f"{self.folder}: config.json describes a model of {self.tensors:,} tensors and {self.numbers:,} "
                "numbers or more, which is far too large"
            )
        return tensor


def largest(folder: Path) -> tuple[int, int]:
    """(tensors, numbers) that a model for these files may hold: ample for any new head, and no more."""
    with ExitStack() as stack:
        shapes = [stored.shape for stored in tensor_files(folder, stack).where.values()]
    return 4 * len(shapes) + 100, 4 * sum(map(math.prod, shapes)) + 2**24


def has_head(folder: Path, table: WeightTable, head: str) -> bool:
    """Does the file hold any tensor of this head? (A pooler alone is none: every pretrained BERT has one.)"""
    theirs = {row.theirs for row in table.heads.get(head, ()) if row.group == "head"}
    with ExitStack() as stack:
        return any(table.current_name(key) in theirs for key in tensor_files(folder, stack).where)


def is_tied(folder: Path, table: WeightTable, head: str) -> bool:
    """Is the head's output matrix the embedding? So it is unless the file holds both, and they differ."""
    decoder = next((row.theirs for row in table.heads[head] if row.ours == "head.decoder.weight"), None)
    with ExitStack() as stack:
        files = tensor_files(folder, stack)
        keys = {table.current_name(key): key for key in files.where}
        if decoder not in keys:
            return True
        source = keys.get(table.tied.get(decoder or "", ""))
        if source is None:
            return True
        matrices = files.read(keys[decoder]), files.read(source)
        return matrices[0].dtype == matrices[1].dtype and torch.equal(*matrices)


@torch.no_grad()
def load(
    model: nn.Module,
    table: WeightTable,
    folder: Path,
    *,
    head: str | None,
    reset: bool = False,
    drop_from: int | None = None,
) -> LoadReport:
    """Read the file's tensors into `model`, one at a time, raising fp16 and bf16 to the parameter's dtype.

    reset: leave the head as initialised even where the file has it. drop_from: leave out the file's layers from this
    number on (the model is shallower). Raises ModelError for a missing backbone tensor, a half-present head, a shape
    that differs, a tensor nobody knows, numbers that are not finite, and a file of which nothing fits.
    """
    report = LoadReport(str(folder))
    parameters = dict(model.named_parameters())  # shared ones once, under their first name
    with ExitStack() as stack:
        files = tensor_files(folder, stack)
        in_file = _by_current_name(files, table, folder)
        wanted = {ours: table.row_of(ours, head) for ours in parameters}
        absent = _check_names(wanted, in_file, table, folder, None if reset else head, drop_from)
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
        _check_second_names(spare, in_file, files, table, folder)
    report.tied = [key for name, key in spare.items() if name in used or table.tied.get(name) in used]
    report.ignored = [key for key in spare.values() if key not in report.tied]
    return report


def _check_second_names(
    spare: dict[str, str], in_file: dict[str, str], files: TensorFiles, table: WeightTable, folder: Path
) -> None:
    """ModelError where a second name, one that no head can read as a matrix of its own, has another tensor."""
    of_heads = {row.theirs for rows in table.heads.values() for row in rows}
    for name, key in spare.items():
        first = in_file.get(table.tied.get(name, ""))
        if first is None or first == key or name in of_heads or table.tied[name] in of_heads:
            continue
        if not torch.equal(files.read(key), files.read(first)):
            raise ModelError(f"{folder}: {key} and {first} should be one tensor, and differ")


def _by_current_name(files: TensorFiles, table: WeightTable, folder: Path) -> dict[str, str]:
    """{today's name without prefix: the file's}; ModelError where two of the file's are one.

    A second name without its first (a decoder saved in the place of the embedding it is tied to) stands in for it.
    """
    in_file: dict[str, str] = {}
    for key in files.where:
        current = table.current_name(key)
        if current in in_file:
            raise ModelError(f"{folder}: {key!r} and {in_file[current]!r} are the same tensor under two names")
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
) -> set[str]:
    """The groups to initialise, after every name has been accounted for. head: None when it starts anew.

    Of a head that has_head finds nothing is initialised: it is there whole, or an error.
    """
    reset = head is None
    expected = {row.theirs for row in wanted.values()}
    if not expected & in_file.keys():
        few = ", ".join(list(in_file.values())[:3]) or "the file is empty"
        raise ModelError(
            f"{folder}: none of its {len(in_file)} tensors belongs to a {table.model_type} model ({few} ...)"
        )
    built = {row.group for row in wanted.values()}
    strange = [key for name, key in in_file.items() if name not in expected and not table.knows(name, built, drop_from)]
    missing: dict[str, list[str]] = {}
    for row in wanted.values():
        if row.theirs not in in_file and not (reset and row.group == "head"):
            missing.setdefault(row.group, []).append(row.theirs)
    required = [name for group in REQUIRED for name in missing.get(group, [])]
    if strange or required:
        raise ModelError(_names_message(folder, table, required, strange, list(in_file)))
    rows = (*wanted.values(), *table.heads.get(head or "", ()))
    there = {row.group for row in rows if row.theirs in in_file and not (reset and row.group == "head")}
    for group, names in missing.items():
        if group in there or "head" in there:  # a head that was trained on a pooler is worth nothing on a new one
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


def export(model: nn.Module, table: WeightTable, head: str | None) -> dict[str, Tensor]:
    """The parameters under the hub's names, detached, contiguous, on the CPU; a shared one once, LoRA merged."""
    tensors = {}
    parameters = dict(merged_parameters(model))
    for ours, value in parameters.items():
        row = table.row_of(ours, head)
        tensor = value.cpu()
        tensors[table.exported_name(ours, head)] = (tensor.T if row.transpose else tensor).contiguous()
        if row.untied and "head.decoder.weight" in parameters:  # else it is shared, and the backbone's
            tensors[row.untied] = tensor.clone()
    return tensors
