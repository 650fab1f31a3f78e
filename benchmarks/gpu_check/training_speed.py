"""Part 4: throughput, utilisation, memory, kernels and step times of published shapes, with pieces on and off.

Each case is a run of engine.train in its own process (benchmarks/timed_training.py). First every workload in bf16, then
without one piece at a time (benchmarks/switches.py), then compiled, then in other precisions. That a run without a
piece has the same losses is checked by part 2.
"""

from __future__ import annotations

from benchmarks.gpu_check.check import Check
from benchmarks.throughput import Bench, Case, FailedError

WORKLOADS = ("bert-base-ragged", "gpt2-1024", "vit-b16-224", "t5-base-512-128", "bert-base-128")
CHECKPOINTING = "train.activation_checkpointing=true"
STEPS = 20
SECONDS = 12  # of a case, at least
COMPILED_SECONDS = 45


def run(check: Check) -> None:
    """Time the cases until the time is over."""
    bench = Bench(
        check.files, check.scratch, [f"--run.device={check.device.type}"], 5 if check.shrink else STEPS, check.shrink
    )
    for case in cases(check):
        if not check.has_time_for(COMPILED_SECONDS if case.compiled else SECONDS, f"{case.workload}, {case.variant}"):
            continue
        try:
            check.add(case.workload, case.variant, **bench.run_case(case, split=False, launches=True))
        except FailedError as error:
            check.note(case.workload, f"{case.variant}: {error}")


def cases(check: Check) -> list[Case]:
    """Return all cases, the most informative first; on a CPU one of each kind."""
    ragged, blocks, images, pairs, equal = WORKLOADS
    if check.device.type == "cpu":
        return [Case(ragged, "fp32"), Case("vit-b16-224", "bf16", against=CHECKPOINTING), without(ragged, "flash")]
    plain = [Case(workload, "bf16") for workload in WORKLOADS]
    pieces = [without(ragged, "flash"), without(blocks, "large-chunks"), without(ragged, "joint-projections")]
    pieces += [without(ragged, "skipped-tokens"), without(ragged, "launched-optimizer")]
    attention = [Case(workload, "bf16", options=("--cudnn-attention=on",)) for workload in (blocks, ragged)]
    attention += [Case(images, "bf16", options=("--cudnn-attention=off",))]
    compiled = [Case(workload, "bf16", compiled=True) for workload in (ragged, blocks, images)]
    others = [Case(blocks, "bf16", against=CHECKPOINTING), Case(ragged, "fp16"), Case(ragged, "tf32")]
    others += [without(blocks, "aligned-vocabulary"), without(ragged, "fetch-ahead"), Case(ragged, "fp32")]
    last = [Case(workload, "bf16", compiled=True) for workload in (equal, pairs)]
    return [
        *plain,
        *pieces[:3],
        *attention[:1],
        *compiled[:1],
        *pieces[3:],
        *attention[1:],
        *compiled[1:],
        *others,
        *last,
    ]


def without(workload: str, piece: str) -> Case:
    """Return the case of a workload in bf16 without a piece of the engine."""
    return Case(workload, "bf16", options=(f"--without={piece}",))
