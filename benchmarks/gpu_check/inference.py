"""Part 7: generation and prediction beside transformers, on the same weights.

Generation is benchmarks/peers/generation.py. Prediction classifies the texts of bert-base-ragged: ours is
engine.predict, transformers' a loop over padded batches of the same number of tokens, sorted by length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import clock
from benchmarks.gpu_check.check import Check, is_installed
from benchmarks.peers.generation import BATCH, compare_generation
from benchmarks.peers.generation import WORKLOADS as GENERATORS
from engine.config import Config
from engine.evaluate import open_trained
from engine.precision import DTYPES
from engine.predict import predict

PREDICTED = "bert-base-ragged"
BATCH_TOKENS = 16_384  # of both sides
TOLERANCE = 1e-3  # of logits in fp32, whose scale is about 1
Predict = Callable[[], list[list[float]]]  # the logits of every text


def run(check: Check) -> None:
    """Compare prediction, then generation."""
    if not is_installed("transformers"):
        check.note("prediction, generation", "transformers is not installed")
        return
    for precision in check.precisions[:2]:
        if check.has_time_for(5, f"prediction in {precision}"):
            compare_prediction(check, precision)
    for workload in GENERATORS:
        if check.has_time_for(0 if check.shrink else 25, workload):
            device, tokens = check.device.type, 6 if check.shrink else 64
            try:
                rows = compare_generation(workload, 1, tokens, check.shrink, check.scratch, device)
            except SystemExit as error:
                check.note(workload, str(error)[:200])
                continue
            for row in rows:
                (figures,) = row["runs"]
                equal = {"ok": figures.pop("equal_texts") == BATCH}
                rate = figures["new_tokens_per_second"]
                check.add(row["work"], f"{row['variant']} fp32", tokens_per_second=rate, **equal)


def compare_prediction(check: Check, precision: str) -> None:
    """Write the texts per second of both sides, and whether their logits agree."""
    settings: dict[str, Any] = {"train.precision": precision, "eval.batch_tokens": BATCH_TOKENS}
    cfg = check.recipe(PREDICTED, **settings)
    sides = {"ours": our_prediction(cfg), "transformers": their_prediction(cfg, check.device)}
    logits = {}
    now = clock(check.device)
    for name, side in sides.items():
        side()  # warm-up
        start = now()
        logits[name] = torch.tensor(side())
        seconds = now() - start
        error = float((logits[name] - logits["ours"]).abs().max())
        ok = {"ok": error <= TOLERANCE} if precision == "fp32" else {}
        rate = {"samples_per_second": len(logits[name]) / seconds, "loss_error": error}
        check.add(f"prediction, {PREDICTED}", f"{name} {precision}", **rate, **ok)


def our_prediction(cfg: Config) -> Predict:
    """Return engine.predict on the training texts."""
    model, examples, context, _ = open_trained(Path(cfg.model.name), cfg, cfg.data.train, labelled=False)

    def run_once() -> list[list[float]]:
        return [[*row["logits"].values()] for row in predict(model, examples, context)]

    return run_once


def their_prediction(cfg: Config, device: torch.device) -> Predict:
    """Return a loop over transformers' model in batches that are sorted by length and padded."""
    import transformers

    from benchmarks.peers.features import load_tokenizer

    model = transformers.AutoModelForSequenceClassification.from_pretrained(cfg.model.name).to(device).eval()
    tokenizer = load_tokenizer(Path(cfg.model.name))
    texts = [json.loads(line)["text"] for line in Path(cfg.data.train).read_text(encoding="utf-8").splitlines()]
    ids = tokenizer(texts, truncation=True, max_length=cfg.data.max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    dtype = DTYPES[cfg.train.precision]

    @torch.no_grad()
    def run_once() -> list[list[float]]:
        found: list[Any] = [None] * len(ids)
        rest = order
        while rest:
            count = max(1, BATCH_TOKENS // len(ids[rest[0]]))
            chosen, rest = rest[:count], rest[count:]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt").to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**batch).logits.float().tolist()
            for i, values in zip(chosen, logits, strict=True):
                found[i] = values
        return found

    return run_once
