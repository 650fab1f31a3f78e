"""Encoded texts in memory-mapped files, of which a process reads the pages of the examples that it asks for.

A shard is a .safetensors file with the arrays of some examples, as TextExamples has them: `offsets`, `sequences` and
`target_offsets` count from the beginning of the shard and have no last entry, which is the next shard's first one. A
shard of blocks of text (causal_lm.concatenate_texts) has a second file, with the arrays of the blocks that begin in it.
Nothing of the size of the data is made, neither when it is opened nor in a step.
"""

from __future__ import annotations

import bisect
import itertools
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast, overload

import numpy as np

from data.batch import IGNORE_INDEX, Batch
from data.examples import TextExamples

T = TypeVar("T")

DTYPES = {"I32": np.int32, "I64": np.int64, "U8": np.uint8, "F32": np.float32}
# What an array has an entry for. Labels are of tokens, or of examples; those of spans are of sequences.
UNITS = {
    **dict.fromkeys(("input_ids", "token_type_ids", "token_labels", "continued_words"), "tokens"),
    **dict.fromkeys(("offsets", "target_offsets", "markers", "spans"), "sequences"),
    **dict.fromkeys(("labels", "sequences", "lengths"), "examples"),
    "target_ids": "targets",
}
# Those that count elements of another array, which begin again in each shard.
COUNTED = {"offsets": "tokens", "target_offsets": "targets", "sequences": "sequences"}
# How many shards stay mapped, each with an open file, of which a process may have 1,024; and how many reads of arrays
# there are before all are given up, since each may bring 128 KiB into memory.
MAPS_KEPT, USES_KEPT = 128, 256


class Shard:
    """The arrays of a shard, which are mapped when one of them is asked for, and given up after some time."""

    mapped: ClassVar[list[Shard]] = []  # of this process
    num_uses: ClassVar[int] = 0

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._maps: list[mmap.mmap] = []
        self._arrays: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Shard, (self.paths,)  # a loader's worker maps the files itself

    def array(self, name: str) -> np.ndarray | None:
        """Return an array, which is a view of the file; None where the shard does not have it."""
        Shard.num_uses += 1
        if Shard.num_uses > USES_KEPT:
            for mapped in (mapped for shard in Shard.mapped for mapped in shard._maps):
                mapped.madvise(mmap.MADV_DONTNEED)
            Shard.num_uses = 0
        if not self._arrays and len(Shard.mapped) >= MAPS_KEPT:
            for shard in Shard.mapped:
                shard._arrays, shard._maps = {}, []  # a map is closed with the last array of it that is in use
            Shard.mapped = []
        if not self._arrays:
            Shard.mapped.append(self)
            for path in self.paths:  # of an array in two files, the last counts
                self._map(path)
        return self._arrays.get(name)

    def _map(self, path: Path) -> None:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # no pages around those that are read
        if path not in self._headers:
            size = int.from_bytes(mapped[:8], "little")
            self._headers[path] = size, json.loads(mapped[8 : 8 + size])
        size, entries = self._headers[path]
        for name, entry in entries.items():
            if name != "__metadata__":
                shape, begin = entry["shape"], 8 + size + entry["data_offsets"][0]
                count = int(np.prod(shape))
                values = np.frombuffer(mapped, DTYPES[entry["dtype"]], count, begin if count else 0)
                self._arrays[name] = values.reshape(shape)
        self._maps.append(mapped)


class Part(NamedTuple):
    """A shard, and how many elements it has of each unit of UNITS."""

    shard: Shard
    sizes: Mapping[str, int]


class ShardedArray:
    """An array whose parts are in shards. An index is a whole number, an array of them, or a slice.

    A one-dimensional array that a shard lacks is 0 there; `sequences` of a shard without it are one an example.
    """

    def __init__(self, parts: Sequence[Part], name: str, dtype: Any, row_shape: Sequence[int] = ()):
        unit, counted = UNITS[name], COUNTED.get(name)
        self.name = "labels" if name == "spans" else name
        self.dtype, self.row_shape = np.dtype(dtype), tuple(row_shape)
        self.shards = [part.shard for part in parts]
        self.starts = np.cumsum([0, *(part.sizes[unit] for part in parts)])
        self.shifts = None if counted is None else np.cumsum([0, *(part.sizes[counted] for part in parts)])
        self.remap: np.ndarray | None = None  # the new number of each class

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return 1 + len(self.row_shape)

    def __len__(self) -> int:
        return int(self.starts[-1]) + (self.shifts is not None)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._take(np.arange(*key.indices(len(self))))
        indices = np.asarray(key, dtype=np.int64)
        taken = self._take(np.where(indices < 0, indices + len(self), indices).reshape(-1))
        return taken if indices.ndim else taken[0]

    def _take(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.row_shape), dtype=self.dtype)
        number = np.searchsorted(self.starts, indices, side="right") - 1
        for k in np.unique(number).tolist():
            chosen = number == k
            out[chosen] = self._read(k, indices[chosen] - self.starts[k])
        if self.remap is not None and self.ndim == 1:
            out = np.where(out == IGNORE_INDEX, out, self.remap[out])
        elif self.remap is not None:  # a column for each class
            out[:, self.remap] = out.copy()
        return out

    def _read(self, k: int, places: np.ndarray) -> np.ndarray:
        """Return the elements of shard k at these places; those of the shard behind the last one are the total."""
        shift = 0 if self.shifts is None else self.shifts[k]
        if k == len(self.shards):
            return np.full(len(places), shift)
        shard = self.shards[k]
        values = shard.array(self.name)
        if values is None:
            return places + shift if self.name == "sequences" else np.zeros(len(places), self.dtype)
        found: np.ndarray = values[places]
        return found + shift if self.shifts is not None else found


class ShardedSequence(Sequence[T]):
    """(N,) a value of each example, read from its shard where an index asks for it."""

    def __init__(self, parts: Sequence[Part]):
        self.shards = [part.shard for part in parts]
        self.ends = list(itertools.accumulate(part.sizes["examples"] for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, key: int) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> list[T]: ...
    def __getitem__(self, key: int | slice) -> T | list[T]:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        index = int(key) + (len(self) if key < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"example {key} of {len(self):,}")
        k = bisect.bisect_right(self.ends, index)
        return self._read(index, self.shards[k], index - (self.ends[k - 1] if k else 0))

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))

    def _read(self, index: int, shard: Shard, place: int) -> T:
        """Return the value of an example, which is at `place` in its shard."""
        raise NotImplementedError


class ShardedIds(ShardedSequence[str]):
    """(N,) the ids of the examples; those of blocks are their numbers."""

    def __init__(self, parts: Sequence[Part], are_blocks: bool):
        super().__init__(parts)
        self.are_blocks = are_blocks

    def _read(self, index: int, shard: Shard, place: int) -> str:
        if self.are_blocks:
            return f"block {index + 1}"
        begins, texts = shard.array("id_offsets"), shard.array("id_bytes")
        if begins is None or texts is None:
            return str(index)
        end = begins[place + 1] if place + 1 < len(begins) else len(texts)
        return texts[begins[place] : end].tobytes().decode(errors="surrogatepass")


class MappedLengths:
    """(N,) the tokens of each example, read where an index asks for them (data/lengths.py)."""

    def __init__(self, parts: Sequence[Part], counts: np.ndarray):
        self.values, self.counts = ShardedArray(parts, "lengths", np.int64), counts

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> Any:
        return self.values[key]


class Facts(NamedTuple):
    """Facts about all examples, known without reading them."""

    fingerprint: str
    notes: tuple[str, ...]
    truncated: int
    label_counts: np.ndarray | None  # (C,) in the order of the model's labels
    length_counts: np.ndarray  # (L + 1,) the number of examples of each length
    largest: Mapping[str, int]  # of input_ids, token_type_ids and target_ids
    longest_sequence: int
    num_empty: int  # texts without a token
    first_empty: str  # the id of the first one


class MappedExamples:
    """N examples in shards, as the loader reads them (data/loader.py: Examples).

    arrays: {name: (dtype, shape of an element)} of those that a shard has. remap: (C,) the model's number of each class
    of the shards.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        arrays: Mapping[str, tuple[str, Sequence[int]]],
        facts: Facts,
        *,
        are_blocks: bool = False,
        decoder_start_id: int = 0,
        remap: np.ndarray | None = None,
    ):
        self.facts, self.ids = facts, ShardedIds(parts, are_blocks)
        self.lengths = MappedLengths(parts, facts.length_counts)
        found: dict[str, Any] = {
            "labels" if name == "spans" else name: ShardedArray(parts, name, dtype, shape)
            for name, (dtype, shape) in arrays.items()
        }
        for name in ("labels", "token_labels"):
            if name in found and remap is not None:
                found[name].remap = remap
        more = {"ids": self.ids, "truncated": facts.truncated, "decoder_start_id": decoder_start_id}
        self._examples: TextExamples[None] = TextExamples(**{"labels": None} | found | cast("dict[str, Any]", more))

    @property
    def labels(self) -> Any:
        """The labels of the examples: an array that is read by index; None where they are of tokens."""
        return self._examples.labels

    @property
    def truncated(self) -> int:
        """Number of texts that lost tokens to max_length."""
        return self.facts.truncated

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was truncated, lost or repaired."""
        return self.facts.notes

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int | None = None) -> Batch:
        """Return the packed micro-batch of these examples, in this order; an empty batch for no indices."""
        return self._examples.batch(indices)

    def find_continued_words(self, indices: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Return what TextExamples.find_continued_words does."""
        return self._examples.find_continued_words(indices)

    def fingerprint(self) -> str:
        """Return the checksum that the examples of the file have, as the manifest says; another one with `remap`."""
        return self.facts.fingerprint

    def compute_fingerprint(self) -> str:
        """Return the checksum of TextExamples, for which all arrays are read."""
        return self._examples.fingerprint()

    def label_counts(self, num_labels: int) -> np.ndarray | None:
        """Return (num_labels,) the number of targets of each class; None where the labels are not classes."""
        return self.facts.label_counts

    def show(self, index: int, processor: Any, labels: Sequence[str]) -> list[str]:
        """Return lines about example `index`: its id and label, and the tokens and ids of its first sequence."""
        return self._examples.show(index, processor, labels)
