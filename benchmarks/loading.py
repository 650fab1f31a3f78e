"""From the start of a process to loaded weights, beside transformers' from_pretrained:

    python -m benchmarks.loading [--runs 5] [--shapes bert-base,gpt2-lm]

Both load the same random file of the published shape, in processes of their own that take turns, and then read every
weight once, so that memory-mapped pages are counted. Printed: seconds and peak memory of the whole process, as the
median with the least and the most, and the median of the paired ratios. A third process only imports torch. Written as
a dated file to benchmarks/history.
Needs the package transformers.
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
HEADS = {"gpt2-lm": CAUSAL_LM, "tiny-lm": CAUSAL_LM}  # (ours, theirs); of the others, the backbone
TOUCH = "print(sum(p.sum().item() for p in model.parameters()))"  # in fp32: it allocates nothing
# In a process of its own too: on Linux, the peak of a process starts at that of the one that started it.
MAKE = "import pathlib; from benchmarks.loading import make; make({shape!r}, pathlib.Path({path!r}), {head!r})"
PROGRAMS = {
    "torch alone": "import torch",
    "transformers": f"from transformers import {{auto}}; model = {{auto}}.from_pretrained({{path!r}}); {TOUCH}",
    "models": f"import models; model = models.from_pretrained({{path!r}}, head={{head!r}}); {TOUCH}",
}


def make(shape: str, folder: Path, head: str | None) -> None:
    """A random checkpoint of this shape."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    models.save_pretrained(models.from_pretrained(folder, head=head, init="scratch"), folder)


def run(program: str, output: str = os.devnull) -> tuple[float, float]:
    """(wall seconds, peak resident MB) of a fresh Python that runs this. output: the file for what it prints."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    quiet = [(os.POSIX_SPAWN_OPEN, descriptor, output, append, 0o644) for descriptor in (1, 2)]
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], environment, file_actions=quiet)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"this failed (is transformers installed?): {program}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f} ({min(values):.2f} - {max(values):.2f})"


def measure(shape: str, runs: int) -> list[dict[str, Any]]:
    """Print a table; returns its rows for benchmarks/record.py."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / shape
        head, auto = HEADS.get(shape, (None, "AutoModel"))
        run(MAKE.format(shape=shape, path=str(path), head=head))
        size = (path / "model.safetensors").stat().st_size / 2**20
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
        for turn in tqdm(range(runs + 1), desc=shape, unit="round", disable=not sys.stderr.isatty()):
            for name, program in PROGRAMS.items():
                figures = run(program.format(path=str(path), head=head, auto=auto))
                if turn:  # the first round fills the page cache
                    taken[name].append(figures)
    print(f"\n{shape}, {size:.0f} MB of weights, {runs} runs each, median (least - most)")
    for name, figures in taken.items():
        seconds, memory = zip(*figures, strict=True)
        print(f"  {name:<14}{spread(list(seconds))} s   {spread(list(memory))} MB")
    pairs = list(zip(taken["transformers"], taken["models"], strict=True))
    for what, i in (("seconds", 0), ("peak memory", 1)):
        print(f"  transformers / models, {what:<12}{spread([a[i] / b[i] for a, b in pairs])}")
    return [
        {
            "work": shape,
            "variant": name,
            "runs": [dict(zip(("seconds", "peak_memory_mb"), figures, strict=True)) for figures in all_of],
        }
        for name, all_of in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shapes", default="bert-base,gpt2-lm", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder for the JSON file")
    arguments = parser.parse_args()
    shapes = arguments.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        parser.error(f"--shapes: {unknown[0]!r} is not one of {', '.join(SHAPES)}")
    rows = [row for shape in shapes for row in measure(shape, arguments.runs)]
    print(f"written to {record.write(arguments.history, 'loading', rows)}")


if __name__ == "__main__":
    main()
