"""Part 4: throughput, utilisation, memory, kernels and step times of published shapes, with switches on and off.

Each case is a run of engine.train in its own process (benchmarks/timed_training.py). First every workload in bf16, then
compiled, then one switch at a time.
"""

from __future__ import annotations

from benchmarks.gpu_check.check import Check
from benchmarks.throughput import Bench, Case, FailedError

WORKLOADS = ("bert-base-ragged", "gpt2-1024", "vit-b16-224", "t5-base-512-128", "bert-base-128")
CHECKPOINTING = "train.activation_checkpointing=true"
STEPS = 20
SECONDS = 15  # of a case, at least


def run(check: Check) -> None:
    """Time the cases until the time is over."""
    bench = Bench(
        check.files, check.scratch, [f"--run.device={check.device.type}"], 5 if check.shrink else STEPS, check.shrink
    )
    for case in cases(check):
        if not check.has_time_for(SECONDS, f"{case.workload}, {case.variant}"):
            continue
        try:
            check.add(case.workload, case.variant, **bench.run_case(case, split=False, launches=True))
        except FailedError as error:
            check.note(case.workload, f"{case.variant}: {error}")


def cases(check: Check) -> list[Case]:
    """Return all cases, the most informative first; on a CPU one of each kind."""
    ragged, blocks, *_ = WORKLOADS
    if check.device.type == "cpu":
        return [Case(ragged, "fp32"), Case("vit-b16-224", "bf16", against=CHECKPOINTING)]
    plain = [Case(workload, "bf16") for workload in WORKLOADS]
    attention = [Case(workload, "bf16", options=("--cudnn-attention=on",)) for workload in (ragged, blocks)]
    compiled = [Case(workload, "bf16", compiled=True) for workload in WORKLOADS]
    others = [
        Case(blocks, "bf16", against=CHECKPOINTING),
        Case(ragged, "tf32"),
        Case(ragged, "fp32"),
        Case(ragged, "fp16"),
    ]
    return [*plain, *attention, *compiled, *others]
