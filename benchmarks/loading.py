"""Measure the time from the start of a process to loaded weights, beside transformers' from_pretrained:

    python -m benchmarks.loading [--runs 5] [--shapes bert-base,gpt2-lm]

Both load the same random checkpoint of a published shape, in separate processes that alternate. Each then reads every
weight once, so that memory-mapped pages are counted. A third process only imports torch. Printed are:
- the seconds and peak memory of the whole process, as median (minimum - maximum);
- the ratios of the two processes of each round.

The result is written to benchmarks/history as a dated file. The package transformers is required.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import models
from benchmarks import record

SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert"},  # the defaults of each config.json are the published base model
    "gpt2": {"model_type": "gpt2"},
    "gpt2-lm": {"model_type": "gpt2"},
    "tiny": {
        "model_type": "bert",
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
    },
    "tiny-lm": {"model_type": "gpt2", "vocab_size": 50, "n_embd": 24, "n_head": 3, "n_layer": 2},
}
CAUSAL_LM = ("causal-lm", "AutoModelForCausalLM")
HEADS = {"gpt2-lm": CAUSAL_LM, "tiny-lm": CAUSAL_LM}  # (our head, their class); other shapes load the backbone only
READ_ALL = "print(sum(p.sum().item() for p in model.parameters()))"  # fp32, so that nothing is allocated
# A separate process too: on Linux, the peak memory of a process starts at that of its parent.
WRITE = (
    "import pathlib; from benchmarks.loading import write_checkpoint; "
    "write_checkpoint({shape!r}, pathlib.Path({path!r}), {head!r})"
)
PROGRAMS = {
    "torch alone": "import torch",
    "transformers": f"from transformers import {{auto}}; model = {{auto}}.from_pretrained({{path!r}}); {READ_ALL}",
    "models": f"import models; model = models.from_pretrained({{path!r}}, head={{head!r}}); {READ_ALL}",
}


def write_checkpoint(shape: str, folder: Path, head: str | None) -> None:
    """Write a random checkpoint of this shape."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    models.save_pretrained(models.from_pretrained(folder, head=head, init="scratch"), folder)


def run_python(program: str, output: str = os.devnull) -> tuple[float, float]:
    """Run a program in a new Python and return (wall seconds, peak resident MB). It prints to the file `output`.

    Raises SystemExit if the program fails.
    """
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    quiet = [(os.POSIX_SPAWN_OPEN, descriptor, output, append, 0o644) for descriptor in (1, 2)]
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], environment, file_actions=quiet)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"this program failed (is transformers installed?): {program}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def format_spread(values: list[float]) -> str:
    """Return "median (minimum - maximum)"."""
    return f"{statistics.median(values):8.2f} ({min(values):.2f} - {max(values):.2f})"


def time_loading(shape: str, runs: int) -> list[dict[str, Any]]:
    """Time the loading of a shape; print the table and return its rows for record.write."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / shape
        head, auto = HEADS.get(shape, (None, "AutoModel"))
        run_python(WRITE.format(shape=shape, path=str(path), head=head))
        size = (path / "model.safetensors").stat().st_size / 2**20
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
        for round_number in tqdm(range(runs + 1), desc=shape, unit="round", disable=not sys.stderr.isatty()):
            for name, program in PROGRAMS.items():
                figures = run_python(program.format(path=str(path), head=head, auto=auto))
                if round_number:  # the first round fills the page cache
                    measured[name].append(figures)
    print(f"\n{shape}, {size:.0f} MB of weights, {runs} runs each, median (minimum - maximum)")
    for name, figures in measured.items():
        seconds, memory = zip(*figures, strict=True)
        print(f"  {name:<14}{format_spread(list(seconds))} s   {format_spread(list(memory))} MB")
    pairs = list(zip(measured["transformers"], measured["models"], strict=True))
    for figure, i in (("seconds", 0), ("peak memory", 1)):
        print(f"  transformers / models, {figure:<12}{format_spread([a[i] / b[i] for a, b in pairs])}")
    return [
        {
            "work": shape,
            "variant": name,
            "runs": [dict(zip(("seconds", "peak_memory_mb"), figures, strict=True)) for figures in runs_of_name],
        }
        for name, runs_of_name in measured.items()
    ]


def main() -> None:
    """Time the shapes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="timed rounds")
    parser.add_argument("--shapes", default="bert-base,gpt2-lm", help=f"comma-separated, from {', '.join(SHAPES)}")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder for the JSON file")
    arguments = parser.parse_args()
    shapes = arguments.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        parser.error(f"--shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    rows = [row for shape in shapes for row in time_loading(shape, arguments.runs)]
    print(f"written to {record.write(arguments.history, 'loading', rows)}")


if __name__ == "__main__":
    main()
