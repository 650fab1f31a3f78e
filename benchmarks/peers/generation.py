"""Compare models/generation/generate.py with transformers' generate on the same weights and prompts:

    python -m benchmarks.peers.generation [gpt2-dialogue] [t5-small] [--runs 5] [--new-tokens 64] [--shrink]

A batch of 8 prompts of different lengths is continued greedily and with 4 beams, with a key-value cache on both sides,
in fp32. The sides alternate, each in a separate process, and generate a few tokens before the clock starts. Printed:
- new tokens per second, as median (minimum - maximum);
- the ratios of the two runs of each round, "not resolved" if 1 lies between their minimum and maximum;
- the number of texts that are equal on both sides, id by id.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record
from benchmarks.loading import format_spread, run_python
from benchmarks.peers.compare_trainers import Bench, ratios, verdict
from benchmarks.peers.features import IGNORE_INDEX, load_features

WORKLOADS = ("gpt2-dialogue", "t5-small")
SIDES = ("ours", "transformers")
NUM_BEAMS = {"greedy": 1, "4 beams": 4}
BATCH = 8
Texts = list[list[int]]
Generate = Callable[[int, int], Texts]  # (beams, new tokens) -> the new ids of each prompt, up to the end token


def read_prompts(job: dict[str, Any]) -> Texts:
    """Return the first examples of the pool: sources, or conversations up to the first reply."""
    features, _ = load_features(job | {"examples": list(range(BATCH))})
    if job["task"] != "dialogue":
        return [feature["input_ids"] for feature in features]
    replies = [next(i for i, label in enumerate(f["labels"]) if label != IGNORE_INDEX) for f in features]
    return [feature["input_ids"][:reply] for feature, reply in zip(features, replies, strict=True)]


def ours(job: dict[str, Any]) -> Generate:
    """Return our generate for the prompts of a job."""
    import models
    from models import GenerationSettings
    from models import generate as generate_ours

    folder = Path(job["model"])
    head = "causal-lm" if job["task"] == "dialogue" else "seq2seq-lm"
    model = models.from_pretrained(folder, head=head).to(job["device"])

    def generate(beams: int, new_tokens: int) -> Texts:
        settings = GenerationSettings.read(folder, num_beams=beams, max_new_tokens=new_tokens)
        return [generated.ids for generated in generate_ours(model, job["prompts"], settings)]

    return generate


def transformers(job: dict[str, Any]) -> Generate:
    """Return transformers' generate for the prompts of a job."""
    import torch

    from benchmarks.peers.trainers import load_model

    model, prompts = load_model(job).to(job["device"]).eval(), job["prompts"]
    longest = max(map(len, prompts))
    decoder_only = job["task"] == "dialogue"  # padded on the left, so that new tokens follow the prompt
    config = model.config
    ends, pad = config.eos_token_id, config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    rows = []
    for ids in prompts:
        padding, ones = [pad] * (longest - len(ids)), [1] * len(ids)
        zeros = [0] * len(padding)
        rows.append((padding + ids, zeros + ones) if decoder_only else (ids + padding, ones + zeros))
    input_ids, mask = (torch.tensor([row[i] for row in rows], device=job["device"]) for i in (0, 1))

    def generate(beams: int, new_tokens: int) -> Texts:
        out = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            pad_token_id=pad,
        )
        texts = out[:, longest if decoder_only else 1 :].tolist()
        return [ids[: ids.index(ends) + 1] if ends in ids else ids for ids in texts]

    return generate


def time_side(side: str, path: str) -> None:
    """Time one side on the job in the JSON file `path`, and write the result to the file that the job names."""
    job = json.loads(Path(path).read_text())
    generate = {"ours": ours, "transformers": transformers}[side](job)
    figures = {}
    for method, beams in NUM_BEAMS.items():
        generate(beams, 4)  # warm-up
        start = time.perf_counter()
        texts = generate(beams, job["new_tokens"])
        figures[method] = {"seconds": time.perf_counter() - start, "texts": texts}
    Path(job["out"]).write_text(json.dumps(figures))


def compare_generation(
    workload: str, runs: int, new_tokens: int, shrink: bool, scratch: Path, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Print the comparison and return its rows, {"work": workload and method, "variant": side, "runs": [...]}."""
    bench = Bench(workload, scratch, scratch, 0, shrink)
    job = bench.job(scratch / f"{workload}-generation", device=device) | {"new_tokens": new_tokens}
    job["prompts"] = read_prompts(job)
    path = scratch / f"{workload}-generation.job"
    path.write_text(json.dumps(job))
    rates: dict[str, dict[str, list[float]]] = {method: {side: [] for side in SIDES} for method in NUM_BEAMS}
    num_equal: dict[str, list[int]] = {method: [] for method in NUM_BEAMS}
    for number in tqdm(range(runs), desc=workload, unit="round", disable=not sys.stderr.isatty()):
        texts: dict[str, dict[str, Texts]] = {method: {} for method in NUM_BEAMS}
        for side in SIDES[:: -1 if number % 2 else 1]:
            run_python(f"from benchmarks.peers.generation import time_side; time_side({side!r}, {str(path)!r})")
            for method, figures in json.loads(Path(job["out"]).read_text()).items():
                texts[method][side] = figures["texts"]
                rates[method][side].append(sum(map(len, figures["texts"])) / figures["seconds"])
        for method, by_side in texts.items():
            num_equal[method].append(sum(a == b for a, b in zip(*by_side.values(), strict=True)))
    print(f"\n{workload}: {new_tokens} tokens after each of {BATCH} prompts, {runs} rounds, median (minimum - maximum)")
    for method in NUM_BEAMS:
        print(f"  {method}: {min(num_equal[method])} of {BATCH} texts are equal")
        for side in SIDES:
            print(f"    {side:<24}{format_spread(rates[method][side])} tokens/s")
        print(f"    ours / transformers     {verdict(ratios(*(rates[method][side] for side in SIDES)))}")
    return [
        {
            "work": f"{workload}, {method}",
            "variant": side,
            "runs": [
                {"new_tokens_per_second": rate, "equal_texts": equal}
                for rate, equal in zip(values, num_equal[method], strict=True)
            ],
        }
        for method, sides in rates.items()
        for side, values in sides.items()
    ]


def main() -> None:
    """Run the comparison and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"from {', '.join(WORKLOADS)}; default both")
    parser.add_argument("--runs", type=int, default=5, help="rounds of both sides")
    parser.add_argument("--new-tokens", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--shrink", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder for the JSON file")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.workloads if name not in WORKLOADS]:
        parser.error(f"WORKLOAD: {unknown[0]!r} is not one of {', '.join(WORKLOADS)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for workload in arguments.workloads or WORKLOADS:
            rows += compare_generation(
                workload, arguments.runs, arguments.new_tokens, arguments.shrink, Path(temporary)
            )
    print(f"\nwritten to {record.write(arguments.history, 'generation', rows)}")


if __name__ == "__main__":
    main()
