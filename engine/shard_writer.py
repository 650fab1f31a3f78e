"""What torch.distributed.checkpoint writes through: safetensors shards, flushed and with checksums, and no pickle."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.futures import Future

from engine.manifest import flush
from models.checkpoints import shards
from models.checkpoints.tensor_writer import Layout, TensorWriter


class ShardWriter(HuggingFaceStorageWriter):
    """Writes the pieces of this rank, a file for each kind; then rank 0 publishes the folder.

    A tensor is planned as "kind/name". Each file is what torch's writer makes, with these differences:

    - It is written tensor by tensor, while torch's holds the bytes of all tensors once more.
    - Its name says of how many it is, so that a missing one is noticed.
    - A rank without any piece writes it too, for the same reason.
    - Each rank flushes its files and returns their checksums, which torch's writer leaves out.

    publish: called on rank 0 with {name: entry of the manifest} of all files, when all ranks have written theirs.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], publish: Callable[[dict[str, Any]], None]):
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.kinds, self.publish = folder, kinds, publish

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the plans of the ranks from 1."""
        return [dataclasses.replace(plan, storage_data=(i, len(plans))) for i, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        """Write the files of this rank; return their entries in the manifest. Raises OSError that names the machine."""
        entries = []
        for kind in self.kinds:
            name = shards.name_of(kind, *plan.storage_data)
            items = {
                item.index.fqn.removeprefix(f"{kind}/"): item
                for item in plan.items
                if item.index.fqn.startswith(f"{kind}/")
            }
            try:
                _write_file(self.folder / name, items, planner)
                entries.append((name, flush(self.folder / name)))
            except OSError as error:
                reason = f"{error.strerror} (machine {socket.gethostname()})"
                raise OSError(error.errno, reason, os.fspath(self.folder / name)) from error
        written: Future[list[Any]] = Future()
        written.set_result(entries)
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Publish the folder, on rank 0."""
        self.publish(dict(entry for of_rank in results for entry in of_rank))


def _write_file(path: Path, items: Mapping[str, WriteItem], planner: SavePlanner) -> None:
    layouts, offsets = {}, {}
    for key, item in items.items():
        data: Any = item.tensor_data
        layouts[key] = Layout(data.properties.dtype, tuple(data.chunk.sizes))
        offsets[key] = tuple(data.chunk.offsets)
    with TensorWriter(path, layouts, shards.metadata(offsets)) as writer:
        for key, item in items.items():
            tensor = planner.resolve_data(item)
            if isinstance(tensor, torch.Tensor):
                writer.write(key, tensor)
