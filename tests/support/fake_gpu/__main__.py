"""Rehearse cases and print what they do; with --write, rewrite the committed table.

PYTHONPATH=tests python -m support.fake_gpu ["CASE" ...] [--ops] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch

from support.fake_gpu.cases import CASES, find_problems, measure
from support.fake_gpu.rehearsal import ROOT, rehearse
from support.fake_gpu.report import SAVE, SETUP, Report

TABLE = ROOT / "tests" / "gpu_rehearsal" / "table.json"


def version() -> str:
    """Return the version of PyTorch whose kernels the table counts, without its patch level."""
    return ".".join(torch.__version__.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description="python -m support.fake_gpu")
    parser.add_argument("cases", nargs="*", help="names, or the beginnings of names; none: all")
    parser.add_argument("--ops", action="store_true", help="also print the ops of each phase")
    parser.add_argument("--write", action="store_true", help="write tests/gpu_rehearsal/table.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    rows = table.get("cases", {}) if table.get("torch") == version() else {}
    for name, case in CASES.items():
        if arguments.cases and not name.startswith(tuple(arguments.cases)):
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            report = rehearse(case.prepare(Path(folder)))
        rows[name] = measure(report)
        print(f"{name}: {json.dumps(rows[name])}")
        show(report, arguments.ops)
        print("".join(f"    PROBLEM {problem}\n" for problem in find_problems(case, report)), end="", flush=True)
    if arguments.write:
        kept = {name: rows[name] for name in CASES if name in rows}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kept.items())
        TABLE.write_text(f'{{"torch": "{version()}", "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


def show(report: Report, ops: bool) -> None:
    """Print the waits by their lines, and the ops."""
    waits = Counter(
        (w.phase, w.what.split(" [")[0], w.where[:2]) for w in report.waits() if w.phase not in (SETUP, SAVE)
    )
    for (phase, what, where), times in waits.items():
        print(f"    {times:>4} x [{phase}] {what}  {' <- '.join(where)}")
    for phase, counts in report.ops.items() if ops else ():
        print(f"    {phase}: {dict(counts.most_common(40))}")


if __name__ == "__main__":
    main()
