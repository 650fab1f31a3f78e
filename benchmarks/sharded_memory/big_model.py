"""A random BERT of any size, written tensor by tensor, so that writing it needs the memory of one tensor."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

import models
from benchmarks.prepare.wordpiece import write_wordpiece
from benchmarks.workloads import SAMPLES
from data.formats.rows import read_rows
from models.checkpoints.tensor_files import read_header
from models.checkpoints.tensor_writer import Layout, TensorWriter

VOCABULARY, EXAMPLES = 30_522, 64
SIZES: dict[str, dict[str, Any]] = {
    "300M": {"hidden_size": 1024, "num_hidden_layers": 21, "num_attention_heads": 16, "intermediate_size": 4096},
    "mid": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048},
    "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768},
}
FIRST_LAYER = re.compile(r"(.*encoder\.layer\.)0(\..*)")


def write_model(size: str, folder: Path) -> None:
    """Write config.json, tokenizer.json, the weights in fp32, and train.jsonl with short reviews."""
    folder.mkdir(parents=True)
    config = {"model_type": "bert", "vocab_size": VOCABULARY, **SIZES[size]}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    small = folder / "small"  # a model of one layer: its names and shapes are those of all layers
    small.mkdir()
    (small / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    model = models.from_pretrained(small, init="scratch")
    models.save_pretrained(model, small)
    with (small / "model.safetensors").open("rb") as stream:
        entries = read_header(stream, small / "model.safetensors").entries
    for file in small.iterdir():
        file.unlink()
    small.rmdir()
    layouts: dict[str, Layout] = {}
    for name, entry in entries.items():
        layer = FIRST_LAYER.fullmatch(name)
        names = [f"{layer[1]}{i}{layer[2]}" for i in range(SIZES[size]["num_hidden_layers"])] if layer else [name]
        layouts |= {each: Layout(torch.float32, entry.shape) for each in names}
    with TensorWriter(folder / "model.safetensors", layouts, {"format": "pt"}) as writer:
        for name, layout in layouts.items():
            ones = name.endswith("LayerNorm.weight")
            writer.write(name, torch.ones(layout.shape) if ones else 0.02 * torch.randn(layout.shape))
    (folder / "config.json").write_text(json.dumps(config))
    rows = [row.values for row in read_rows(f"{SAMPLES}/movie_reviews/reviews.tsv", ["text", "label"])]
    rows = sorted(rows, key=lambda row: len(row["text"]))[:EXAMPLES]
    write_wordpiece(folder, [row["text"] for row in rows], vocab_size=1000)
    lines = (json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(rows))
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_model(arguments.size, arguments.folder)
