"""How fast engine.train's own step is: examples and tokens a second, utilisation, memory, and where the time goes.

    python -m benchmarks.throughput                                   all works for a CPU, five runs of each
    python -m benchmarks.throughput minilm-short vit-tiny --runs 3 --steps 10 --train.micro_batch_size=8
    python -m benchmarks.throughput minilm-short --against "model.freeze=backbone.*" --against "model.lora.rank=8"
    python -m benchmarks.throughput --suite gpu                       published shapes; under ten minutes

Any setting of the engine can be given, and --against repeats each work with further settings (several in one pair of
quotes) and prints the ratio to the work without them. Each run is a process of its own (benchmarks/timed.py), which
leaves its first steps out; the cases take turns, run by run, so that a machine that slows down slows all of them.

MFU: model FLOPs (benchmarks/flops.py) over what the fastest matrix product of the model's shapes reached in the same
run; "stated" is over the maker's peak, of GPUs that are known. waiting: share of the time in which the loop waited for
its data. The parts of the loop are shares of further steps, timed in the first run of each case.

Written as a dated file to benchmarks/history, which benchmarks/compare.py reads. Ctrl-C keeps what was measured.
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
from benchmarks.loading import spread
from benchmarks.timed import WARM_UP
from benchmarks.works import WORKS
from engine import config as configs

ROOT = Path(__file__).parent.parent
ON_CPU = ("minilm-short", "minilm-long", "gpt2-dialogue", "gpt2-blocks", "t5-small", "vit-tiny")
ON_GPU = ("bert-base-128", "bert-base-512", "gpt2-1024", "t5-base-512-128", "vit-b16-224")
PRECISIONS = ("bf16", "tf32", "fp16", "fp32")  # in the order of their interest on a GPU
SUITE_MINUTES = 8.5  # after which no case of the suite is begun
COMPILE = "train.compile"
CAN_COMPILE = COMPILE in configs.all_settings(configs.Config())


class FailedError(Exception):
    """A run that did not end well; the message is its last line."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    work: str
    precision: str = "fp32"
    compiled: bool = False
    ranks: int = 1
    against: str = ""  # further settings

    @property
    def variant(self) -> str:
        words = [self.precision, "compiled" if self.compiled else "", f"{self.ranks} GPUs" if self.ranks > 1 else ""]
        return " ".join(filter(None, (*words, self.against)))

    def settings(self) -> list[str]:
        """As arguments of engine.train."""
        given = [f"--train.precision={self.precision.replace('tf32', 'fp32')}"]
        given += [f"--{COMPILE}=true"] * self.compiled
        return given + further(self.against)


def further(against: str) -> list[str]:
    """The settings of one --against, as arguments of engine.train."""
    return [f"--{text.removeprefix('--')}" for text in shlex.split(against)]


class Bench:
    """What all runs share: the folder of the works, one for the runs themselves, and further settings of the engine."""

    def __init__(self, works: Path, scratch: Path, settings: Sequence[str], steps: int, shrink: bool):
        self.works, self.scratch, self.settings, self.steps, self.shrink = works, scratch, settings, steps, shrink
        self.count = 0

    def run(self, case: Case, split: bool) -> dict[str, Any]:
        """What one process measured; FailedError with its last line where it failed."""
        recipe = self.works / case.work / "recipe.toml"
        if not recipe.is_file():
            # In a process of its own: on Linux, the peak of a process starts at that of the one that started it.
            shrink = ["--shrink"] * self.shrink
            self._call([sys.executable, "-m", "benchmarks.works", case.work, str(self.works), *shrink])
        self.count += 1
        result, folder = self.scratch / f"{self.count}.json", self.scratch / f"run-{self.count}"
        launcher = [sys.executable]
        if case.ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        options = [*["--split"] * split, *["--tf32"] * (case.precision == "tf32")]
        command = [*launcher, "-m", "benchmarks.timed", str(result), str(self.steps), *options, str(recipe)]
        self._call([*command, f"--run.folder={folder}", *self.settings, *case.settings()])
        return loads(result.read_text(encoding="utf-8"))

    def _call(self, command: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise FailedError(lines[-1] if lines else f"exit code {done.returncode}")


def measure(cases: Sequence[Case], bench: Bench, runs: int, minutes: float) -> tuple[dict[Case, list[Any]], list[str]]:
    """({case: what each of its runs measured}, what was not measured and why). Nothing is begun after `minutes`."""
    taken: dict[Case, list[Any]] = {case: [] for case in cases}
    problems: dict[Case, str] = {}
    begun = time.monotonic()
    bar = tqdm(total=runs * len(cases), unit="run", disable=not sys.stderr.isatty())
    try:
        for turn in range(runs):
            for case in cases:
                bar.set_postfix_str(f"{case.work} {case.variant}")
                if not taken[case] and time.monotonic() - begun > 60 * minutes:
                    problems.setdefault(case, f"not begun within {minutes:g} minutes")
                elif case not in problems:
                    try:
                        taken[case].append(bench.run(case, split=turn == 0))
                    except FailedError as error:
                        problems[case] = str(error)
                bar.update()
    except KeyboardInterrupt:
        print("stopped; this is what was measured until then", file=sys.stderr)
    bar.close()
    return {case: found for case, found in taken.items() if found}, [
        f"not measured: {case.work}, {case.variant}: {problem}" for case, problem in problems.items()
    ]


def table(taken: dict[Case, list[dict[str, Any]]]) -> str:
    """A line for each case: rates as the median (least - most) over its runs, the rest as the median."""
    width = max(len(case.variant) for case in taken)
    head = f"{'work':<16} {'variant':<{width}}  {'samples/s':>24} {'tokens/s':>10} {'MFU':>6} {'stated':>6}"
    lines = [f"{head} {'peak MB':>8} {'waiting':>7}  parts of the loop"]
    for case, runs in taken.items():

        def median(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(run[name] for run in runs)

        stated = f"{median('mfu_datasheet'):>6.1%}" if runs[0]["mfu_datasheet"] else f"{'-':>6}"
        rate = spread([run["samples_per_second"] for run in runs])
        parts = " ".join(f"{part} {share:.0%}" for part, share in runs[0]["split"].items() if share >= 0.005)
        row = f"{case.work:<16} {case.variant:<{width}}  {rate:>24} {median('tokens_per_second'):>10,.0f}"
        row += f" {median('mfu'):>6.1%} {stated} {median('peak_memory_mb'):>8,.0f} {median('waiting'):>7.1%}"
        lines.append(f"{row}  {parts}")
    return "\n".join(lines)


def ratios(taken: dict[Case, list[dict[str, Any]]]) -> list[str]:
    """For each case with further settings: its rate and memory over those of the same case without, run by run."""
    lines = []
    for case, runs in taken.items():
        plain = taken.get(replace(case, against=""), [])
        pairs = list(zip(runs, plain, strict=False))
        if not case.against or not pairs:
            continue
        rate, memory = ([a[name] / b[name] for a, b in pairs] for name in ("samples_per_second", "peak_memory_mb"))
        resolved = "" if min(rate) > 1 or max(rate) < 1 else ", not resolved"
        lines.append(
            f"{case.work} {case.variant}: {spread(rate).strip()} times the examples a second{resolved}, "
            f"{spread(memory).strip()} of the peak memory"
        )
    return lines


def choose_cases(arguments: argparse.Namespace) -> list[Case]:
    """The rows of the table, in the order in which they are run."""
    works = arguments.works or (ON_GPU if arguments.suite else ON_CPU)
    if arguments.suite:
        gpus = torch.cuda.device_count()
        plain = [
            Case(work, precision, compiled)
            for precision in arguments.precision
            for compiled in ([False, True] if CAN_COMPILE else [False])
            for work in works
        ]
        return plain + [Case(work, arguments.precision[0], ranks=gpus) for work in works if gpus > 1]
    return [
        Case(work, precision, compiled, against=against)
        for work in works
        for precision in arguments.precision
        for compiled in ([False, True] if arguments.compile else [False])
        for against in ("", *arguments.against)
    ]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--precision", help=f"of {', '.join(PRECISIONS)}, with commas; fp32, of the suite all")
    parser.add_argument("--compile", action="store_true", help="each case compiled too")
    parser.add_argument("--against", action="append", default=[], metavar="SETTINGS", help="further settings")
    parser.add_argument("--steps", type=int, default=20, help=f"of a run that are timed, a multiple of {WARM_UP}")
    parser.add_argument("--runs", type=int, help="of each case; 5, of the suite 1")
    parser.add_argument("--suite", choices=("gpu",), help=f"{', '.join(ON_GPU)}, in all precisions")
    parser.add_argument("--shrink", action="store_true", help="tiny models and data, to try the command")
    parser.add_argument("--folder", type=Path, help="where works are prepared, to be used again; a temporary one")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="where the results are written")
    arguments, settings = parser.parse_known_args(argv)
    arguments.precision = (arguments.precision or (",".join(PRECISIONS) if arguments.suite else "fp32")).split(",")
    arguments.runs = arguments.runs or (1 if arguments.suite else 5)
    for name, known in (("works", WORKS), ("precision", PRECISIONS)):
        for value in getattr(arguments, name):
            if value not in known:
                parser.error(f"{value!r} is not one of {', '.join(known)}")
    if arguments.steps < WARM_UP or arguments.steps % WARM_UP:
        parser.error(f"--steps {arguments.steps}: it should be a multiple of {WARM_UP}")
    if arguments.compile and not CAN_COMPILE:
        parser.error(f"--compile: the engine has no setting {COMPILE} to try")
    if arguments.suite and (arguments.compile or arguments.against):
        parser.error("--suite says itself what is compiled and compared: drop --compile and --against")
    if stray := [text for text in settings if not text.startswith("--") or "=" not in text]:
        parser.error(f"{stray[0]!r} should be --section.key=value")
    try:
        for given in (settings, *map(further, arguments.against)):
            configs.override(configs.Config(), configs.split_arguments(given)[1])
    except configs.ConfigError as error:
        parser.error(str(error))
    return arguments, settings


def main(argv: Sequence[str]) -> int:
    arguments, settings = parse(argv)
    minutes = SUITE_MINUTES if arguments.suite else float("inf")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        bench = Bench(arguments.folder or scratch, scratch, settings, arguments.steps, arguments.shrink)
        taken, problems = measure(choose_cases(arguments), bench, arguments.runs, minutes)
    if taken:
        print(table(taken))
        always = [*settings, *["shrunk"] * arguments.shrink]  # a part of the name, so that only like is compared
        results = [
            {"work": case.work, "variant": " ".join([case.variant, *always]), "runs": runs}
            for case, runs in taken.items()
        ]
        path = record.write(arguments.history, "throughput", results, list(argv))
        problems.append(f"written to {path}")
    print("\n".join(ratios(taken) + problems))
    return 0 if taken else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
