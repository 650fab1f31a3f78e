"""Checkpoints of a sharded run: last/ in shards that all ranks write while the run goes on, best/ in one file.

last/ goes through torch.distributed.checkpoint. It copies the parts of each rank to the host, and decides which of
several ranks with the same part writes it. It runs in a thread with a process group of its own. Each rank writes,
flushes and checksums its files. Rank 0 then writes the manifest and renames the folder. An error of any rank reaches
all of them.

best/ has the same files as that of a run on one process: one tensor after another is gathered, and written by rank 0.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import models
from data.writing import WRITING
from engine import heartbeat, optimizer_state, pending_save
from engine.checkpoint import (
    LAST,
    PREVIOUS,
    Contents,
    check_finite,
    explain_failure,
    total_bytes,
    write_small_files,
)
from engine.distributed import Ranks, all_gather, all_sum, on_main
from engine.dtensors import is_sharded, local
from engine.errors import TrainingError
from engine.manifest import OBJECTIVE, seal
from engine.objective import extra_state
from engine.run_folder import remove, replace
from engine.state import TrainState
from models import adapter
from models.checkpoints import weights
from models.checkpoints.tensor_writer import Layout, TensorWriter
from models.lora import base_tensors, merged_tensors

PATIENCE = timedelta(days=1)  # of the thread that writes; a rank that is lost meanwhile is found by the heartbeat


@dataclass(frozen=True)
class Save:
    """One save of a sharded run: where to, what, and of which moment. Its methods are called in the thread, too."""

    target: Path
    contents: Contents
    state: TrainState
    needed: int  # bytes

    @property
    def temporary(self) -> Path:
        """The folder that becomes `target` when it is complete."""
        return self.target.with_name(f"{WRITING}{self.target.name}")

    def publish(self, written: Mapping[str, Mapping[str, Any]]) -> None:
        """Make a complete folder the checkpoint, on rank 0. written: the entries of shards in the manifest."""
        seal(self.temporary, written)
        replace(self.temporary, self.target, keep_previous=PREVIOUS in self.contents.config.checkpoint.keep)

    def explain(self, error: OSError) -> TrainingError:
        """Return what this rank has to say on an error of its own."""
        who = f" by {heartbeat.name_of(dist.get_rank())}" if dist.get_rank() else ""
        return explain_failure(self.target, self.state, self.needed, error, who)

    def end(self, error: BaseException) -> Exception:
        """Return what to raise for an error of torch.distributed.checkpoint, when all ranks have ended their part."""
        remove(self.temporary)
        failures = getattr(error, "failures", None)
        cause = failures[min(failures)][0] if failures else error  # else an exchange with another rank has failed
        is_clear = isinstance(cause, TrainingError) or cause is error
        return cause if is_clear and isinstance(cause, Exception) else RuntimeError(str(error))


def save(target: Path, contents: Contents, state: TrainState, ranks: Ranks) -> float:
    """Write best/, or begin to write last/; return the seconds that the run waited on rank 0."""
    started = time.monotonic()
    if target.name == LAST:
        pending_save.wait()
    new = Save(target, contents, state, total_bytes(contents, target))
    extra = extra_state(contents.objective, contents.model)
    broken = [key for key, value in _all_tensors(contents).items() if not local(value).isfinite().all()]
    check_finite((key for found in all_gather(broken[:1]) for key in found), state)
    tensors, values = optimizer_state.split(
        optimizer_state.collect(contents.optimizer, contents.parameters, contents.counters)
    )
    on_main(ranks, _begin, new, values if target.name == LAST else None)
    if contents.config.model.lora.rank:
        parts = adapter.adapter_tensors(contents.model)
        _write_whole(new, f"{adapter.FOLDER}/{adapter.WEIGHTS_FILE}", parts.items(), _layouts(parts.items()), ranks)
    if target.name == LAST:
        kinds = {"model": dict(_exported(contents.model)), "optimizer": tensors}
        _write_shards(new, kinds | ({"objective": extra} if extra else {}))
    else:
        layouts = _layouts(_exported(contents.model, merge=False))
        _write_whole(new, "model.safetensors", _exported(contents.model), layouts, ranks)
        if extra:
            _write_whole(new, OBJECTIVE, extra.items(), _layouts(extra.items()), ranks)
        on_main(ranks, _try, new, new.publish, {})
    return all_sum((time.monotonic() - started) * ranks.is_main)[0]


def _all_tensors(contents: Contents) -> dict[str, Tensor]:
    return contents.model.state_dict() | extra_state(contents.objective, contents.model)


def _exported(model: models.TaskModel, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of model.safetensors by name, sharded where they are. merge: add the updates of LoRA."""
    is_tied = "head.decoder.weight" not in weights.saved_tensors(model)
    named = merged_tensors(model) if merge else base_tensors(model)
    yield from weights.exported(named, model.spec.architecture.weights, model.head_name, is_tied)


def _layouts(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Layout]:
    return {name: Layout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


def _begin(new: Save, optimizer_values: Mapping[str, Any] | None) -> None:
    """Make the folder and write all that is not sharded."""

    def write() -> None:
        new.temporary.mkdir()
        models.pretrained.save_config(new.contents.model, new.temporary)
        if new.contents.config.model.lora.rank:
            adapter.save_adapter_config(new.contents.model, new.temporary / adapter.FOLDER)
        write_small_files(new.temporary, new.contents, new.state, optimizer_values)

    _try(new, write)


def _try(new: Save, function: Any, *args: Any) -> None:
    """Call a function on rank 0; TrainingError where it cannot write, and then no folder is left."""
    try:
        function(*args)
    except OSError as error:
        remove(new.temporary)
        raise new.explain(error) from error


@torch.no_grad()
def _write_whole(
    new: Save, name: str, tensors: Iterable[tuple[str, Tensor]], layouts: Mapping[str, Layout], ranks: Ranks
) -> None:
    """Write a file on rank 0, for which all ranks gather one tensor after another; TrainingError on all of them."""
    gathered = ((key, _gather(tensor)) for key, tensor in tensors)
    problems = []
    if ranks.is_main:
        try:
            with TensorWriter(new.temporary / name, layouts, {"format": "pt"}) as writer:
                for key, whole in gathered:
                    writer.write(key, whole)
                    del whole  # before the next one is gathered
        except OSError as error:
            problems = [error]
    for _, whole in gathered:  # on the other ranks, and on rank 0 after an error
        del whole
    on_main(ranks, _try, new, _raise_first, problems)


def _gather(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole


def _raise_first(problems: list[OSError]) -> None:
    for problem in problems:
        raise problem


@torch.no_grad()
def _write_shards(new: Save, kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy the parts of this rank to the host, and begin to write them in a thread."""
    from torch.distributed.checkpoint.state_dict_saver import async_save

    from engine.shard_writer import ShardWriter

    # What a file has transposed is copied on the device, where the gradients have been freed.
    tensors = {
        f"{kind}/{key}": value.detach().contiguous()
        for kind, of_kind in kinds.items()
        for key, value in of_kind.items()
    }
    writer = ShardWriter(new.temporary, [*kinds], new.publish, new.explain)
    future: Any = async_save(tensors, storage_writer=writer, process_group=_own_group(dist.group.WORLD))
    pending_save.begin(future, new.end)


@functools.lru_cache(maxsize=1)
def _own_group(_: Any) -> Any:
    """Return the process group of the thread, made once for the group of the run."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
