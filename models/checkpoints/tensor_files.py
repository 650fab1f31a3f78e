"""The files of a checkpoint folder, read and checked: JSON, and the tensors of safetensors files.

A safetensors file has three parts:
1. the length of its header, eight bytes, little-endian;
2. the header as JSON, {name: {"dtype", "shape", "data_offsets"}};
3. the bytes of the tensors one after another, without gaps.

The reader of the safetensors library is not used, because
- it keeps the last of two tensors with one name;
- its errors do not name the tensor;
- it maps the file into memory, whose pages count in addition to their copies.

So the header is checked here, and the bytes are read directly into the parameters.

A sharded checkpoint has its tensors in pieces, one file a rank (models/checkpoints/shards.py). A tensor is then read
from all its pieces, by any number of ranks.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from models.checkpoints import hub, shards
from models.errors import ModelError

JsonObject: TypeAlias = dict[str, object]  # each reader checks the values that it uses

BLOCK_BYTES = 16_000_000  # that are read at a time where they cannot be read into the target directly
MAX_JSON = 3_000_000  # bytes; as Python objects they take up to thirty times as much
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),  # torch 2.6 lacks it; only its size is used
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "C64": torch.complex64,
}


def read_json(path: Path) -> object:
    """Return the content of a JSON file. Raises FileNotFoundError, and ModelError where it cannot be read."""
    if path.exists() and not path.is_file():  # a pipe would wait for a writer
        raise ModelError(f"{path} is not a regular file")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_JSON + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_JSON:
        raise ModelError(f"{path} has more than {MAX_JSON:,} bytes, too many for a configuration")
    return parse_json(content, path)


def parse_json(content: bytes, path: Path, part: str = "the file") -> object:
    """Parse JSON strictly: in UTF-8, each name once in its object, no NaN. Raises ModelError, which names `path`."""

    def unique_keys(pairs: list[tuple[str, object]]) -> JsonObject:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise ModelError(f"{path}: {reprlib.repr(counts.most_common(1)[0][0])} occurs twice in {part}")
        return found

    try:
        parsed: object = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse_constant
        )
        return parsed
    except ModelError:
        raise
    except RecursionError:
        raise ModelError(f"{path}: not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class TensorEntry(NamedTuple):
    """One tensor of a file, as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    nbytes: int


class Header(NamedTuple):
    """The header of a file, and its texts under "__metadata__"."""

    entries: dict[str, TensorEntry]
    metadata: JsonObject


def read_header(stream: BinaryIO, path: Path) -> Header:
    """Return the header of a file; ModelError unless all entries are well-formed and fill the file exactly."""
    size = stream.seek(0, 2)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise ModelError(
            f"{path} is not a complete safetensors file: {size:,} bytes, but its header should have {length:,}"
        )
    if length > MAX_JSON:
        raise ModelError(f"{path}: a header of {length:,} bytes, more than the {MAX_JSON:,} that are read")
    header = parse_json(stream.read(length), path, "its header")
    if not isinstance(header, dict):
        raise ModelError(f"{path}: its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    found = {name: _parse_entry(name, value, 8 + length, path) for name, value in header.items()}
    end, last = 8 + length, "the header"
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            raise ModelError(f"{path}: tensor {name!r} starts at byte {tensor.start:,}, but {last} ends at {end:,}")
        end, last = tensor.start + tensor.nbytes, repr(name)
    if end != size:
        raise ModelError(f"{path} is not a complete safetensors file: {size:,} bytes, but {last} ends at {end:,}")
    return Header(found, metadata if isinstance(metadata, dict) else {})


def _parse_entry(name: str, value: object, data_start: int, path: Path) -> TensorEntry:
    if not (name.isprintable() and 0 < len(name) <= 400):
        raise ModelError(f"{path}: {reprlib.repr(name)} cannot be a tensor's name")
    entry: JsonObject = value if isinstance(value, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{path}: tensor {name!r} has dtype {reprlib.repr(dtype)}; known are {', '.join(DTYPES)}")
    if not _is_size_list(shape) or len(shape) > 8:
        raise ModelError(f"{path}: tensor {name!r} has shape {reprlib.repr(shape)}, not a list of sizes")
    if not _is_size_list(offsets) or len(offsets) != 2:
        raise ModelError(f"{path}: tensor {name!r} has data_offsets {reprlib.repr(offsets)}, not [begin, end]")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPES[dtype].itemsize != nbytes:
        raise ModelError(f"{path}: tensor {name!r} has {nbytes:,} bytes, which is not {dtype} x {shape}")
    return TensorEntry(DTYPES[dtype], tuple(shape), data_start + offsets[0], nbytes)


def _is_size_list(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


class Piece(NamedTuple):
    """What a file has of a tensor: all of it, or a part that begins at `offsets`."""

    path: Path
    stream: BinaryIO
    entry: TensorEntry
    offsets: tuple[int, ...]

    def overlap(self, target: Tensor, offsets: Sequence[int]) -> tuple[Tensor, list[int]] | None:
        """Return (what a target that begins at `offsets` has of this piece, where that begins in the piece)."""
        begins = [max(pair) for pair in zip(offsets, self.offsets, strict=True)]
        own_ends = [offset + size for offset, size in zip(self.offsets, self.entry.shape, strict=True)]
        ends = [min(a + n, b) for a, n, b in zip(offsets, target.shape, own_ends, strict=True)]
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return None
        part = [slice(a - start, b - start) for a, b, start in zip(begins, ends, offsets, strict=True)]
        return target[tuple(part)], [begin - offset for begin, offset in zip(begins, self.offsets, strict=True)]


class TensorFiles:
    """The tensors of some safetensors files, read by name; the files stay open as long as `stack`.

    in_pieces: whether each file has a part of each tensor, as its header says.
    Raises ModelError for a file that is not well-formed, for a name that occurs in two files, and for pieces that are
    not a whole.
    """

    def __init__(self, folder: Path, paths: list[Path], stack: ExitStack, in_pieces: bool = False):
        self.folder = folder
        self._pieces: dict[str, list[Piece]] = {}
        for path in paths:
            try:
                stream = stack.enter_context(path.open("rb"))
                header = read_header(stream, path)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror}") from None
            if not in_pieces and (twice := self._pieces.keys() & header.entries.keys()):
                raise ModelError(f"{path}: tensor {min(twice)!r} is in more than one shard")
            offsets = _read_offsets(header, path) if in_pieces else {}
            for key, entry in header.entries.items():
                piece = Piece(path, stream, entry, offsets.get(key, (0,) * len(entry.shape)))
                self._pieces.setdefault(key, []).append(piece)
        self.entries = {key: _join(folder, key, pieces) for key, pieces in self._pieces.items()}

    def read_into(self, key: str, target: Tensor, transpose: bool = False) -> None:
        """Copy a tensor into `target`, in the precision of the target; the caller has checked the shape.

        target: may be a DTensor, of which each rank reads its own part only.
        transpose: whether the file has it transposed.
        Raises ModelError unless the numbers are floating point and finite.
        """
        local, offsets = _local_part(target)
        if self.entries[key].dtype != local.dtype or transpose:
            self._check_float(key)
        self._fill(key, local.T if transpose else local, offsets[::-1] if transpose else offsets)
        # The sum is quick to compute. It is finite unless a number is not, or the sum overflows.
        if not local.sum().isfinite() and not local.isfinite().all():
            raise ModelError(f"{self._pieces[key][0].path}: {key} has NaN or infinity")

    def read(self, key: str) -> Tensor:
        """Return a new tensor in the precision of the file; ModelError unless it is floating point."""
        self._check_float(key)
        tensor = torch.empty(self.entries[key].shape, dtype=self.entries[key].dtype)
        self._fill(key, tensor, (0,) * tensor.dim())
        return tensor

    def _check_float(self, key: str) -> None:
        dtype = self.entries[key].dtype
        if dtype not in FLOATS.values():
            known = ", ".join(FLOATS)
            raise ModelError(f"{self._pieces[key][0].path}: {key} is stored as {dtype}; weights are read from {known}")

    def copy_into(self, key: str, target: Tensor) -> None:
        """Copy a tensor into `target`, perhaps a DTensor, as it is: numbers of any kind, finite or not."""
        self._fill(key, *_local_part(target))

    def _fill(self, key: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Copy the part of a tensor that begins at `offsets` into a target of any strides, precision and device."""
        for piece in self._pieces[key]:
            if found := piece.overlap(target, offsets):
                _fill_from(piece, *found)


def _read_offsets(header: Header, path: Path) -> dict[str, tuple[int, ...]]:
    """Return {tensor: where its piece in a file begins}; ModelError where the header does not say it."""
    text = header.metadata.get(shards.OFFSETS)
    listed = parse_json(text.encode(), path, shards.OFFSETS) if isinstance(text, str) else None
    found = {}
    for key, entry in header.entries.items():
        of_key = listed.get(key) if isinstance(listed, dict) else None
        begin = of_key.get(shards.OFFSETS_OF_TENSOR) if isinstance(of_key, dict) else None
        if not _is_size_list(begin) or len(begin) != len(entry.shape):
            raise ModelError(f"{path}: its header does not say where its piece of {key!r} begins ({shards.OFFSETS})")
        found[key] = tuple(begin)
    return found


def _join(folder: Path, key: str, pieces: Sequence[Piece]) -> TensorEntry:
    """Return the entry of a whole tensor; ModelError unless the pieces follow one another along one dimension."""
    filled = sorted((p for p in pieces if p.entry.nbytes), key=lambda piece: piece.offsets) or [*pieces[:1]]
    first = filled[0].entry
    dim = next((i for i, offset in enumerate(filled[-1].offsets) if offset), 0)
    size = 0
    for piece in filled:
        shape = piece.entry.shape
        fits = piece.offsets == tuple(size if i == dim else 0 for i in range(len(first.shape)))
        fits = fits and piece.entry.dtype == first.dtype and len(shape) == len(first.shape)
        if not fits or (shape[:dim], shape[dim + 1 :]) != (first.shape[:dim], first.shape[dim + 1 :]):
            raise ModelError(f"{folder}: the pieces of {key!r} make no whole: that of {piece.path.name} does not fit")
        size += sum(shape[dim : dim + 1])
    if not first.shape and len(filled) > 1:
        raise ModelError(f"{folder}: {key!r} is one number, and {filled[1].path.name} has it again")
    whole = (*first.shape[:dim], size, *first.shape[dim + 1 :]) if first.shape else ()
    return first._replace(shape=whole, nbytes=math.prod(whole) * first.dtype.itemsize)


def _fill_from(piece: Piece, target: Tensor, offsets: Sequence[int]) -> None:
    """Copy the part of a piece that begins at `offsets`; directly where the bytes of the file are those of the target.

    Otherwise the rows are read in blocks.
    """
    entry = piece.entry
    if not entry.shape:
        target, offsets, entry = target.view(1), (0,), entry._replace(shape=(1,))
    row_bytes = entry.nbytes // entry.shape[0]
    first, rows = entry.start + offsets[0] * row_bytes, len(target)
    is_whole = target.shape[1:] == entry.shape[1:]
    if is_whole and target.dtype == entry.dtype and target.is_contiguous() and target.device.type == "cpu":
        _read_bytes(piece, first, target)
        return
    columns = [slice(begin, begin + size) for begin, size in zip(offsets[1:], target.shape[1:], strict=True)]
    step = max(1, BLOCK_BYTES // row_bytes)
    block = torch.empty((min(step, rows), *entry.shape[1:]), dtype=entry.dtype)
    for row in range(0, rows, step):
        part = block[: rows - row]
        _read_bytes(piece, first + row * row_bytes, part)
        target[row : row + step].copy_(part[:, *columns])


def _read_bytes(piece: Piece, start: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of the file from `start` on."""
    memory = tensor.detach().view(-1).view(torch.uint8).numpy()
    piece.stream.seek(start)
    try:
        complete = piece.stream.readinto(memory) == len(memory)  # type: ignore[attr-defined]
    except OSError as error:
        raise ModelError(f"{piece.path} cannot be read: {error.strerror}") from None
    if not complete:
        raise ModelError(f"{piece.path} is not a complete safetensors file: it became shorter while it was read")


def _local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return (the part of a tensor that this rank has, where it begins); the tensor itself where it is no DTensor."""
    if not hasattr(tensor, "to_local"):  # asked by name: a single process never imports torch.distributed.tensor
        return tensor, (0,) * tensor.dim()
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]  # what torch.distributed.checkpoint asks
    return tensor.to_local(), tuple(chunk.offsets)


def open_tensors(folder: Path, kind: str, stack: ExitStack) -> TensorFiles:
    """Open the file of a kind, such as "optimizer", or its shards; ModelError where there are neither."""
    whole = folder / f"{kind}.safetensors"
    paths = [] if whole.is_file() else shards.find(folder, kind)
    return TensorFiles(folder, paths or [whole], stack, in_pieces=bool(paths))


def open_checkpoint(folder: Path, stack: ExitStack) -> TensorFiles:
    """Open model.safetensors, the files of its index, or those of all ranks; ModelError where there are none."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or (not index.is_file() and shards.find(folder, "model")):
        return open_tensors(folder, "model", stack)
    if not index.is_file():
        raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json{_pickle_hint(folder)}")
    shard_of = _read_index(index)
    files = TensorFiles(folder, [folder / name for name in sorted(set(shard_of.values()))], stack)
    for key, name in shard_of.items():
        if key not in files.entries:
            raise ModelError(f"{index}: tensor {reprlib.repr(key)} should be in {name}, which does not have it")
    return files


def _pickle_hint(folder: Path) -> str:
    """Return how to convert the pickle that a folder has, or may have on the hub; empty where there is none."""
    convert = "python -m models.checkpoints.convert"
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled:
        command = f"{convert} {folder / pickled[0]}"
        return f" (it has {pickled[0]}, a pickle, which is never loaded: `{command}` converts it)"
    name = hub.snapshot_name(folder)
    if name:  # the hub may have a pickle, which is fetched on request only
        return f" (if the hub has its pytorch_model.bin: `{convert} {name}` fetches and converts it)"
    return ""


def _read_index(index: Path) -> dict[str, str]:
    """Return {tensor: name of its shard}; every shard is a file beside the index."""
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
