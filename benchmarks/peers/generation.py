"""Text from the same weights and prompts by models/generation/generate.py and by transformers' generate:

    python -m benchmarks.peers.generation [gpt2-dialogue] [t5-small] [--runs 5] [--new-tokens 64] [--shrink]

8 prompts of unequal lengths are one batch, continued greedily and by 4 beams, with a cache of keys and values on both
sides, in fp32. The two take turns, each in a process of its own, and the first few tokens are written before the clock
starts. Printed: new tokens a second, as the median with the least and the most; the ratios of the two runs of each
round, not resolved where they lie on both sides of 1; and how many of the texts are the same, id by id.
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
from benchmarks.loading import run, spread
from benchmarks.peers.__main__ import Bench, ratios, verdict
from benchmarks.peers.features import IGNORE, load_features

WORKS = ("gpt2-dialogue", "t5-small")
SIDES = ("ours", "transformers")
WAYS = {"greedy": 1, "4 beams": 4}  # beams of each
BATCH = 8
Texts = list[list[int]]
Write = Callable[[int, int], Texts]  # (beams, new tokens) -> the new ids of each prompt, to the end token


def prompts_of(job: dict[str, Any]) -> Texts:
    """The first examples of the pool: sources, or conversations up to the first reply."""
    features, _ = load_features(job | {"examples": list(range(BATCH))})
    if job["task"] != "dialogue":
        return [feature["input_ids"] for feature in features]
    replies = [next(i for i, label in enumerate(f["labels"]) if label != IGNORE) for f in features]
    return [feature["input_ids"][:reply] for feature, reply in zip(features, replies, strict=True)]


def ours(job: dict[str, Any]) -> Write:
    import models
    from models.generation.generate import GenerationSettings, generate

    folder = Path(job["model"])
    model = models.from_pretrained(folder, head="causal-lm" if job["task"] == "dialogue" else "seq2seq-lm")

    def write(beams: int, new: int) -> Texts:
        settings = GenerationSettings.read(folder, num_beams=beams, max_new_tokens=new)
        return [one.ids for one in generate(model, job["prompts"], settings)]

    return write


def transformers(job: dict[str, Any]) -> Write:
    import torch

    from benchmarks.peers.runs import load_model

    model, prompts = load_model(job).eval(), job["prompts"]
    longest = max(map(len, prompts))
    decoder_only = job["task"] == "dialogue"  # which is padded on the left, so that what is new stands behind
    config = model.config
    ends, pad = config.eos_token_id, config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    rows = []
    for ids in prompts:
        padding, ones = [pad] * (longest - len(ids)), [1] * len(ids)
        zeros = [0] * len(padding)
        rows.append((padding + ids, zeros + ones) if decoder_only else (ids + padding, ones + zeros))
    input_ids, mask = (torch.tensor([row[i] for row in rows]) for i in (0, 1))

    def write(beams: int, new: int) -> Texts:
        out = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            pad_token_id=pad,
        )
        texts = out[:, longest if decoder_only else 1 :].tolist()
        return [ids[: ids.index(ends) + 1] if ends in ids else ids for ids in texts]

    return write


def timed(side: str, path: str) -> None:
    """One run of a side, of the job in the JSON file at `path`."""
    job = json.loads(Path(path).read_text())
    write = {"ours": ours, "transformers": transformers}[side](job)
    figures = {}
    for way, beams in WAYS.items():
        write(beams, 4)
        start = time.perf_counter()
        texts = write(beams, job["new_tokens"])
        figures[way] = {"seconds": time.perf_counter() - start, "texts": texts}
    Path(job["out"]).write_text(json.dumps(figures))


def measure(work: str, runs: int, new_tokens: int, shrink: bool, scratch: Path) -> list[dict[str, Any]]:
    """Rows for the record, {"work": the work and the way, "variant": the side, "runs": [...]}; prints them too."""
    bench = Bench(work, scratch, scratch, 0, shrink)
    job = bench.job(scratch / f"{work}-generation") | {"new_tokens": new_tokens}
    job["prompts"] = prompts_of(job)
    path = scratch / f"{work}-generation.job"
    path.write_text(json.dumps(job))
    rates: dict[str, dict[str, list[float]]] = {way: {side: [] for side in SIDES} for way in WAYS}
    same: dict[str, list[int]] = {way: [] for way in WAYS}
    for number in tqdm(range(runs), desc=work, unit="round", disable=not sys.stderr.isatty()):
        texts: dict[str, dict[str, Texts]] = {way: {} for way in WAYS}
        for side in SIDES[:: -1 if number % 2 else 1]:
            run(f"from benchmarks.peers.generation import timed; timed({side!r}, {str(path)!r})")
            for way, figures in json.loads(Path(job["out"]).read_text()).items():
                texts[way][side] = figures["texts"]
                rates[way][side].append(sum(map(len, figures["texts"])) / figures["seconds"])
        for way, of_side in texts.items():
            same[way].append(sum(a == b for a, b in zip(*of_side.values(), strict=True)))
    print(f"\n{work}: {new_tokens} tokens after each of {BATCH} prompts, {runs} rounds, median (least - most)")
    for way in WAYS:
        print(f"  {way}: {min(same[way])} of {BATCH} texts are the same")
        for side in SIDES:
            print(f"    {side:<24}{spread(rates[way][side])} tokens/s")
        print(f"    ours / transformers     {verdict(ratios(*(rates[way][side] for side in SIDES)))}")
    return [
        {"work": f"{work}, {way}", "variant": side, "runs": [{"new_tokens_per_second": rate} for rate in of_side]}
        for way, sides in rates.items()
        for side, of_side in sides.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; both if none")
    parser.add_argument("--runs", type=int, default=5, help="rounds of both sides")
    parser.add_argument("--new-tokens", type=int, default=64, help="that each text is given")
    parser.add_argument("--shrink", action="store_true", help="tiny models, which show that all of it runs")
    parser.add_argument("--history", type=Path, default=record.HISTORY, help="folder for the JSON file")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.works if name not in WORKS]:
        parser.error(f"WORK: {unknown[0]!r} is not one of {', '.join(WORKS)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for work in arguments.works or WORKS:
            rows += measure(work, arguments.runs, arguments.new_tokens, arguments.shrink, Path(temporary))
    print(f"\nwritten to {record.write(arguments.history, 'generation', rows)}")


if __name__ == "__main__":
    main()
