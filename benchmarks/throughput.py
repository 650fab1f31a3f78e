"""Measure the training step of engine.train: examples and tokens per second, utilisation, memory, parts of the loop.

    python -m benchmarks.throughput                                   all workloads for a CPU, five runs each
    python -m benchmarks.throughput minilm-short vit-tiny --runs 3 --steps 10 --train.micro_batch_size=8
    python -m benchmarks.throughput minilm-short --against "model.freeze=backbone.*" --against "model.lora.rank=8"
    python -m benchmarks.throughput --suite gpu                       published shapes, under ten minutes

Any setting of the engine can be given. --against repeats each workload with further settings (several in one pair of
quotes) and prints the ratio to the workload without them. --all-tokens repeats it with a last layer that computes all
tokens, also those that the head does not read. Each run is a separate process (timed_training.py) that does
not time its first steps. The cases alternate, run by run, so that a slower machine slows all of them.

Columns of the table:
- MFU: model FLOPs (flops.py) over the rate of the fastest matrix product of the model's shapes in the same run;
- stated: model FLOPs over the vendor's peak rate, for known GPUs;
- waiting: the share of the time in which the loop waits for data;
- parts of the loop: shares of additional steps, timed in the first run of each case.

The result is written to benchmarks/history as a dated file, which compare.py reads. Ctrl-C keeps the finished runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from json import loads
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import record
from benchmarks.loading import format_spread
from benchmarks.timed_training import WARM_UP
from benchmarks.workloads import WORKLOADS
from engine import config as configs

ROOT = Path(__file__).parent.parent
ON_CPU = ("minilm-short", "minilm-long", "gpt2-dialogue", "gpt2-blocks", "t5-small", "vit-tiny")
ON_GPU = ("bert-base-128", "bert-base-512", "gpt2-1024", "t5-base-512-128", "vit-b16-224")
PRECISIONS = ("bf16", "tf32", "fp16", "fp32")  # in the order in which the GPU suite runs them
SUITE_MINUTES = 8.5  # after this time the suite starts no further case
COMPILE = "train.compile"
CAN_COMPILE = COMPILE in configs.all_settings(configs.Config())


class FailedError(Exception):
    """A failed run; the message is the last line of its output."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    workload: str
    precision: str = "fp32"
    compiled: bool = False
    ranks: int = 1
    against: str = ""  # further settings
    options: tuple[str, ...] = ()  # further options of timed_training

    @property
    def variant(self) -> str:
        """Return the name of the case within its workload."""
        words = [self.precision, "compiled" if self.compiled else "", f"{self.ranks} GPUs" if self.ranks > 1 else ""]
        return " ".join(filter(None, (*words, self.against, *(option.strip("-") for option in self.options))))

    def settings(self) -> list[str]:
        """Return the arguments of engine.train."""
        given = [f"--train.precision={self.precision.replace('tf32', 'fp32')}"]
        given += ["--train.tf32=true"] * (self.precision == "tf32")
        given += [f"--{COMPILE}=true"] * self.compiled
        return given + further_settings(self.against)


def further_settings(against: str) -> list[str]:
    """Return the settings of one --against as arguments of engine.train."""
    return [f"--{text.removeprefix('--')}" for text in shlex.split(against)]


class Bench:
    """The state shared by all runs: the folders of workloads and runs, and the settings given on the command line."""

    def __init__(self, workloads: Path, scratch: Path, settings: Sequence[str], steps: int, shrink: bool):
        self.workloads, self.scratch, self.settings = workloads, scratch, settings
        self.steps, self.shrink = steps, shrink
        self.count = 0

    def run_case(self, case: Case, split: bool, launches: bool = False) -> dict[str, Any]:
        """Time a case in a new process and return its result. Raises FailedError if the process fails."""
        recipe = self.workloads / case.workload / "recipe.toml"
        if not recipe.is_file():
            # A separate process: on Linux, the peak memory of a process starts at that of its parent.
            shrink = ["--shrink"] * self.shrink
            self._call([sys.executable, "-m", "benchmarks.workloads", case.workload, str(self.workloads), *shrink])
        self.count += 1
        result, folder = self.scratch / f"{self.count}.json", self.scratch / f"run-{self.count}"
        launcher = [sys.executable]
        if case.ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        options = [*["--split"] * split, *["--launches"] * launches]
        options += case.options
        command = [*launcher, "-m", "benchmarks.timed_training", str(result), str(self.steps), *options, str(recipe)]
        self._call([*command, f"--run.folder={folder}", *self.settings, *case.settings()])
        return loads(result.read_text(encoding="utf-8"))

    def _call(self, command: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise FailedError(lines[-1] if lines else f"exit code {done.returncode}")


def run_cases(
    cases: Sequence[Case], bench: Bench, runs: int, minutes: float
) -> tuple[dict[Case, list[Any]], list[str]]:
    """Return ({case: results of its runs}, sentences on the cases that were not measured).

    No case is started after `minutes`.
    """
    measured: dict[Case, list[Any]] = {case: [] for case in cases}
    problems: dict[Case, str] = {}
    started = time.monotonic()
    bar = tqdm(total=runs * len(cases), unit="run", disable=not sys.stderr.isatty())
    try:
        for round_number in range(runs):
            for case in cases:
                bar.set_postfix_str(f"{case.workload} {case.variant}")
                if not measured[case] and time.monotonic() - started > 60 * minutes:
                    problems.setdefault(case, f"not started within {minutes:g} minutes")
                elif case not in problems:
                    try:
                        measured[case].append(bench.run_case(case, split=round_number == 0))
                    except FailedError as error:
                        problems[case] = str(error)
                bar.update()
    except KeyboardInterrupt:
        print("interrupted; the finished runs follow", file=sys.stderr)
    bar.close()
    return {case: found for case, found in measured.items() if found}, [
        f"not measured: {case.workload}, {case.variant}: {problem}" for case, problem in problems.items()
    ]


def table(measured: dict[Case, list[dict[str, Any]]]) -> str:
    """Return a line per case: samples/s as median (minimum - maximum) over its runs, the rest as medians."""
    width = max(len(case.variant) for case in measured)
    head = f"{'workload':<16} {'variant':<{width}}  {'samples/s':>24} {'tokens/s':>10} {'MFU':>6} {'stated':>6}"
    lines = [f"{head} {'peak MB':>8} {'waiting':>7}  parts of the loop"]
    for case, runs in measured.items():

        def median(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(run[name] for run in runs)

        stated = f"{median('mfu_datasheet'):>6.1%}" if runs[0]["mfu_datasheet"] else f"{'-':>6}"
        rate = format_spread([run["samples_per_second"] for run in runs])
        parts = " ".join(f"{part} {share:.0%}" for part, share in runs[0]["split"].items() if share >= 0.005)
        row = f"{case.workload:<16} {case.variant:<{width}}  {rate:>24} {median('tokens_per_second'):>10,.0f}"
        row += f" {median('mfu'):>6.1%} {stated} {median('peak_memory_mb'):>8,.0f} {median('waiting'):>7.1%}"
        lines.append(f"{row}  {parts}")
    return "\n".join(lines)


def ratios(measured: dict[Case, list[dict[str, Any]]]) -> list[str]:
    """Return a line per case with further settings or options: its rate and memory over those without, run by run."""
    lines = []
    for case, runs in measured.items():
        plain = measured.get(replace(case, against="", options=()), [])
        pairs = list(zip(runs, plain, strict=False))
        if not (case.against or case.options) or not pairs:
            continue
        rate, memory = ([a[name] / b[name] for a, b in pairs] for name in ("samples_per_second", "peak_memory_mb"))
        resolved = "" if min(rate) > 1 or max(rate) < 1 else ", not resolved"
        lines.append(
            f"{case.workload} {case.variant}: {format_spread(rate).strip()} times the examples per second{resolved}, "
            f"{format_spread(memory).strip()} of the peak memory"
        )
    return lines


def choose_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the rows of the table, in the order in which they run."""
    workloads = arguments.workloads or (ON_GPU if arguments.suite else ON_CPU)
    if arguments.suite:
        gpus = torch.cuda.device_count()
        plain = [
            Case(workload, precision, compiled)
            for precision in arguments.precision
            for compiled in ([False, True] if CAN_COMPILE else [False])
            for workload in workloads
        ]
        return plain + [Case(workload, arguments.precision[0], ranks=gpus) for workload in workloads if gpus > 1]
    all_tokens = [("", ("--all-tokens",))] if arguments.all_tokens else []
    return [
        Case(workload, precision, compiled, against=against, options=options)
        for workload in workloads
        for precision in arguments.precision
        for compiled in ([False, True] if arguments.compile else [False])
        for against, options in [("", ()), *((against, ()) for against in arguments.against), *all_tokens]
    ]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return (own arguments, settings of the engine). A mistake ends the process with one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"from {', '.join(WORKLOADS)}")
    parser.add_argument("--precision", help=f"comma-separated, from {', '.join(PRECISIONS)}; default fp32, suite: all")
    parser.add_argument("--compile", action="store_true", help="run each case compiled too")
    parser.add_argument(
        "--against", action="append", default=[], metavar="SETTINGS", help="compare with these settings"
    )
    parser.add_argument("--all-tokens", action="store_true", help="compare with a last layer that computes all tokens")
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps of a run, a multiple of {WARM_UP}")
    parser.add_argument("--runs", type=int, help="runs of each case; default 5, suite: 1")
    parser.add_argument("--suite", choices=("gpu",), help=f"{', '.join(ON_GPU)}, in all precisions")
    parser.add_argument("--shrink", action="store_true", help="tiny models and data, to try the command")
    parser.add_argument(
        "--folder", type=Path, help="folder of the prepared workloads, to use them again; default: temporary"
    )
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder of the records")
    arguments, settings = parser.parse_known_args(argv)
    arguments.precision = (arguments.precision or (",".join(PRECISIONS) if arguments.suite else "fp32")).split(",")
    arguments.runs = arguments.runs or (1 if arguments.suite else 5)
    for name, known in (("workloads", WORKLOADS), ("precision", PRECISIONS)):
        for value in getattr(arguments, name):
            if value not in known:
                parser.error(f"{value!r} is not one of {', '.join(known)}")
    if arguments.steps < WARM_UP or arguments.steps % WARM_UP:
        parser.error(f"--steps {arguments.steps} must be a multiple of {WARM_UP}")
    if arguments.compile and not CAN_COMPILE:
        parser.error(f"--compile: the engine has no setting {COMPILE}")
    if arguments.suite and (arguments.compile or arguments.against or arguments.all_tokens):
        parser.error("--suite cannot be combined with --compile, --against or --all-tokens")
    if stray := [text for text in settings if not text.startswith("--") or "=" not in text]:
        parser.error(f"{stray[0]!r} must have the form --section.key=value")
    try:
        for given in (settings, *map(further_settings, arguments.against)):
            configs.override(configs.Config(), configs.split_arguments(given)[1])
    except configs.ConfigError as error:
        parser.error(str(error))
    return arguments, settings


def main(argv: Sequence[str]) -> int:
    """Time the cases, print the table and write the record."""
    arguments, settings = parse(argv)
    minutes = SUITE_MINUTES if arguments.suite else float("inf")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        bench = Bench(arguments.folder or scratch, scratch, settings, arguments.steps, arguments.shrink)
        measured, problems = run_cases(choose_cases(arguments), bench, arguments.runs, minutes)
    if measured:
        print(table(measured))
        always = [*settings, *["shrunk"] * arguments.shrink]  # part of the name, so that only equal cases are compared
        results = [
            {"work": case.workload, "variant": " ".join([case.variant, *always]), "runs": runs}
            for case, runs in measured.items()
        ]
        path = record.write(arguments.history, "throughput", results, list(argv))
        problems.append(f"written to {path}")
    print("\n".join(ratios(measured) + problems))
    return 0 if measured else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
