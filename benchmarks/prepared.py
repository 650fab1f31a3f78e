"""Measure the memory and time of data.prepare on a large corpus, and of training from the folder that it writes.

    python -m benchmarks.prepared                                       a corpus of 300 MB, a small GPT-2
    python -m benchmarks.prepared --megabytes 2000 --workers 2 --steps 100 --folder /data/measured

The corpus is made of random words in texts of about 1 kB. Memory is that of a command and of all processes that it
starts: the sum of their proportional set sizes (PSS), in which a shared page counts once, sampled ten times a second;
without pages of files, which the system takes back when it needs memory, in brackets. Training is compared with
training on some 100 texts as a file, whose memory is that of Python, torch and the model.

The result is printed, and written to benchmarks/history unless --folder names where to.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as vocabularies

from benchmarks import record

ROOT = Path(__file__).parent.parent
WORDS = 20_000  # in the vocabulary of the corpus
END = "<|endoftext|>"
MODEL = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
SAMPLE_MEGABYTES = 0.1  # of the file that training is compared with, which is also the validation file
SECONDS = 0.1  # between two samples


def write_corpus(file: Path, megabytes: float, seed: int = 0) -> int:
    """Write a .jsonl file of random texts; return the number of its rows."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(WORDS)]
    phrases = [" ".join(rng.choices(words, k=30)) for _ in range(10_000)]
    size = rows = 0
    with file.open("w") as stream:
        while size < megabytes * 1e6:
            text = " ".join(rng.choices(phrases, k=rng.randint(1, 8)))
            size += stream.write(json.dumps({"id": f"text-{rows}", "text": text}) + "\n")
            rows += 1
    return rows


def write_model(folder: Path, corpus: Path) -> None:
    """Write the config of a small GPT-2 and a byte-level BPE that is trained on the first texts of the corpus."""
    with corpus.open() as stream:
        texts = [json.loads(line)["text"] for _, line in zip(range(1000), stream, strict=False)]
    tokenizer = Tokenizer(vocabularies.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.token_to_id(END))
    config = MODEL | {"vocab_size": tokenizer.get_vocab_size()} | ids
    (folder / "config.json").write_text(json.dumps(config))


class Memory(threading.Thread):
    """A thread that samples the memory of a process and all that it started.

    peak: bytes (PSS). own: the largest part of it that is of no file. high_water: the most that the process itself had
    (its resident set, VmHWM), which no sample misses.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.own, self.high_water, self.is_over = pid, 0, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(SECONDS):
            sizes = [memory_of(pid) for pid in _descendants(self.pid)]
            self.peak = max(self.peak, sum(size for size, _ in sizes))
            self.own = max(self.own, sum(own for _, own in sizes))
            self.high_water = max(self.high_water, high_water_of(self.pid))


def memory_of(pid: int) -> tuple[int, int]:
    """Return (proportional set size, the part of it that is of no file) of a process, in bytes; 0 once it ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:]}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0)


def high_water_of(pid: int) -> int:
    """Return the largest resident set that a process has had, in bytes; 0 once it ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _descendants(pid: int) -> list[int]:
    """Return a process and all that it and those started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:  # which grows
        found += [child for child, own_parent in parents.items() if own_parent == parent]
    return found


def measure(name: str, *arguments: object) -> dict[str, Any]:
    """Run a command; return its seconds, its memory, and when its first step was. Exits with its output if it fails."""
    print(f"{name} ...", flush=True)
    clock = time.perf_counter()
    command = [sys.executable, "-m", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    memory, seen = Memory(process.pid), list[str]()
    memory.start()
    first_step = 0.0
    for line in process.stdout or ():
        seen.append(line)
        if line.startswith("step ") and not first_step:
            first_step = time.perf_counter() - clock
    process.wait()
    memory.is_over.set()
    if process.returncode:
        raise SystemExit("".join(seen[-20:]))
    seconds = time.perf_counter() - clock
    sizes = {"peak": memory.peak, "own": memory.own, "high_water": memory.high_water}
    return {"seconds": seconds, "first_step": first_step, **sizes}


def as_row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a command as a row of a record."""
    figures = {"seconds": found["seconds"], "peak_mb": found["peak"] / 1e6, "own_mb": found["own"] / 1e6}
    return {"work": name, "variant": "", "runs": [figures | {"first_step_seconds": found["first_step"]}]}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=300.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where the corpus and the prepared data are kept")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        return _measure_all(options, (options.folder or Path(temporary)).absolute())


def _measure_all(options: argparse.Namespace, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    corpus, sample, prepared = folder / "corpus.jsonl", folder / "sample.jsonl", folder / "prepared"
    rows = write_corpus(corpus, options.megabytes)
    write_corpus(sample, SAMPLE_MEGABYTES)
    write_model(folder / "model", corpus)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""schema = 2
run.task = "causal-lm"
run.device = "cpu"
model.name = "{folder / "model"}"
model.init = "scratch"
data.validation = "{sample}"
data.max_length = 128
causal_lm.concatenate_texts = true
train.global_batch_size = 8
train.max_steps = {options.steps}
eval.every_steps = {options.steps}
eval.batch_tokens = 1024
log.every_steps = 1
"""
    )
    results = {
        "prepare": measure(
            "prepare",
            "data.prepare",
            recipe,
            f"--data.train={corpus}",
            f"--out={prepared}",
            f"--workers={options.workers}",
        )
    }
    for name, source in (("train on a sample", sample), ("train on the folder", prepared)):
        run = f"--run.folder={folder / name.replace(' ', '-')}"
        results[name] = measure(name, "engine.train", recipe, f"--data.train={source}", run)
    size = sum(file.stat().st_size for file in prepared.iterdir())
    rate = corpus.stat().st_size / 1e6 / results["prepare"]["seconds"]
    print(f"\n{rows:,} texts, {corpus.stat().st_size / 1e6:,.0f} MB -> {size / 1e6:,.0f} MB; {rate:.1f} MB/s")
    for name, found in results.items():
        step = f"; first step after {found['first_step']:.1f} s" if found["first_step"] else ""
        memory = f"{found['peak'] / 1e6:,.0f} MB ({found['own'] / 1e6:,.0f} MB without pages of files)"
        print(f"{name:>20}  {found['seconds']:6.1f} s  {memory}{step}")
    beside = results["train on the folder"]["high_water"] - results["train on a sample"]["high_water"]
    print(f"beside Python and the model, training needs {beside / 1e6:,.0f} MB")
    if options.folder is None:
        print(record.write(record.HISTORY, "prepared", [as_row(name, found) for name, found in results.items()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
