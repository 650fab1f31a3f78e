"""The same work by `engine.train` and by its peers, each as its users run it:

    python -m benchmarks.peers [WORK ...] [--peers hf,hf-grouped,...] [--runs 5] [--steps N] [--check] [--shrink]

The same files, initial weights, batch size, number of optimizer steps, AdamW, clipping, linear schedule, and dropout as
the checkpoint says, in fp32 on the CPU. Each run is a process of its own, and the sides take turns. Before anything is
timed each side takes one step on the same examples without dropout, and its loss and gradient norm must be ours;
--check stops there. Afterwards the order of the examples is each side's own, with the seed of the round.

Printed for each work, as the median with the least and the most:
- samples/s of the training loop, its first fifth of steps left out. Sides draw examples of other lengths, so this is
  non-pad tokens a second over the mean tokens of an example in the whole pool (of images: just samples).
- the peak memory of the process, and the seconds from its start to the end of the first optimizer step.
- the ratios of the two runs of each round. Where they lie on both sides of 1, nothing is resolved.

hf: HF Trainer. hf-grouped: with train_sampling_strategy="group_by_length", the honest peer; as its sampler orders an
epoch by length, its steps are spread evenly over a whole epoch. accelerate, lightning: transformers' model in their
loops. plain: in one by hand. nanogpt: GPT-2 written as nanoGPT has it. timm: its ViT. All read images from the same
JPEG files. Needs transformers and accelerate; a side whose package is missing is left out.
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
from benchmarks.loading import run, spread
from benchmarks.works import WORKS
from engine.config import read_recipe
from engine.tasks import TASKS

# Optimizer steps of a run, so that the slowest peer needs some minutes on two cores.
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
PACKAGES = {  # each peer, and what it is or needs
    "hf": "accelerate",
    "hf-grouped": "accelerate",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "plain": "transformers",
    "nanogpt": "transformers",
    "timm": "timm",
}
SAME_LOSS, SAME_NORM = 1e-4, 1e-3  # relative; another order of sums in fp32 makes 1e-6


def suits(peer: str, work: str) -> bool:
    """Grouping needs lengths that differ; nanogpt and timm know one model each."""
    of_images, of_blocks = WORKS[work].task == "image-classification", WORKS[work].task == "causal-lm"
    if peer == "hf-grouped":
        return not (of_images or of_blocks)
    if peer == "timm":
        return of_images
    return peer != "nanogpt" or of_blocks or WORKS[work].task == "dialogue"


FIGURES = ("samples_per_second", "peak_memory_mb", "first_step_seconds")


@dataclass
class Side:
    """What one step of the check gave, and what was measured in each round: a number for each of FIGURES."""

    loss: float
    grad_norm: float
    runs: list[dict[str, float]] = field(default_factory=list)

    def all(self, figure: str) -> list[float]:
        return [run[figure] for run in self.runs]


class Bench:
    """One work, its files below `files`, and the processes that do it, which write below `scratch`."""

    def __init__(self, work: str, files: Path, scratch: Path, steps: int, shrink: bool):
        self.work, self.scratch, self.runs = work, scratch, 0
        self.arguments = prepared(work, files, shrink)
        self.recipe = read_recipe(self.arguments[0])
        self.steps = steps or (SHRUNK_STEPS if shrink else STEPS.get(work, OTHER_STEPS))
        self.warmup = max(1, self.steps // 5)
        self.sides: dict[str, Side] = {}

    def run(self, side: str, **changes: Any) -> tuple[dict[str, Any], float, float]:
        """(what a run of this side wrote, its peak MB, its seconds to the first step); SystemExit where it fails."""
        self.runs += 1
        place = self.scratch / f"{self.work}-{self.runs}-{side}"
        job = self.job(place, **changes)
        place.with_suffix(".job").write_text(json.dumps(job))
        program = f"from benchmarks.peers.runs import main; main({side!r}, {str(place.with_suffix('.job'))!r})"
        output = place.with_suffix(".txt")
        began = time.perf_counter()
        try:
            _, peak = run(program, str(output))
            figures = json.loads(Path(job["out"]).read_text())
        except (SystemExit, OSError):
            said = output.read_text(errors="replace").strip()
            raise SystemExit(f"{said}\n\n{self.work}: a run of {side} failed, as it says above") from None
        return figures, peak, figures["ends"][0] - began

    def job(self, place: Path, **changes: Any) -> dict[str, Any]:
        """What benchmarks/peers/runs.py reads. changes: of steps, seed, check and examples."""
        recipe = self.recipe
        data = TASKS[recipe.run.task].columns.fill(recipe.data)
        job: dict[str, Any] = {"steps": self.steps, "seed": 0, "check": False, "examples": []} | changes
        arguments = [*self.arguments, f"--run.folder={place}", f"--run.seed={job['seed']}", "--run.device=cpu"]
        arguments += [f"--train.max_steps={job['steps']}", f"--log.every_steps={job['steps']}"]
        arguments += ["--model.dropout.all=0"] if job["check"] else []
        return job | {
            "out": str(place.with_suffix(".json")),
            "arguments": arguments,
            "task": recipe.run.task,
            "model": recipe.model.name,
            "train": data.train,
            "text": data.text_column,
            "label": data.label_column,
            "prefix": recipe.seq2seq.source_prefix,
            "max_length": data.max_length,
            "max_target_length": recipe.seq2seq.max_target_length,
            "batch_size": recipe.train.global_batch_size,
            "clip_norm": recipe.train.max_grad_norm,
            "lr": recipe.optim.lr,
            "warmup": recipe.optim.warmup_steps,
            "weight_decay": recipe.optim.weight_decay,
        }

    def check(self, peers: list[str]) -> None:
        """One step of each side on the same examples without dropout; a peer that learns something else is left out."""
        ours, _, _ = self.run(OURS, steps=1, check=True)
        self.sides = {OURS: Side(ours["loss"], ours["grad_norm"])}
        print(
            f"  the first step of {OURS:<12} loss {ours['loss']:.6f}  gradient norm {ours['grad_norm']:.6f}", flush=True
        )
        for peer in peers:
            try:
                figures, _, _ = self.run(peer, steps=1, check=True, examples=ours["examples"])
            except SystemExit as failed:
                print(f"{failed}; it is left out", flush=True)
                continue
            side = Side(figures["loss"], figures["grad_norm"])
            loss, norm = (abs(a / b - 1) for a, b in ((side.loss, ours["loss"]), (side.grad_norm, ours["grad_norm"])))
            same = loss <= SAME_LOSS and norm <= SAME_NORM
            if same:
                self.sides[peer] = side
            print(
                f"  the first step of {peer:<12} differs by {loss:.1e}, its gradient norm by {norm:.1e}"
                f"{'' if same else ': NOT THE SAME WORK, left out'}",
                flush=True,
            )

    def round(self, number: int) -> None:
        """One run of every side, in reverse order in every other round."""
        measured = {}
        for name in list(self.sides)[:: -1 if number % 2 else 1]:
            figures, peak, first = self.run(name, seed=number)
            seconds = figures["ends"][-1] - figures["ends"][self.warmup - 1]
            rate = sum(figures["tokens"][self.warmup :]) / figures["pool"] / seconds
            measured[name] = dict(zip(FIGURES, (rate, peak, first), strict=True))
        for name, figures in measured.items():  # of whole rounds only, so that they stay pairs
            self.sides[name].runs.append(figures)

    def measure(self, runs: int, rows: list[dict[str, Any]]) -> None:
        """Print the table of so many rounds and add what it says to `rows`; also of the whole ones if it is stopped."""
        try:
            for number in tqdm(range(runs), desc=self.work, unit="round", disable=not sys.stderr.isatty()):
                self.round(number)
        finally:
            if self.sides[OURS].runs:
                print(self.table(), flush=True)
                of_work = {"work": self.work, "steps": self.steps, "warmup": self.warmup}
                rows += [of_work | {"variant": name, **asdict(side)} for name, side in self.sides.items()]

    def table(self) -> str:
        """The figures of every side, and the ratios to each peer."""
        ours = self.sides[OURS]
        lines = [
            f"\n{self.work}: {self.steps} steps of {self.recipe.train.global_batch_size} examples, the clock starts after "
            f"{self.warmup}; {len(ours.runs)} rounds, median (least - most)",
            f"  {'':<18}{'samples/s':<28}{'peak MB':<28}{'seconds to the first step'}",
        ]
        for name, side in self.sides.items():
            lines.append(f"  {name:<18}" + "".join(f"{spread(side.all(figure)):<28}" for figure in FIGURES))
        for name, side in self.sides.items():
            if name != OURS:
                of_ours, of_theirs = ({figure: one.all(figure) for figure in FIGURES} for one in (ours, side))
                speed, memory, start = FIGURES
                rows = (
                    ("times as fast", ratios(of_ours[speed], of_theirs[speed])),
                    ("of its memory", ratios(of_ours[memory], of_theirs[memory])),
                    ("times as soon", ratios(of_theirs[start], of_ours[start])),
                )
                lines += [f"  ours, {what} as {name:<12}{verdict(values)}" for what, values in rows]
        return "\n".join(lines)


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Of the two runs of each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def verdict(values: list[float]) -> str:
    """The ratios, and whether they say anything: not where 1 lies among them, or there is only one."""
    resolved = len(values) > 1 and not min(values) <= 1 <= max(values)
    return spread(values) + ("" if resolved else "  not resolved")


def prepared(work: str, files: Path, shrink: bool) -> list[str]:
    """works.prepare in its own process: on Linux, the peak of a process starts at that of the one it comes from."""
    command = [sys.executable, "-m", "benchmarks.works", work, str(files), *(["--shrink"] if shrink else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{work}: its files could not be written")
    return done.stdout.splitlines()


def chosen_peers(names: list[str], work: str) -> list[str]:
    """Those that suit the work and are installed; says which are not."""
    chosen = [name for name in names if suits(name, work)]
    missing = [
        name for name in chosen if any(importlib.util.find_spec(p) is None for p in (PACKAGES[name], "transformers"))
    ]
    for name in missing:
        print(f"  {name}: not installed (pip install {PACKAGES[name]} transformers)")
    return [name for name in chosen if name not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; those of two cores if none")
    parser.add_argument("--peers", default=",".join(PACKAGES), help="comma-separated; all if not given")
    parser.add_argument("--runs", type=int, default=5, help="rounds of all sides")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of a run; 0: as the work needs")
    parser.add_argument("--check", action="store_true", help="only see whether all sides do the same")
    parser.add_argument("--shrink", action="store_true", help="tiny works, which show that all of it runs")
    parser.add_argument("--files", type=Path, help="folder where the files of the works are kept; else a temporary one")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder for the JSON file")
    arguments = parser.parse_args()
    works, peers = arguments.works or list(STEPS), arguments.peers.split(",")
    for what, names, known in (("WORK", works, WORKS), ("--peers", peers, PACKAGES)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{what}: {unknown[0]!r} is not one of {', '.join(known)}")
    if arguments.runs < 1 or arguments.steps < 0 or arguments.steps == 1:
        parser.error("--runs is at least 1, --steps at least 2: the first of them is not timed")
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for work in works:
                print(f"\n{work}", flush=True)
                files = arguments.files or Path(temporary)
                bench = Bench(work, files, Path(temporary), arguments.steps, arguments.shrink)
                bench.check(chosen_peers(peers, work))
                if not arguments.check:
                    bench.measure(arguments.runs, rows)
    except KeyboardInterrupt:
        print("\nstopped; the whole rounds are kept")
    finally:
        if rows:
            print(f"\nwritten to {record.write(arguments.history, 'peers', rows)}")


if __name__ == "__main__":
    main()
