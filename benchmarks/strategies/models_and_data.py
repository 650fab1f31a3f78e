"""Four small random models and texts or images of data/samples, for the comparison of strategies.

Texts have targets of different lengths, where an average of averages differs from the average over all targets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
from benchmarks.prepare.small_t5 import write_small_t5
from benchmarks.prepare.wordpiece import write_wordpiece
from benchmarks.workloads import SAMPLES
from data.formats.lines import locate
from data.formats.rows import read_rows
from engine import config as configs
from engine.config import Config
from engine.tasks import TASKS

GLOBAL_BATCH_SIZE, EXAMPLES, HELD_OUT = 16, 320, 16
Row = dict[str, Any]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


@dataclass(frozen=True)
class Subject:
    """A model, the task that it learns, and its rows."""

    task: str
    model_config: dict[str, Any]
    rows: Callable[[], list[Row]] | None  # None: images
    settings: dict[str, Any]
    hub_class: str  # of transformers


def tagged_rows() -> list[Row]:
    """Return the sentences of the relations, whose tags are their entities: targets are words."""
    rows = []
    for row in read_rows(f"{SAMPLES}/relations/train.jsonl", ["text", "subject", "object"]):
        text, spans = row.values["text"], (row.values["subject"], row.values["object"])
        tokens, tags, place = text.split(), [], 0
        for token in tokens:
            begin = text.index(token, place)
            place = begin + len(token)
            inside = [span for span in spans if begin < span["end"] and place > span["start"]]
            first = inside and begin <= inside[0]["start"]
            tags.append(f"{'B' if first else 'I'}-{inside[0]['type']}" if inside else "O")
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def dialogue_rows() -> list[Row]:
    rows = read_rows(f"{SAMPLES}/dialogue/dialogues.jsonl", ["messages"])
    return [{"messages": row.values["messages"]} for row in rows]


def message_rows() -> list[Row]:
    rows = read_rows(f"{SAMPLES}/django_messages/messages.jsonl", ["source", "target"])
    return [{"source": row.values["source"], "target": row.values["target"]} for row in rows]


GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
IMAGES = "package:data/samples/fashion_mnist/train-images-idx3-ubyte.gz"
SUBJECTS = {
    "BERT": Subject(
        "token-classification",
        {"model_type": "bert", **SIZES, **NO_DROPOUT},
        tagged_rows,
        {"data.max_length": 64},
        "AutoModelForTokenClassification",
    ),
    "GPT-2": Subject(
        "dialogue", GPT2, dialogue_rows, {"data.max_length": 96, "generate.max_new_tokens": 2}, "AutoModelForCausalLM"
    ),
    "T5": Subject(
        "translation",
        {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "dropout_rate": 0.0},
        message_rows,
        {"data.max_length": 48, "seq2seq.max_target_length": 48, "generate.max_new_tokens": 2},
        "AutoModelForSeq2SeqLM",
    ),
    "ViT": Subject(
        "image-classification",
        {"model_type": "vit", **SIZES, **NO_DROPOUT, "image_size": 28, "patch_size": 7},
        None,
        {"data.max_train_examples": EXAMPLES},
        "AutoModelForImageClassification",
    ),
}


def write_subject(name: str, folder: Path, steps: int) -> Config:
    """Write the files of a subject below a folder; return the recipe of its run on one process."""
    subject, home = SUBJECTS[name], folder / name
    home.mkdir(parents=True)
    values: dict[str, Any] = {
        "run.task": subject.task,
        "run.device": "cpu",
        "run.folder": str(home / "run"),
        "model.name": str(home / "model"),
        "train.global_batch_size": GLOBAL_BATCH_SIZE,
        "train.max_steps": steps,
        "optim.lr": 1e-4,
        "optim.lr_schedule": "constant",
        "optim.warmup_steps": 0.0,
        "optim.weight_decay": 0.0,
        "eval.every_steps": 1_000_000,
        "eval.num_shown_generations": 0,
        "log.every_steps": 1,
    }
    if subject.rows is None:
        values |= {"data.train": IMAGES, "data.validation_fraction": HELD_OUT / EXAMPLES}
        labels: list[str] = [str(i) for i in range(10)]
        texts: list[str] = []
    else:
        rows = subject.rows()
        random.Random(0).shuffle(rows)
        rows = rows[: EXAMPLES + HELD_OUT]
        labels = sorted({tag for row in rows for tag in row.get("tags", [])})
        texts = [json.dumps(row, ensure_ascii=False) for row in rows]
        for part, chosen in (("train", rows[HELD_OUT:]), ("validation", rows[:HELD_OUT])):
            lines = (json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(chosen))
            (home / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            values[f"data.{part}"] = str(home / f"{part}.jsonl")
    write_model(subject, home / "model", labels, texts)
    config = configs.override(configs.Config(), values | subject.settings)
    configs.check(config)
    return config


def write_model(subject: Subject, folder: Path, labels: list[str], texts: list[str]) -> None:
    """Write a random checkpoint with its head, and its tokenizer or image preprocessor."""
    folder.mkdir()
    kind, config = subject.model_config["model_type"], subject.model_config
    if kind == "t5":
        write_small_t5(folder, texts, vocab_size=2000, num_heads=4, **config)
    elif kind == "bert":
        write_wordpiece(folder, texts, vocab_size=2000)
    elif kind == "gpt2":
        source = locate("package:data/samples/dialogue/model/tokenizer.json")
        (folder / "tokenizer.json").write_bytes(Path(source).read_bytes())
    else:
        preprocessing = {"size": 28, "do_rescale": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    if kind in ("bert", "gpt2"):
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        config = config | {"vocab_size": len(vocabulary)}
    if kind != "t5":
        (folder / "config.json").write_text(json.dumps(config))
    head = TASKS[subject.task].head
    model = models.from_pretrained(folder, head=head, labels=labels or None, init="scratch", seed=0)
    models.save_pretrained(model, folder)
