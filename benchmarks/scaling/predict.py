"""Predict a training step: one small function for each term of the model, each with its source.

The step of a rank is a sum of
- compute: products and attention at the rates of the machine, all other bytes at its memory bandwidth; the optimizer;
- what of the communication does not fit behind the compute (exposed);
- the host's own collectives.

All ranks are equally fast; waiting for a slower one, evaluation and checkpoints are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling.machines import Machine
from benchmarks.scaling.work import BF16, FP32, Unit, Work
from engine.memory import USABLE_SHARE

STRATEGIES = ("ddp", "fsdp", "hsdp")
BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once: its default
OPTIMIZER_TRAFFIC = 40  # bytes for each parameter: norm 4, clipping 8, AdamW reads 16 and writes 12
OPTIMIZER_BYTES = 8  # the two averages of AdamW in fp32, for each parameter
# Sums of host values for which a device waits: the targets of a step. Whether a rank ran out of memory is summed while
# the device is still busy with the backward (engine/train.py).
HOST_COLLECTIVES = 1
TREE_RATE = 0.9  # a tree's bandwidth, relative to a ring's (NCCL, tuning.cc)
GATHERED_AT_ONCE = 2  # the layer that is computed, and the next one, whose gather has begun


@dataclass(frozen=True)
class Plan:
    """How a step is computed."""

    strategy: str
    world_size: int
    micro_batch: int  # examples
    accumulation: int = 1  # micro-batches of a rank in a step
    checkpointing: bool = False
    weight_bytes: int = BF16  # of a weight as FSDP gathers it
    local_size: int = 0  # ranks of a machine; 0: as the machine has


@dataclass(frozen=True)
class Group:
    """The ranks of a collective: `machines` times `ranks`."""

    machines: int
    ranks: int

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self.machines * self.ranks


@dataclass(frozen=True)
class Compute:
    """Seconds of a rank: of each layer in a micro-batch, of the rest of the model, and of the end of a step."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    root_forward: float
    root_backward: float
    optimizer: float  # for all parameters, as one rank has them with ddp

    @property
    def micro_batch(self) -> float:
        """Return the seconds of forward and backward."""
        return sum(self.forward) + sum(self.backward) + self.root_forward + self.root_backward


@dataclass(frozen=True)
class Step:
    """A predicted step of a rank. All times in seconds, all sizes in bytes."""

    plan: Plan
    seconds: float
    compute: float
    communication: float  # of the devices, whether or not something is computed meanwhile
    exposed: float  # the part of it in which nothing is computed
    host: float  # collectives of host values
    sent: float  # bytes that a rank sends
    memory: dict[str, float]
    mfu: float

    @property
    def total_memory(self) -> float:
        """Return the bytes of a rank."""
        return sum(self.memory.values())


# Collectives: Thakur et al. 2005, "Optimization of collective communication operations in MPICH"; NCCL's tuning.cc.


def split_ranks(world_size: int, local_size: int) -> Group:
    """Return the group of all ranks: machines of local_size ranks, or a part of one machine."""
    return Group(max(1, world_size // local_size), min(world_size, local_size))


def bandwidth(group: Group, machine: Machine) -> float:
    """Return the bytes/s of a ring at each rank: the slower of the links inside a machine and all those that leave it.

    The ring is cut into one for each rank of a machine, so that each uses its own link to the network.
    """
    if group.machines == 1:
        return machine.inside.bandwidth
    outward = group.ranks * machine.between.bandwidth
    return outward if group.ranks == 1 else min(machine.inside.bandwidth, outward)


def ring_latency(group: Group, machine: Machine) -> float:
    """Return the seconds of the size - 1 steps once around the ring: machines - 1 of them leave a machine."""
    return (group.size - group.machines) * machine.inside.hop + (group.machines - 1) * machine.between.hop


def gather_seconds(size: float, group: Group, machine: Machine, rate: float = 1.0) -> float:
    """Return the seconds of a ring all-gather or reduce-scatter of `size` bytes in total: (n - 1) / n of them pass."""
    if group.size == 1:
        return 0.0
    passed = (group.size - 1) / group.size * size
    return machine.start + ring_latency(group, machine) + passed / (rate * bandwidth(group, machine))


def reduce_seconds(size: float, group: Group, machine: Machine) -> float:
    """Return the seconds of an all-reduce of `size` bytes: of a ring, or of a tree where that is faster."""
    if group.size == 1:
        return 0.0
    passed, rate = 2 * (group.size - 1) / group.size * size, bandwidth(group, machine)
    ring = machine.start + 2 * ring_latency(group, machine) + passed / rate
    depth = (group.ranks - 1) * machine.inside.tree_hop + math.log2(group.machines) * machine.between.tree_hop
    return min(ring, machine.start + 2 * depth + 2 * size / (TREE_RATE * rate))


def host_seconds(world_size: int, machine: Machine) -> float:
    """Return the seconds of the host's sums in a step: gloo's ring takes 2 (W - 1) steps, whatever the size."""
    return HOST_COLLECTIVES * 2 * (world_size - 1) * machine.host_hop


# Compute


def compute_seconds(work: Work, plan: Plan, machine: Machine, correction: float = 1.0) -> Compute:
    """Return the seconds of a rank. correction: measured over predicted, on the same device.

    Forward takes a third and backward two, as of the FLOPs; with checkpointing the layers have a second forward.
    """
    examples = plan.micro_batch

    def seconds(unit: Unit, attention: float, traffic: float) -> float:
        return (
            (unit.flops - attention) / machine.products
            + attention / machine.attention
            + (traffic / machine.memory_bandwidth)
        )

    in_layers = sum(unit.flops for unit in work.layers)
    weights = work.weight_traffic / machine.memory_bandwidth / len(work.layers)
    least = work.kernels * machine.launch / len(work.layers)  # the host's time for the kernels of a layer
    layers = [
        correction
        * max(
            least,
            weights
            + examples
            * seconds(unit, work.attention * unit.flops / in_layers, unit.layer.traffic if unit.layer else 0.0),
        )
        for unit in work.layers
    ]
    logits = work.traffic - sum(unit.layer.traffic for unit in work.layers if unit.layer)
    root = correction * examples * seconds(work.root, 0.0, logits)
    recomputed = 1 if plan.checkpointing else 0
    return Compute(
        tuple(t / 3 for t in layers),
        tuple(t * (2 + recomputed) / 3 for t in layers),
        root / 3,
        2 * root / 3,
        correction * OPTIMIZER_TRAFFIC * work.parameters / machine.memory_bandwidth,
    )


# Communication beside compute


def backward_seconds(
    loss: float,
    layers: Sequence[tuple[float, float, float, float]],
    root: tuple[float, float],
) -> float:
    """Return the seconds of a backward beside its communication (Zhao et al. 2023, "PyTorch FSDP", section 3.3).

    A layer is gathered during the one before, and reduced during those behind it. Gathers and reduce-scatters share the
    links inside, one after the other; the all-reduces of hsdp have the links between machines for themselves.

    loss: of the root, during which the first layer is gathered. layers: (compute, gather, reduce-scatter, all-reduce)
    of each, in the order of the backward. root: its reduce-scatter and all-reduce, at the end.
    """
    now, between = loss, 0.0  # when the device and the links between machines are free again
    inside = gathered = layers[0][1]  # when the links inside are; when the next layer is gathered
    following = [gather for _, gather, _, _ in layers[1:]]
    for (compute, _, scatter, reduce), gather in zip(layers, [*following, 0.0], strict=True):
        now = max(now, gathered)
        inside = gathered = max(inside, now) + gather
        now += compute
        inside = max(inside, now) + scatter
        between = max(between, inside) + reduce
    inside = max(inside, now) + root[0]
    return max(inside, max(between, inside) + root[1])


def ddp_seconds(work: Work, compute: Compute, group: Group, machine: Machine) -> tuple[float, float]:
    """Return (seconds of forward and backward of the last micro-batch, of them all-reduces) with ddp.

    Buckets are reduced while the backward goes on (Li et al. 2020, "PyTorch Distributed", section 3.2.3). The first one
    is ready after its share of the backward; the last one, with the embeddings, only at the end.
    """
    total, last = FP32 * work.parameters, FP32 * work.root.parameters
    count = max(1, math.ceil((total - last) / BUCKET))
    before = count * reduce_seconds((total - last) / count, group, machine)
    at_the_end = reduce_seconds(last, group, machine)
    if not machine.overlaps:
        return compute.micro_batch + before + at_the_end, before + at_the_end
    backward = sum(compute.backward) + compute.root_backward
    forward = compute.micro_batch - backward
    first = backward / (count + 1)
    return forward + max(backward, first + before) + at_the_end, before + at_the_end


def fsdp_seconds(
    work: Work, compute: Compute, plan: Plan, groups: tuple[Group, Group], machine: Machine, is_last: bool
) -> tuple[float, float]:
    """Return (seconds of a micro-batch, of them collectives) with fsdp or hsdp.

    Each layer is gathered in the forward and again in the backward, and its gradient is reduced in fp32; the root is
    gathered once. groups: the ranks that share the parts of a parameter, and those that have the same part, between
    which hsdp reduces in the last micro-batch.
    """
    parts, copies = groups

    def gather(unit: Unit, width: int) -> float:
        return gather_seconds(width * unit.parameters, parts, machine, machine.gather_rate)

    def scatter(unit: Unit) -> float:
        return gather_seconds(FP32 * unit.parameters, parts, machine, machine.scatter_rate)

    def reduce(unit: Unit) -> float:
        return reduce_seconds(FP32 * unit.parameters / parts.size, copies, machine) if is_last else 0.0

    gathers = [gather(unit, plan.weight_bytes) for unit in work.layers]
    scatters, reduces = [scatter(unit) for unit in work.layers], [reduce(unit) for unit in work.layers]
    root = (scatter(work.root), reduce(work.root))
    root_gather = gather(work.root, FP32)
    communication = root_gather + 2 * sum(gathers) + sum(scatters) + sum(reduces) + sum(root)
    if not machine.overlaps:
        return compute.micro_batch + communication, communication
    # Forward: the root and the first layer are waited for; each other layer is gathered during the one before.
    forward = sum(max(pair) for pair in zip(compute.forward, [*gathers[1:], 0.0], strict=True))
    layers = list(zip(compute.backward, gathers, scatters, reduces, strict=True))[::-1]
    backward = backward_seconds(compute.root_forward + compute.root_backward, layers, root)
    return root_gather + gathers[0] + forward + backward, communication


def sent_bytes(work: Work, plan: Plan, groups: tuple[Group, Group]) -> float:
    """Return the bytes that a rank sends in a step, with rings."""
    parts, copies = groups
    share = (parts.size - 1) / parts.size
    if plan.strategy == "ddp":
        return 2 * share * FP32 * work.parameters
    in_layers = work.parameters - work.root.parameters
    gathered = 2 * plan.weight_bytes * in_layers + FP32 * work.root.parameters
    between = 2 * (copies.size - 1) / copies.size * FP32 * work.parameters / parts.size
    return plan.accumulation * share * (gathered + FP32 * work.parameters) + between


def memory_bytes(work: Work, plan: Plan, parts: int) -> dict[str, float]:
    """Return the bytes of a rank by what they are for. parts: the ranks among which a parameter is divided."""
    states = {
        "weights": FP32 * work.parameters / parts,
        "gradients": FP32 * work.parameters / parts,
        "optimizer": OPTIMIZER_BYTES * work.parameters / parts,
    }
    if plan.strategy == "ddp":
        copies = BF16 * work.matrices if plan.weight_bytes == BF16 else 0
    else:  # gathered weights of layers, their whole gradients before they are reduced, and both of the root
        layer = GATHERED_AT_ONCE * work.largest
        copies = layer * (2 * plan.weight_bytes + FP32) + 2 * FP32 * work.root.parameters
    kept = plan.micro_batch * work.kept(plan.checkpointing)
    return states | {"copies": copies, "activations": kept, "loss": work.loss_bytes(plan.micro_batch)}


def choose_groups(plan: Plan, machine: Machine) -> tuple[Group, Group]:
    """Return (the ranks that divide a parameter, or with ddp all; the ranks that have the same part of it)."""
    every = split_ranks(plan.world_size, plan.local_size or machine.ranks)
    if plan.strategy == "hsdp":
        return Group(1, every.ranks), Group(every.machines, 1)
    return every, Group(1, 1)


def predict_step(
    work: Work, plan: Plan, machine: Machine, correction: float = 1.0, compute: Compute | None = None
) -> Step:
    """Return the step of a rank. compute: that of a device alone, where it was measured instead of predicted."""
    compute = compute or compute_seconds(work, plan, machine, correction)
    groups = choose_groups(plan, machine)
    parts = 1 if plan.strategy == "ddp" else groups[0].size
    if plan.strategy == "ddp":
        last, communication = ddp_seconds(work, compute, groups[0], machine)
        seconds = (plan.accumulation - 1) * compute.micro_batch + last
    else:
        one, each = fsdp_seconds(work, compute, plan, groups, machine, is_last=False)
        last, at_the_end = fsdp_seconds(work, compute, plan, groups, machine, is_last=True)
        seconds = (plan.accumulation - 1) * one + last
        communication = (plan.accumulation - 1) * each + at_the_end
    computed = plan.accumulation * compute.micro_batch + compute.optimizer / parts
    seconds += compute.optimizer / parts
    slowdown = machine.slowdown(plan.world_size)
    host = host_seconds(plan.world_size, machine) * slowdown
    whole = seconds * slowdown + host
    return Step(
        plan,
        whole,
        computed * slowdown,
        communication * slowdown,
        max(0.0, seconds - computed) * slowdown,
        host,
        sent_bytes(work, plan, groups),
        memory_bytes(work, plan, parts),
        plan.accumulation * plan.micro_batch * work.flops / whole / machine.stated,
    )


def fits(step: Step, machine: Machine) -> bool:
    """Return whether a step fits into the share of the memory that the engine plans with."""
    return step.total_memory <= USABLE_SHARE * machine.memory


def find_plans(work: Work, world_size: int, largest: int, machine: Machine, **options: Any) -> dict[str, Step | None]:
    """Return {strategy: its fastest step that fits, by examples per second; None where no example fits}.

    Micro-batches are powers of two up to `largest`, each with and without checkpointing. hsdp on one machine is fsdp.
    """
    found = dict[str, Step | None]()
    sizes = [2**i for i in range(largest.bit_length())]
    for strategy in STRATEGIES:
        if strategy == "hsdp" and world_size <= machine.ranks:
            continue
        steps = [
            predict_step(work, Plan(strategy, world_size, size, checkpointing=checkpointing), machine, **options)
            for size in sizes
            for checkpointing in (False, True)
        ]
        steps = [step for step in steps if fits(step, machine)]
        found[strategy] = max(steps, key=lambda step: step.plan.micro_batch / step.seconds, default=None)
    return found


def least_examples(work: Work, step: Step, machine: Machine, share: float, **options: Any) -> int | None:
    """Return the fewest examples of a rank in a step with which at most `share` of it is exposed or the host's.

    Powers of two, up to 2^16, in micro-batches of the step's size. None: more than these.
    """
    plan = step.plan
    for i in range(17):
        examples = 1 << i
        size = min(examples, plan.micro_batch)
        smaller = Plan(plan.strategy, plan.world_size, size, examples // size, plan.checkpointing, plan.weight_bytes)
        shorter = predict_step(work, smaller, machine, **options)
        if shorter.exposed + shorter.host <= share * shorter.seconds:
            return examples
    return None
