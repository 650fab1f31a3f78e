"""Read and write the hub's weight files through one declarative table per architecture.

A row pairs one of our names with a name in the file; `{i}` stands for the layer number. Loading and exporting read the
same table, so an export has the names that were imported. A tensor of a file that is neither in a row nor listed as
ignored is an error.

A head without rows in the table (the user's own) is saved under its own names, "head.x". So is the backbone of a table
without any rows, "backbone.x".
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

WRAPPERS = re.compile(r"(module\.|_orig_mod\.|model\.)+")
REQUIRED = ("backbone", "decoder")  # groups of rows that every file must have


@dataclass(frozen=True)
class WeightRow:
    """The two names of one tensor. A file has all rows of a `group` or none of them; it must have those of REQUIRED."""

    ours: str  # the name of the parameter
    theirs: str  # the name in the file
    # "decoder", "head", or a layer of a head that a file may have without the head: "pooler", or "dense" without prefix
    group: str = "backbone"
    transpose: bool = False  # whether the file has it transposed (GPT-2's Conv1D)
    untied: str = ""  # a second name in files whose output is untied; it takes precedence where the file has it


def linear_rows(
    ours: str, theirs: str, group: str = "backbone", transpose: bool = False
) -> tuple[WeightRow, WeightRow]:
    """Return the two rows of a module with a weight and a bias; `transpose` applies to the weight."""
    weight = WeightRow(f"{ours}.weight", f"{theirs}.weight", group, transpose)
    return weight, WeightRow(f"{ours}.bias", f"{theirs}.bias", group)


@dataclass(frozen=True)
class WeightTable:
    """The names of all tensors of one model_type."""

    model_type: str  # config.json's model_type
    prefix: str = ""  # optional before backbone names of the file, such as "bert."
    older_prefix: str = ""  # another one, which is read but not written
    rows: tuple[WeightRow, ...] = ()  # the backbone; empty: saved under its own names
    heads: Mapping[str, tuple[WeightRow, ...]] = field(
        default_factory=dict
    )  # head -> its rows, in which ours is head.*
    tied: Mapping[str, str] = field(default_factory=dict)  # optional second name of a tensor -> its first
    renamed: tuple[tuple[str, str], ...] = ()  # (legacy ending, current ending)
    ignored: tuple[str, ...] = ()  # patterns of tensors in files that are not read
    # head -> pattern of the tensors of a head of transformers for the same task that is computed differently; not read
    foreign_heads: Mapping[str, str] = field(default_factory=dict)
    prefixed: tuple[str, ...] | None = None  # the heads whose files have the prefix; None: all of them

    def current_name(self, name: str) -> str:
        """Return a name of the file without prefix and with its current ending.

        A module that wrapped the model when it was saved, as DataParallel does, has put its own name before it.
        """
        if wrapper := WRAPPERS.match(name):
            own = any(row.theirs.startswith(wrapper[1]) for row in self.rows) or self.prefix.startswith(wrapper[1])
            name = name if own else name[wrapper.end() :]
        name = name.removeprefix(self.prefix).removeprefix(self.older_prefix)
        for legacy, current in self.renamed:
            if name.endswith(legacy):
                name = name.removesuffix(legacy) + current
        return name

    def find_row(self, ours: str, head: str | None) -> WeightRow:
        """Return the row of a parameter or buffer, its `{i}` filled in. Raises ModelError where there is none."""
        number = re.search(r"\.(\d+)\.", ours)
        generic = ours.replace(f".{number[1]}.", ".{i}.", 1) if number else ours
        for row in (*self.rows, *self.heads.get(head or "", ())):
            if row.ours == generic:
                return replace(row, theirs=row.theirs.replace("{i}", number[1])) if number else row
        if ours.startswith("head.") and head not in self.heads:
            return WeightRow(ours, ours, "head")
        if ours.startswith("backbone.") and not self.rows:
            return WeightRow(ours, ours)
        raise ModelError(
            f"{ours} has no row in the WeightTable of {self.model_type}, so it cannot be saved: add one, or register "
            "a buffer that is computed anew with persistent=False"
        )

    def exported_name(self, ours: str, head: str | None) -> str:
        """Return the hub's name of a parameter in the file of a model with this head (None: no prefix)."""
        row = self.find_row(ours, head)
        prefixed = head is not None and (self.prefixed is None or head in self.prefixed)
        return self.prefix + row.theirs if prefixed and row.group not in ("head", "dense") else row.theirs

    def knows(self, current_name: str, built: set[str], drop_from: int | None) -> bool:
        """Return whether the table explains a tensor of the file that this model does not read.

        It explains tensors of a head or a group that is not built, of foreign heads, layers from `drop_from` on, second
        names, and ignored ones.
        """
        number = re.search(r"\.(\d+)\.", current_name)
        generic = current_name.replace(f".{number[1]}.", ".{i}.", 1) if number else current_name
        deep = number is not None and drop_from is not None and int(number[1]) >= drop_from
        return (
            any(row.theirs in (generic, current_name) and (deep or row.group not in built) for row in self.rows)
            or (deep and not self.rows)
            or any(current_name == row.theirs for rows in self.heads.values() for row in rows)
            or current_name in self.tied
            or any(re.fullmatch(pattern, current_name) for pattern in (*self.ignored, *self.foreign_heads.values()))
        )


@dataclass
class LoadReport:
    """What happened to every tensor. Names are those of the file; `initialised` has names of parameters."""

    source: str
    loaded: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)  # second names of tensors that were loaded under their first
    initialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    parameters: int = 0
    notes: list[str] = field(default_factory=list)  # sentences about config.json

    def __str__(self) -> str:
        lines = [
            f"weights: {self.source}",
            f"  loaded       {len(self.loaded)} tensors, {self.parameters:,} parameters",
        ]
        for what in ("renamed", "tied", "initialised", "ignored"):
            if names := getattr(self, what):
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"  {what:<12} {len(names)}: {shown}")
        return "\n".join([*lines, *(f"  note         {note}" for note in self.notes)])


def has_head(files: TensorFiles, table: WeightTable, head: str) -> bool:
    """Return whether the file has any tensor of this head. A pooler alone does not count, since every BERT has one."""
    theirs = {row.theirs for row in table.heads[head] if row.group == "head"}
    return any(table.current_name(key) in theirs for key in files.entries)


def num_outputs(files: TensorFiles, table: WeightTable, head: str) -> int | None:
    """Return the number of classes of a classifier in the file; None where it is not known."""
    if head not in table.heads:  # the user's own
        return None
    theirs = {row.theirs for row in table.heads[head] if row.ours == "head.classifier.weight"}
    shapes = [entry.shape for key, entry in files.entries.items() if table.current_name(key) in theirs]
    return shapes[0][0] if len(shapes) == 1 and shapes[0] else None


def foreign_head(files: TensorFiles, table: WeightTable, head: str) -> str:
    """Return a tensor of a head for the same task that is computed differently; "" where the file has none."""
    pattern = table.foreign_heads.get(head, "")
    return next((key for key in files.entries if re.fullmatch(pattern, table.current_name(key))), "")


def is_tied(files: TensorFiles, table: WeightTable, head: str) -> bool:
    """Return whether the head's output matrix is the embedding: False where the file has both and they differ."""
    decoder = table.find_row("head.decoder.weight", head).theirs
    keys = {table.current_name(key): key for key in files.entries}
    if decoder not in keys:
        return True
    if head not in table.heads:  # saved under its own names, without a tied matrix
        return False
    embedding = keys.get(table.tied.get(decoder, ""))
    if embedding is None:
        return True
    matrices = files.read(keys[decoder]), files.read(embedding)
    return matrices[0].dtype == matrices[1].dtype and torch.equal(*matrices)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: tensor} of the parameters and the persistent buffers, shared ones once, under their first name."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


@torch.no_grad()
def load(
    model: nn.Module,
    names: Iterable[str],
    table: WeightTable,
    files: TensorFiles,
    *,
    head: str | None,
    reset: bool = False,
    drop_from: int | None = None,
    own_head: bool = False,
) -> LoadReport:
    """Read the tensors of the files into `model`, one at a time, converted to the dtype of the parameter.

    names: of those that the files should have (saved_tensors of the model before LoRA was added).
    reset: keep the new head, even where the files have it.
    drop_from: ignore the layers of the files from this number on, which the model does not have.
    own_head: whether the files have a head under its own names.
    Raises ModelError for:
    - a missing backbone tensor, an incomplete head, an unknown tensor;
    - a shape that differs, numbers that are not finite;
    - files without any tensor of this model_type.
    """
    folder = files.folder
    report = LoadReport(str(folder))
    saved = saved_tensors(model)
    parameters = {name: saved[name] for name in names}
    in_file = _by_current_name(files, table)
    wanted = {ours: table.find_row(ours, head) for ours in parameters}
    unread = "head." if own_head and (reset or head is None or head in table.heads) else None
    absent = _check_names(wanted, in_file, table, folder, None if reset else head, drop_from, unread)
    for ours, row in wanted.items():
        if row.group in absent:
            report.initialised.append(ours)
            continue
        key = in_file.get(row.untied) or in_file[row.theirs]
        shape = files.entries[key].shape[:: -1 if row.transpose else 1]
        if shape != tuple(parameters[ours].shape):
            raise ModelError(_shape_message(folder, key, shape, tuple(parameters[ours].shape), row.group))
        files.read_into(key, parameters[ours], row.transpose)
        report.loaded.append(key)
        report.parameters += parameters[ours].numel() if isinstance(parameters[ours], nn.Parameter) else 0
        if not key.endswith(row.theirs):
            report.renamed.append(f"{key} -> {row.theirs}")
    used = {row.theirs for row in wanted.values() if row.group not in absent}
    unused = {name: key for name, key in in_file.items() if key not in report.loaded}
    _check_second_names(unused, in_file, files, table)
    report.tied = [key for name, key in unused.items() if name in used or table.tied.get(name) in used]
    report.ignored = [key for key in unused.values() if key not in report.tied]
    return report


def _check_second_names(
    unused: dict[str, str], in_file: dict[str, str], files: TensorFiles, table: WeightTable
) -> None:
    """Raise ModelError where two names of one tensor have different values, unless it is the matrix of a head."""
    names_in_heads = {row.theirs for rows in table.heads.values() for row in rows}
    for name, key in unused.items():
        first = in_file.get(table.tied.get(name, ""))
        if first is None or first == key or name in names_in_heads or table.tied[name] in names_in_heads:
            continue
        if not torch.equal(files.read(key), files.read(first)):
            raise ModelError(f"{files.folder}: {key} and {first} should be the same tensor, but they differ")


def _by_current_name(files: TensorFiles, table: WeightTable) -> dict[str, str]:
    """Return {current name without prefix: name in the file}; ModelError where two names of the file become one.

    A second name without its first replaces it (a decoder that was saved instead of the embedding it is tied to).
    """
    in_file: dict[str, str] = {}
    for key in files.entries:
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

    head: None for a new head; else the file must have all of it.
    unread: the prefix of a head in the file that is not read.
    """
    reset = head is None
    expected = {row.theirs for row in wanted.values()}
    if not expected & in_file.keys():
        few = ", ".join(list(in_file.values())[:3]) or "the file is empty"
        raise ModelError(
            f"{folder}: none of its {len(in_file)} tensors belongs to a {table.model_type} model ({few} ...)"
        )
    built = {row.group for row in wanted.values()}
    unknown = [
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
    if "decoder" in missing and not any(row.theirs in in_file for row in wanted.values() if row.group == "decoder"):
        raise ModelError(f"{folder}: an encoder alone, such as a T5EncoderModel's; this head also needs a decoder")
    if unknown or required:
        raise ModelError(_names_message(folder, table, required, unknown, list(in_file)))
    rows = (*wanted.values(), *table.heads.get(head or "", ()))
    present = {row.group for row in rows if row.theirs in in_file and not (reset and row.group == "head")}
    for group, names in missing.items():
        # A head that was trained on a pooler does not fit a new pooler.
        if group in present or "head" in present or group == "head":
            raise ModelError(
                f"{folder}: a part of the {group} is missing ({', '.join(names)}); "
                "--model.head_init reset starts a new head"
            )
    return set(missing) | ({"head"} if reset else set())


def _names_message(folder: Path, table: WeightTable, missing: list[str], unknown: list[str], found: list[str]) -> str:
    """Return the message about missing and unknown tensors, each with the nearest name on the other side."""

    def listed(names: list[str], candidates: list[str]) -> Iterator[str]:
        for name in names[:5]:
            close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
            yield f"{name} (nearest: {close[0]})" if close else name
        if len(names) > 5:
            yield f"and {len(names) - 5} more"

    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors of the backbone: " + ", ".join(listed(missing, found)))
    if unknown:
        known = [row.theirs for rows in (table.rows, *table.heads.values()) for row in rows]
        parts.append(f"has {len(unknown)} tensors unknown to {table.model_type}: " + ", ".join(listed(unknown, known)))
    if any(name.startswith("base_model.model.") for name in unknown):
        parts.append("these are names of an adapter that was not merged: save it with peft's merge_and_unload()")
    return f"{folder} " + " and ".join(parts)


def _shape_message(folder: Path, key: str, theirs: tuple[int, ...], ours: tuple[int, ...], group: str) -> str:
    hint = (
        "; --model.head_init reset starts a new head"
        if group not in REQUIRED
        else "; config.json and the file disagree"
    )
    return f"{folder}: {key} has shape {list(theirs)}, the model needs {list(ours)}{hint}"


def exported(
    parameters: Iterable[tuple[str, Tensor]], table: WeightTable, head: str | None, is_tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter under the hub's name, transposed where the file has it so.

    is_tied: whether the output of a language model is the embedding; else its bias has a second name, too.
    """
    for ours, value in parameters:
        row = table.find_row(ours, head)
        yield table.exported_name(ours, head), value.detach().T if row.transpose else value.detach()
        if row.untied and not is_tied:
            yield row.untied, value.detach().clone()


def export(parameters: Iterable[tuple[str, Tensor]], table: WeightTable, head: str | None) -> dict[str, Tensor]:
    """Return parameters under the hub's names, detached, contiguous and on the CPU; shared ones once."""
    named = dict(parameters)
    is_tied = "head.decoder.weight" not in named  # a tied matrix is in the backbone only
    return {name: tensor.cpu().contiguous() for name, tensor in exported(named.items(), table, head, is_tied)}
