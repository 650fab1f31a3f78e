"""The numbers of machines that the predictions use, each with its source.

- published: the vendor's datasheet (H100 and H200 SXM, ConnectX-7).
- NCCL: the constants of its own model of its collectives, src/graph/tuning.cc, protocol LL128. NCCL chooses its
  algorithm by them.
- assumed: no measurement on such a machine exists here. `--gpu-record` and `--device-step` replace the first four.

A CPU machine is made of what measure.py has measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import flops


@dataclass(frozen=True)
class Link:
    """A connection between ranks; the bandwidth is that of one rank in one direction."""

    bandwidth: float  # bytes/s that a collective reaches with large messages
    hop: float  # seconds of a step of a ring
    tree_hop: float  # seconds of a step of a tree


@dataclass(frozen=True)
class Machine:
    """Machines of `ranks` devices each, and the links inside and between them."""

    name: str
    stated: float  # FLOP/s of the datasheet, to which MFU refers
    products: float  # FLOP/s reached in matrix products
    attention: float  # FLOP/s reached in attention
    memory_bandwidth: float  # bytes/s reached
    memory: float  # bytes of a device
    ranks: int
    inside: Link
    between: Link
    start: float  # seconds before the first message of a collective
    launch: float  # seconds of the host for each kernel; the device waits where it is shorter itself
    host_hop: float  # seconds of a step of gloo's ring, which sums host values
    overlaps: bool = True  # whether collectives run while the device computes
    cores: int = 0  # ranks that can compute at once; 0: each rank has a device of its own
    gather_rate: float = 1.0  # bandwidth of an all-gather, relative to that of an all-reduce
    scatter_rate: float = 1.0  # the same of a reduce-scatter

    def slowdown(self, ranks_here: int) -> float:
        """Return how many times as long a rank takes because the ranks of its machine share `cores`."""
        return max(1.0, ranks_here / self.cores) if self.cores else 1.0


REACHED = 0.8  # assumed: share of a link's published bandwidth that large collectives reach
MEMORY_REACHED = 0.875  # assumed: 4.2 of the 4.8 TB/s of an H200 (tests/support/fake_gpu/published.py)
NVLINK = Link(450e9 * REACHED, hop=1.9e-6, tree_hop=1.25e-6)  # published: 900 GB/s, half in each direction; NCCL
NETWORK = Link(50e9 * REACHED, hop=4.0e-6, tree_hop=8.5e-6)  # published: 400 Gb/s for each device; NCCL
H100 = Machine(
    "H100",
    stated=flops.DATASHEETS["H100"]["bf16"] * 1e12,  # published
    products=790e12,  # assumed, as in tests/support/fake_gpu/published.py
    attention=400e12,  # assumed, as there
    memory_bandwidth=3.35e12 * MEMORY_REACHED,  # published
    memory=80e9,  # published
    ranks=8,
    inside=NVLINK,
    between=NETWORK,
    start=14e-6,  # NCCL
    launch=5e-6,  # assumed, as there
    host_hop=25e-6,  # assumed: a message of TCP between machines
)
H200 = replace(H100, name="H200", memory_bandwidth=4.8e12 * MEMORY_REACHED, memory=141e9)  # published
GPUS = (H100, H200)
