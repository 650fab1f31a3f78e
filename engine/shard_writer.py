"""What torch.distributed.checkpoint writes through: safetensors shards, flushed and with checksums, and no pickle."""

from __future__ import annotations

import dataclasses
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
    explain: returns what a rank raises for an OSError of its own. All ranks then get it.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Sequence[str],
        publish: Callable[[dict[str, Any]], None],
        explain: Callable[[OSError], Exception],
    ):
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.kinds, self.publish, self.explain = folder, kinds, publish, explain

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the plans of the ranks from 1."""
        return [dataclasses.replace(plan, storage_data=(i, len(plans))) for i, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        """Write the files of this rank; return their entries in the manifest."""
        entries = []
        for kind in self.kinds:
            path = self.folder / shards.name_of(kind, *plan.storage_data)
            try:
                _write_file(path, _select(plan.items, f"{kind}/"), planner)
                entries.append((path.name, flush(path)))
            except OSError as error:
                raise self.explain(error) from error
        written: Future[list[Any]] = Future()
        written.set_result(entries)
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Publish the folder, on rank 0."""
        try:
            self.publish(dict(entry for of_rank in results for entry in of_rank))
        except OSError as error:
            raise self.explain(error) from error


def _select(items: Sequence[WriteItem], prefix: str) -> dict[str, WriteItem]:
    """Return the items whose names begin with a prefix, by the rest of their names."""
    chosen = [item for item in items if item.index.fqn.startswith(prefix)]
    return {item.index.fqn.removeprefix(prefix): item for item in chosen}


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
