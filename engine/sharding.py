"""Sharded training (FSDP2): each rank keeps a part of every parameter, of its gradient and of its optimizer state.

distributed.strategy = fsdp: W ranks keep 1 / W each (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023,
"PyTorch FSDP"). hsdp: the ranks of one machine keep a part each, and every machine has all parts. The parts of a layer
are gathered while it is computed, in the forward and in the backward pass, and its gradient is reduced to parts again.

A parameter is then a DTensor, of which `local` returns the part of this rank: dim 0 is cut as torch.chunk does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.allocator import return_freed_memory
from engine.config import ConfigError
from engine.distributed import Ranks, all_gather, read_variable
from engine.dtensors import local, sharded_modules
from models import TaskModel

MIN_TORCH = (2, 9)


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a run are sharded; calling it shards a model."""

    mesh: Any  # DeviceMesh: (W,) of fsdp, (machines, ranks of a machine) of hsdp
    dtype: torch.dtype | None  # in which the weights of a layer are gathered; None: as they are, in fp32
    offload: bool = False  # whether the parts of this rank are in the memory of the host

    def __call__(self, model: TaskModel) -> None:
        """Replace the parameters of a model on the CPU by DTensors on the device of the mesh, in place.

        Each layer is gathered by itself, and all other parameters together. In bf16 the weights of a layer are gathered
        as autocast would cast them, and their gradients are summed in fp32. The norms of all layers, which autocast
        leaves in fp32, are one more group. So the results are those of one device.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        layers = sharded_layers(model)
        shared: dict[str, Any] = {"mesh": self.mesh}
        shared["offload_policy"] = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        policy = MixedPrecisionPolicy()
        if self.dtype is not None:
            policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            if norms := [module for layer in layers for module in layer.modules() if _is_in_fp32(module)]:
                fully_shard(norms, reshard_after_forward=False, **shared)
        for layer in layers:
            fully_shard(layer, mp_policy=policy, **shared)
        fully_shard(model, **shared)
        # In a backward each module gathers the layer below it ahead. By default it is the one that ran before it, which
        # differs between the ranks after an evaluation of different texts: then they would wait for each other forever.
        below = dict(zip(layers[1:], layers[:-1], strict=True)) | {model: layers[-1]} if layers else {}
        for module in sharded_modules(model):
            module.set_modules_to_backward_prefetch([below.get(module, model)])  # the model's own is gathered already


def _is_in_fp32(module: nn.Module) -> bool:
    """Return whether autocast computes with the parameters of a module in fp32: whether it has some, and no matrix."""
    own = [*module.parameters(recurse=False)]
    return bool(own) and all(p.ndim < 2 for p in own)


def sharded_layers(model: nn.Module) -> list[Any]:
    """Return the modules that are gathered one at a time: the layers of all stacks, which have the name `layers`."""
    stacks = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers"]
    return [layer for stack in stacks if isinstance(stack, nn.ModuleList) for layer in stack]


def plan_sharding(strategy: str, precision: str, offload: bool, ranks: Ranks) -> Sharding | None:
    """Return how a run is sharded, None where each rank has the whole model: with ddp, and on a single rank.

    offload: optim.offload, for a GPU.
    Raises ConfigError for a torch that is too old, and where hsdp meets machines with different numbers of ranks.
    """
    if strategy == "ddp" or ranks.world_size == 1:
        return None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH:
        raise ConfigError(
            f"distributed.strategy = {strategy} needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer, and this is torch "
            f"{torch.__version__}: install a newer one, or set it to ddp"
        )
    from torch.distributed.device_mesh import init_device_mesh

    shape: tuple[int, ...] = (ranks.world_size,)
    if strategy == "hsdp":
        counts = all_gather(read_variable("LOCAL_WORLD_SIZE", ranks.world_size))
        if len({*counts}) > 1:
            raise ConfigError(
                f"distributed.strategy = hsdp needs the same number of ranks on each machine, and they have "
                f"{min(counts)} to {max(counts)}: start them with one --nproc-per-node, or use fsdp"
            )
        if not counts[0] or ranks.world_size % counts[0]:
            raise ConfigError(
                f"distributed.strategy = hsdp: LOCAL_WORLD_SIZE = {counts[0]} on each machine, which should divide "
                f"WORLD_SIZE = {ranks.world_size}: start the ranks with torchrun"
            )
        if counts[0] < ranks.world_size:
            shape = (ranks.world_size // counts[0], counts[0])
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    dtype = torch.bfloat16 if precision == "bf16" else None
    return_freed_memory(ranks.device)  # before the model is built, whose whole parameters are freed when it is sharded
    return Sharding(mesh, dtype, offload and ranks.device.type == "cuda")


def describe_sharding(strategy: str, shard: Sharding | None, model: nn.Module) -> list[str]:
    """Return a note on what each rank keeps, and on what an evaluation gathers; none with ddp."""
    if strategy == "ddp":
        return []
    if shard is None:
        return [f"distributed.strategy = {strategy}: a single rank has nothing to shard, and keeps the whole model"]
    kept = sum(local(p).numel() for p in model.parameters())
    text = f"distributed.strategy = {strategy}: {shard.mesh.shape[-1]} ranks share the weights, this one has {kept:,}"
    if shard.mesh.ndim > 1:
        text += f"; each of {shard.mesh.shape[0]} machines has all of them"
    elif strategy == "hsdp":
        text += "; on a single machine it is fsdp"
    return [text + "; an evaluation gathers all of them on every rank"]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Give every rank all weights of a sharded model inside the block, in the precision of training.

    Then a forward has no collectives: ranks may have different numbers of batches, write texts of different lengths,
    or split a batch that does not fit. Call it on all ranks; it does nothing for a model that is not sharded.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()
        for layer in sharded_layers(model) if modules else []:
            layer.set_reshard_after_forward(True, recurse=False)
