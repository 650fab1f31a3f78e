"""Compare `engine.train` with other trainers on the same workloads, each used as its users use it:

    python -m benchmarks.peers [WORKLOAD ...] [--peers hf,hf-grouped,...] [--runs 5] [--steps N] [--check] [--shrink]

All sides have the same files, initial weights, batch size, number of optimizer steps and dropout. They use AdamW,
gradient clipping and a linear schedule, in fp32 on the CPU. (benchmarks.gpu_check runs them in bf16 on a GPU.) Each run
is a separate process; the sides alternate. Before the timed runs, each side takes one step on the same examples without
dropout. Its loss and gradient norm must equal ours; --check stops there. In the timed runs each side has its own order
of the examples, with the seed of the round.

Printed for each workload, as median (minimum - maximum):
- samples/s of the training loop without its first fifth of steps. The sides read examples of different lengths. So this
  is non-pad tokens per second over the mean number of tokens per example in the pool. Images are counted directly.
- the peak memory of the process, and the seconds from its start to the end of the first optimizer step.
- the ratios of the two runs of each round. They are "not resolved" if 1 lies between their minimum and maximum.

The peers:
- hf: HF Trainer. hf-grouped: with train_sampling_strategy="group_by_length", the stricter comparison. Its sampler
  orders an epoch by length, so the measured steps are spread evenly over a whole epoch.
- accelerate, lightning: transformers' model in their loops. plain: transformers' model in a loop written by hand.
- nanogpt: GPT-2 as nanoGPT computes it. timm: its ViT.

transformers and accelerate are required. A peer whose package is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record
from benchmarks.loading import format_spread, run_python
from benchmarks.workloads import WORKLOADS
from engine.config import read_recipe
from engine.tasks import TASKS

# Optimizer steps of a run; the slowest peer needs some minutes on two cores.
STEPS = {
    "minilm-short": 60,
    "minilm-long": 24,
    "gpt2-dialogue": 15,
    "gpt2-blocks": 12,
    "t5-small": 15,
    "vit-tiny": 30,
    "vit-base": 6,
}
SHRUNK_STEPS, OTHER_STEPS = 5, 20
OURS = "ours"
PACKAGES = {  # the package of each peer
    "hf": "accelerate",
    "hf-grouped": "accelerate",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "plain": "transformers",
    "nanogpt": "transformers",
    "timm": "timm",
}
SAME_LOSS, SAME_NORM = 1e-4, 1e-3  # relative tolerances; another order of summation in fp32 causes 1e-6


def suits(peer: str, workload: str) -> bool:
    """Return whether a peer can run a workload. Grouping needs lengths that differ; nanogpt and timm have one model."""
    task = WORKLOADS[workload].task
    if peer == "hf-grouped":
        return task not in ("image-classification", "causal-lm")
    if peer == "timm":
        return task == "image-classification"
    return peer != "nanogpt" or task in ("causal-lm", "dialogue")


FIGURES = ("samples_per_second", "peak_memory_mb", "first_step_seconds")


@dataclass
class Side:
    """The result of the check, and the figures of every timed round: a number for each of FIGURES."""

    loss: float
    grad_norm: float
    runs: list[dict[str, float]] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        """Return one figure of every round."""
        return [run[figure] for run in self.runs]


class Bench:
    """One workload: its files are in `files`, and the processes that run it write to `scratch`."""

    def __init__(self, workload: str, files: Path, scratch: Path, steps: int, shrink: bool):
        self.workload, self.scratch, self.num_runs = workload, scratch, 0
        self.arguments = prepare_in_new_process(workload, files, shrink)
        self.recipe = read_recipe(self.arguments[0])
        self.steps = steps or (SHRUNK_STEPS if shrink else STEPS.get(workload, OTHER_STEPS))
        self.warm_up = max(1, self.steps // 5)
        self.sides: dict[str, Side] = {}

    def run_side(self, side: str, **changes: Any) -> tuple[dict[str, Any], float, float]:
        """Run a side and return (what it wrote, peak MB, seconds to the first step). Raises SystemExit if it fails."""
        self.num_runs += 1
        path = self.scratch / f"{self.workload}-{self.num_runs}-{side}"
        job = self.job(path, **changes)
        path.with_suffix(".job").write_text(json.dumps(job))
        program = f"from benchmarks.peers.trainers import main; main({side!r}, {str(path.with_suffix('.job'))!r})"
        output = path.with_suffix(".txt")
        began = time.perf_counter()
        try:
            _, peak = run_python(program, str(output))
            figures = json.loads(Path(job["out"]).read_text())
        except (SystemExit, OSError):
            printed = output.read_text(errors="replace").strip()
            raise SystemExit(f"{printed}\n\n{self.workload}: a run of {side} failed; its output is above") from None
        return figures, figures.get("peak_memory_mb", peak), figures["ends"][0] - began

    def job(self, path: Path, **changes: Any) -> dict[str, Any]:
        """Return what trainers.py reads. changes: steps, seed, check, examples, device, precision, compile."""
        recipe = self.recipe
        data = TASKS[recipe.run.task].columns.fill(recipe.data)
        job: dict[str, Any] = {"steps": self.steps, "warm_up": self.warm_up, "seed": 0, "check": False, "examples": []}
        job |= {"device": "cpu", "precision": "fp32", "compile": False} | changes
        arguments = [*self.arguments, f"--run.folder={path}", f"--run.seed={job['seed']}"]
        arguments += [f"--run.device={job['device']}", f"--train.precision={job['precision']}"]
        arguments += ["--train.compile=true"] if job["compile"] else []
        arguments += [f"--train.max_steps={job['steps']}", f"--log.every_steps={job['steps']}"]
        arguments += ["--model.dropout.all=0"] if job["check"] else []
        return job | {
            "out": str(path.with_suffix(".json")),
            "arguments": arguments,
            "task": recipe.run.task,
            "model": recipe.model.name,
            "train": data.train,
            "text_column": data.text_column,
            "label_column": data.label_column,
            "source_prefix": recipe.seq2seq.source_prefix,
            "max_length": data.max_length,
            "num_workers": data.num_workers,
            "max_target_length": recipe.seq2seq.max_target_length,
            "batch_size": recipe.train.global_batch_size,
            "max_grad_norm": recipe.train.max_grad_norm,
            "lr": recipe.optim.lr,
            "warmup_steps": recipe.optim.warmup_steps,
            "weight_decay": recipe.optim.weight_decay,
        }

    def check(self, peers: list[str]) -> None:
        """Take one step per side on the same examples without dropout; leave out peers whose step differs from ours."""
        ours, _, _ = self.run_side(OURS, steps=1, check=True)
        self.sides = {OURS: Side(ours["loss"], ours["grad_norm"])}
        print(f"  first step of {OURS:<12} loss {ours['loss']:.6f}  gradient norm {ours['grad_norm']:.6f}", flush=True)
        for peer in peers:
            try:
                figures, _, _ = self.run_side(peer, steps=1, check=True, examples=ours["examples"])
            except SystemExit as failed:
                print(f"{failed}; it is left out", flush=True)
                continue
            side = Side(figures["loss"], figures["grad_norm"])
            loss, norm = (abs(a / b - 1) for a, b in ((side.loss, ours["loss"]), (side.grad_norm, ours["grad_norm"])))
            same = loss <= SAME_LOSS and norm <= SAME_NORM
            if same:
                self.sides[peer] = side
            print(
                f"  first step of {peer:<12} loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
                f"{'' if same else ': NOT THE SAME STEP, left out'}",
                flush=True,
            )

    def run_round(self, number: int) -> None:
        """Run every side once, in reverse order in every other round."""
        measured = {}
        for name in list(self.sides)[:: -1 if number % 2 else 1]:
            figures, peak, first = self.run_side(name, seed=number)
            seconds = figures["ends"][-1] - figures["ends"][self.warm_up - 1]
            rate = sum(figures["tokens"][self.warm_up :]) / figures["pool"] / seconds
            measured[name] = dict(zip(FIGURES, (rate, peak, first), strict=True))
        for name, figures in measured.items():  # complete rounds only, so that runs stay paired
            self.sides[name].runs.append(figures)

    def run_rounds(self, runs: int, rows: list[dict[str, Any]]) -> None:
        """Print the table of all rounds and add it to `rows`; after an interrupt, that of the complete rounds."""
        try:
            for number in tqdm(range(runs), desc=self.workload, unit="round", disable=not sys.stderr.isatty()):
                self.run_round(number)
        finally:
            if self.sides[OURS].runs:
                print(self.table(), flush=True)
                common = {"work": self.workload, "steps": self.steps, "warmup": self.warm_up}
                rows += [common | {"variant": name, **asdict(side)} for name, side in self.sides.items()]

    def table(self) -> str:
        """Return the figures of every side, and the ratios to each peer."""
        ours = self.sides[OURS]
        lines = [
            f"\n{self.workload}: {self.steps} steps of {self.recipe.train.global_batch_size} examples, the first "
            f"{self.warm_up} not timed; {len(ours.runs)} rounds, median (minimum - maximum)",
            f"  {'':<18}{'samples/s':<28}{'peak MB':<28}{'seconds to the first step'}",
        ]
        for name, side in self.sides.items():
            lines.append(f"  {name:<18}" + "".join(f"{format_spread(side.values(figure)):<28}" for figure in FIGURES))
        for name, side in self.sides.items():
            if name != OURS:
                our_values, their_values = ({figure: one.values(figure) for figure in FIGURES} for one in (ours, side))
                speed, memory, start = FIGURES
                rows = (
                    ("times as fast", ratios(our_values[speed], their_values[speed])),
                    ("of its memory", ratios(our_values[memory], their_values[memory])),
                    ("times as soon", ratios(their_values[start], our_values[start])),
                )
                lines += [f"  ours, {label} as {name:<12}{verdict(values)}" for label, values in rows]
        return "\n".join(lines)


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the ratio of the two runs of each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def verdict(values: list[float]) -> str:
    """Return the ratios as text; "not resolved" if 1 lies between them or there is only one."""
    resolved = len(values) > 1 and not min(values) <= 1 <= max(values)
    return format_spread(values) + ("" if resolved else "  not resolved")


def prepare_in_new_process(workload: str, files: Path, shrink: bool) -> list[str]:
    """Run workloads.prepare in a new process: on Linux, the peak memory of a process starts at that of its parent."""
    command = [sys.executable, "-m", "benchmarks.workloads", workload, str(files), *(["--shrink"] if shrink else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{workload}: its files could not be written")
    return done.stdout.splitlines()


def choose_peers(names: list[str], workload: str) -> list[str]:
    """Return the peers that suit the workload and are installed; print those that are not installed."""
    chosen = [name for name in names if suits(name, workload)]
    missing = [
        name for name in chosen if any(importlib.util.find_spec(p) is None for p in (PACKAGES[name], "transformers"))
    ]
    for name in missing:
        print(f"  {name}: not installed (pip install {PACKAGES[name]} transformers)")
    return [name for name in chosen if name not in missing]


def main() -> None:
    """Run the comparison and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help=f"from {', '.join(WORKLOADS)}; default {', '.join(STEPS)}"
    )
    parser.add_argument("--peers", default=",".join(PACKAGES), help="comma-separated; default all")
    parser.add_argument("--runs", type=int, default=5, help="rounds of all sides")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of a run; default 0: by workload")
    parser.add_argument("--check", action="store_true", help="only check that all sides take the same step")
    parser.add_argument("--shrink", action="store_true", help="tiny workloads, to try the command")
    parser.add_argument("--files", type=Path, help="folder of the prepared workloads; default: temporary")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder for the JSON file")
    arguments = parser.parse_args()
    workloads, peers = arguments.workloads or list(STEPS), arguments.peers.split(",")
    for argument, names, known in (("WORKLOAD", workloads, WORKLOADS), ("--peers", peers, PACKAGES)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{argument}: {unknown[0]!r} is not one of {', '.join(known)}")
    if arguments.runs < 1 or arguments.steps < 0 or arguments.steps == 1:
        parser.error("--runs must be at least 1 and --steps at least 2, since the first step is not timed")
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for workload in workloads:
                print(f"\n{workload}", flush=True)
                files = arguments.files or Path(temporary)
                bench = Bench(workload, files, Path(temporary), arguments.steps, arguments.shrink)
                bench.check(choose_peers(peers, workload))
                if not arguments.check:
                    bench.run_rounds(arguments.runs, rows)
    except KeyboardInterrupt:
        print("\ninterrupted; the complete rounds are kept")
    finally:
        if rows:
            print(f"\nwritten to {record.write(arguments.history, 'peers', rows)}")
