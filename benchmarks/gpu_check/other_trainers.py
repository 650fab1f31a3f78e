"""Part 5: HF Trainer and timm on the same files and batches, in bf16, with their best settings (benchmarks/peers).

Ours is not run again: the table compares with part 4, by non-pad tokens per second. The steps of a grouped epoch are
spread evenly (peers/trainers.py). A peer whose package is missing is a note. If time is left, a first step in fp32
without dropout shows that both sides compute the same loss and gradient.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.check import Check, is_installed, relative_difference
from benchmarks.peers.compare_trainers import OURS, PACKAGES, SAME_LOSS, SAME_NORM, Bench

CASES = (  # (workload, peer, compiled): the best that a user can switch on first
    ("bert-base-ragged", "hf-grouped", False),
    ("gpt2-1024", "hf", False),
    ("vit-b16-224", "timm", False),
    ("t5-base-512-128", "hf", False),
    ("bert-base-ragged", "hf-grouped", True),
    ("gpt2-1024", "hf", True),
    ("vit-b16-224", "timm", True),
    ("bert-base-128", "hf", True),
    ("t5-base-512-128", "hf", True),
    ("vit-b16-224", "hf", False),
    ("bert-base-ragged", "hf", False),
    ("bert-base-128", "hf", False),
)
SAME_STEPS = (("bert-base-ragged", "hf"), ("gpt2-1024", "hf"), ("vit-b16-224", "timm"), ("t5-base-512-128", "hf"))
STEPS = 30  # less than an epoch of every workload with groups
SECONDS = 20  # of a run, at least


def run(check: Check) -> None:
    """Time the peers, then compare first steps."""
    on_gpu = check.device.type == "cuda"
    for workload, peer, compiled in CASES if on_gpu else (CASES[0], CASES[2]):
        time_peer(check, workload, peer, compiled, "bf16" if on_gpu else "fp32")
    for workload, peer in SAME_STEPS if on_gpu else SAME_STEPS[:1]:
        compare_first_steps(check, workload, peer)


def time_peer(check: Check, workload: str, peer: str, compiled: bool, precision: str) -> None:
    """Write the rates of a peer, without its first fifth of steps."""
    name = f"{peer} {precision}{' compiled' if compiled else ''}"
    if not is_possible(check, workload, peer, name):
        return
    try:
        figures, memory, _ = run_side(check, workload, peer, {"precision": precision, "compile": compiled})
    except SystemExit as error:
        check.note(workload, f"{name}: {last_line(error)}")
        return
    first = max(1, len(figures["ends"]) // 5)
    tokens = sum(figures["tokens"][first:]) / (figures["ends"][-1] - figures["ends"][first - 1])
    rates = {"samples_per_second": tokens / figures["pool"], "peak_memory_mb": memory}
    if not workload.startswith("vit"):  # an image counts as one token there
        rates["tokens_per_second"] = tokens
    check.add(workload, name, **rates)


def is_possible(check: Check, workload: str, peer: str, name: str) -> bool:
    """Return whether the peer is installed and time is left; if not, write a note."""
    if not is_installed(PACKAGES[peer], "transformers"):
        check.note(workload, f"{name}: {PACKAGES[peer]} is not installed")
        return False
    return check.has_time_for(0 if check.shrink else SECONDS, f"{workload}, {name}")


def run_side(check: Check, workload: str, side: str, changes: dict[str, Any]) -> tuple[dict[str, Any], float, float]:
    """Run one side as benchmarks.peers does; return what it wrote, its peak memory in MB, and when it took a step."""
    folder = check.scratch / str(len([*check.scratch.iterdir()]))
    folder.mkdir()
    bench = Bench(workload, check.files, folder, 0 if check.shrink else STEPS, check.shrink)
    return bench.run_side(side, device=check.device.type, **changes)


def compare_first_steps(check: Check, workload: str, peer: str) -> None:
    """Write a row on how far the losses and gradient norms of a step on the same examples are apart, in fp32."""
    name = f"first step of {peer}"
    if not is_possible(check, workload, peer, name):
        return
    one_step = {"steps": 1, "check": True}
    try:
        ours, _, _ = run_side(check, workload, OURS, one_step)
        theirs, _, _ = run_side(check, workload, peer, one_step | {"examples": ours["examples"]})
    except SystemExit as error:
        check.note(workload, f"{name}: {last_line(error)}")
        return
    loss, norm = (relative_difference([ours[figure]], [theirs[figure]]) for figure in ("loss", "grad_norm"))
    check.add(workload, name, ok=loss <= SAME_LOSS and norm <= SAME_NORM, loss_error=loss, gradient_error=norm)


def last_line(error: SystemExit) -> str:
    """Return the last line of what a failed run printed, before the sentence that says so."""
    lines = [line for line in str(error).splitlines()[:-1] if line.strip()]
    return lines[-1].strip()[:200] if lines else str(error)
