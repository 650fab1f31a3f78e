"""A checkpoint in pieces, a file a rank, and the files that are written tensor by tensor."""

from __future__ import annotations

import itertools
import json
import random
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save, save_file

from models.checkpoints import shards, tensor_files
from models.checkpoints.tensor_files import DTYPES, TensorFiles, open_tensors
from models.checkpoints.tensor_writer import Layout, TensorWriter
from models.errors import ModelError


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int, dims: dict[str, int]) -> None:
    """Cut each tensor along its dimension as torch.chunk does; a rank without rows has an empty piece."""
    for number in range(1, count + 1):
        pieces, offsets = {}, {}
        for key, tensor in tensors.items():
            dim = dims.get(key, 0)
            size = -(-tensor.shape[dim] // count) if tensor.dim() else 0
            begin = min(size * (number - 1), tensor.shape[dim]) if tensor.dim() else 0
            if tensor.dim():
                piece = tensor.narrow(dim, begin, min(size, tensor.shape[dim] - begin)).contiguous()
                offsets[key] = [begin if i == dim else 0 for i in range(tensor.dim())]
                pieces[key] = piece
            elif number == count:  # a number has one owner
                pieces[key], offsets[key] = tensor, []
        save_file(pieces, folder / shards.name_of("model", number, count), metadata=shards.metadata(offsets))


def part_of(shape: torch.Size, begins: list[int], dtype: torch.dtype) -> SimpleNamespace:
    """Return what a DTensor of this rank looks like to the reader: its part, and where that begins."""
    local = torch.full(shape, 7.0).to(dtype)
    chunk = SimpleNamespace(offsets=begins)
    return SimpleNamespace(to_local=lambda: local, __create_chunk_list__=lambda: [chunk], local=local)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("block", [10, 16_000_000])
def test_any_part_is_read_from_any_pieces(tmp_path, monkeypatch, count, block):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block)
    rng = random.Random(count)
    torch.manual_seed(count)
    full = {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(4, 9),
        "few": torch.randn(2, 3).bfloat16(),
        "vector": torch.randn(11),
        "cube": torch.randn(6, 2, 3),
        "number": torch.tensor(4.0),
        "whole numbers": torch.arange(6).view(3, 2),
    }
    write_shards(tmp_path, full, count, {"columns": 1})
    with ExitStack() as stack:
        files = open_tensors(tmp_path, "model", stack)
        assert {key: entry.shape for key, entry in files.entries.items()} == {
            k: tuple(v.shape) for k, v in full.items()
        }
        for key, tensor in full.items():
            whole = torch.empty_like(tensor)
            files.copy_into(key, whole)
            assert torch.equal(whole, tensor)
            for _ in range(20):
                begins = [rng.randrange(size + 1) for size in tensor.shape]
                ends = [rng.randrange(begin, size + 1) for begin, size in zip(begins, tensor.shape, strict=True)]
                wanted = tensor[tuple(slice(a, b) for a, b in zip(begins, ends, strict=True))]
                part = part_of(wanted.shape, begins, torch.float64)
                files.copy_into(key, part)
                assert torch.equal(part.local, wanted.double())
                if tensor.dim() == 2 and tensor.is_floating_point():  # a file that has it transposed
                    part = part_of(wanted.T.shape, begins[::-1], torch.float32)
                    files.read_into(key, part, transpose=True)
                    assert torch.equal(part.local, wanted.T.float())


MISTAKES = {
    "missing": (lambda names: names[1].unlink(), "lacks model-shard-00002-of-00003.safetensors"),
    "two worlds": (lambda names: names[1].rename(names[1].with_name(shards.name_of("model", 2, 4))), "shards of two"),
    "no offsets": (lambda names: rewrite(names[0], {}), "does not say where its piece of 'a' begins"),
    "no JSON": (lambda names: rewrite(names[0], {shards.OFFSETS: "{"}), "not readable as JSON"),
    "a list": (lambda names: rewrite(names[0], {shards.OFFSETS: "[]"}), "does not say where"),
    "twice": (lambda names: rewrite(names[1], offsets=[0, 0]), "make no whole: that of .* does not fit"),
    "gap": (lambda names: rewrite(names[2], offsets=[5, 0]), "make no whole"),
    "two dimensions": (lambda names: rewrite(names[2], offsets=[4, 1]), "make no whole"),
    "negative": (lambda names: rewrite(names[2], offsets=[-4, 0]), "does not say where"),
    "wrong length": (lambda names: rewrite(names[2], offsets=[4]), "does not say where"),
    "other width": (lambda names: rewrite(names[2], tensor=torch.zeros(2, 4)), "make no whole"),
    "other dtype": (lambda names: rewrite(names[2], tensor=torch.zeros(2, 3).half()), "make no whole"),
    "other dimensions": (lambda names: rewrite(names[2], offsets=[4], tensor=torch.zeros(2)), "make no whole"),
    "truncated": (lambda names: names[1].write_bytes(names[1].read_bytes()[:-3]), "not a complete safetensors file"),
}


def rewrite(path: Path, texts: dict[str, str] | None = None, *, offsets: list[int] | None = None, tensor=None) -> None:
    number = int(path.name.split("-")[2])
    metadata = shards.metadata({"a": [2 * (number - 1), 0] if offsets is None else offsets})
    path.write_bytes(save({"a": torch.zeros(2, 3) if tensor is None else tensor}, metadata if texts is None else texts))


@pytest.mark.parametrize("name", MISTAKES)
def test_pieces_that_make_no_whole_are_refused(tmp_path, name):
    write_shards(tmp_path, {"a": torch.zeros(6, 3)}, 3, {})
    change, message = MISTAKES[name]
    change([tmp_path / shards.name_of("model", number, 3) for number in (1, 2, 3)])
    with ExitStack() as stack, pytest.raises(ModelError, match=message):
        open_tensors(tmp_path, "model", stack)


def test_a_number_that_two_files_have_is_refused(tmp_path):
    for number in (1, 2):
        path = tmp_path / shards.name_of("model", number, 2)
        save_file({"step": torch.tensor(1.0)}, path, metadata=shards.metadata({"step": []}))
    with ExitStack() as stack, pytest.raises(ModelError, match="'step' is one number"):
        open_tensors(tmp_path, "model", stack)


def test_a_part_that_is_not_finite_is_named(tmp_path):
    write_shards(tmp_path, {"a": torch.tensor([[1.0], [torch.nan], [2.0]])}, 3, {})
    with ExitStack() as stack:
        files = open_tensors(tmp_path, "model", stack)
        files.read_into("a", part_of(torch.Size([1, 1]), [2, 0], torch.float32))
        with pytest.raises(ModelError, match="a has NaN or infinity"):
            files.read_into("a", part_of(torch.Size([1, 1]), [1, 0], torch.float32))


def test_a_file_written_by_tensors_is_that_of_save_file(tmp_path):
    torch.manual_seed(0)
    tensors = {"é": torch.tensor(3.0), "none": torch.zeros(0, 4), "view": torch.randn(6, 4).T}
    for i, dtype in itertools.product((1, 0), dict.fromkeys(DTYPES.values())):
        tensors[f"{i}.{dtype}"] = torch.randint(0, 2, (3, i + 2)).to(dtype)
    for metadata in ({"format": "pt"}, {}):
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", metadata=metadata or None)
        layouts = {key: Layout(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        with TensorWriter(tmp_path / "ours", layouts, metadata) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="has 16 bytes, not 4"), TensorWriter(tmp_path / "x", layouts, {}) as writer:
        writer.write("é", torch.zeros(4))


def test_files_in_pieces_say_where_they_begin_as_torch_does(tmp_path):
    """The header is that of torch.distributed.checkpoint's HuggingFaceStorageWriter."""
    write_shards(tmp_path, {"a": torch.zeros(6, 3)}, 2, {})
    with (tmp_path / shards.name_of("model", 2, 2)).open("rb") as stream:
        header = tensor_files.read_header(stream, tmp_path)
    assert json.loads(str(header.metadata["DCP_SHARDING_INFO"])) == {"a": {"saved_offsets": [3, 0]}}
    with ExitStack() as stack, pytest.raises(ModelError, match="is in more than one shard"):
        TensorFiles(tmp_path, sorted(tmp_path.iterdir()), stack)
