"""The files of a workload as features for transformers' collators, tokenized once.

Inputs and labels equal ours token by token; the losses of the first step check this. Features are lists in memory,
which is faster for the peers than the arrow files of the package datasets. Images are decoded and preprocessed on
access by transformers' own processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

IGNORE_INDEX = -100
END_TOKENS = ("<|endoftext|>", "</s>", "[SEP]")  # those of data/causal_lm.py that the workloads have
PAD_TOKENS = ("<pad>", "[PAD]", *END_TOKENS)  # GPT-2 has no padding token
SEQ2SEQ = ("summarization", "translation")
Rows = Sequence[dict[str, Any]]
Job = dict[str, Any]  # one run; written by Bench.job in compare_trainers.py
Features = list[dict[str, Any]]


def load_tokenizer(folder: Path) -> Any:
    """Load tokenizer.json into transformers' class."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.pad_token = _first_known(tokenizer, PAD_TOKENS)
    tokenizer.padding_side = "right"
    return tokenizer


def _first_known(tokenizer: Any, tokens: Sequence[str]) -> str:
    known = tokenizer.get_vocab()
    return next(token for token in tokens if token in known)


def end_token_id(tokenizer: Any) -> int:
    """Return the id of the end-of-text token that our encoders choose."""
    return int(tokenizer.convert_tokens_to_ids(_first_known(tokenizer, END_TOKENS)))


def read_label_ids(job: Job) -> dict[str, int]:
    """Return {label: class index} of config.json."""
    return dict(json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))["label2id"])


def encode_text_classification(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """Return input_ids, token_type_ids and the class index of every row."""
    numbers = read_label_ids(job)
    texts = tokenizer([row[job["text_column"]] for row in rows], truncation=True, max_length=job["max_length"])
    types = texts.get("token_type_ids", [[0] * len(ids) for ids in texts["input_ids"]])
    return [
        {"input_ids": a, "token_type_ids": b, "labels": numbers[row[job["label_column"]]]}
        for a, b, row in zip(texts["input_ids"], types, rows, strict=True)
    ]


def encode_dialogue(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """Return the concatenated turns of every row, each followed by the end-of-text token; labels on the replies only.

    A dialogue that is too long loses its oldest exchanges, then the start of the last question, then the end of the
    last reply.
    """
    end, limit = end_token_id(tokenizer), job["max_length"] + 1  # the last token is a target only
    features = []
    for row in rows:
        turns = [[*tokenizer(turn, add_special_tokens=False)["input_ids"], end] for turn in row[job["text_column"]]]
        while sum(map(len, turns)) > limit and len(turns) > 2:
            turns = turns[2:]
        is_target = [position % 2 == 1 for position, ids in enumerate(turns) for _ in ids]
        tokens = [token for ids in turns for token in ids]
        labels = [token if target else IGNORE_INDEX for token, target in zip(tokens, is_target, strict=True)]
        last = len(tokens) - max(0, len(turns[-1]) - (limit - 1))
        kept = slice(max(0, last - limit), last)
        features.append({"input_ids": tokens[kept], "labels": labels[kept]})
    return features


def encode_causal_lm(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """Return the concatenated texts in blocks of max_length tokens.

    The labels are shifted already, so that every token of a block has a target, as in our encoder and nanoGPT.
    transformers' own example has one target less per block.
    """
    end, size = end_token_id(tokenizer), job["max_length"]
    texts = tokenizer([row[job["text_column"]] for row in rows], add_special_tokens=False)["input_ids"]
    stream = [end, *(token for ids in texts for token in (*ids, end))]
    blocks = [(stream[i : i + size], stream[i + 1 : i + size + 1]) for i in range(0, len(stream) - 1, size)]
    return [{"input_ids": a[: len(b)], "labels": b} for a, b in blocks]


def encode_seq2seq(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """Return the source and the target of every row."""
    sources = [job["source_prefix"] + row[job["text_column"]] for row in rows]
    read = tokenizer(sources, truncation=True, max_length=job["max_length"])["input_ids"]
    targets = [row[job["label_column"]] for row in rows]
    written = tokenizer(targets, truncation=True, max_length=job["max_target_length"])["input_ids"]
    return [{"input_ids": a, "labels": b} for a, b in zip(read, written, strict=True)]


ENCODERS: dict[str, Callable[[Rows, Any, Job], Features]] = {
    "text-classification": encode_text_classification,
    "dialogue": encode_dialogue,
    "causal-lm": encode_causal_lm,
    "summarization": encode_seq2seq,
    "translation": encode_seq2seq,
}


class ImageFeatures:
    """Image files with their class indices; `prepare` turns a PIL image into a tensor on every access, as ours does."""

    def __init__(self, rows: Rows, job: Job, prepare: Callable[[Any], Any]):
        numbers, folder = read_label_ids(job), Path(job["train"]).parent
        self.items = [(folder / row[job["text_column"]], numbers[row[job["label_column"]]]) for row in rows]
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        path, label = self.items[index]
        with Image.open(path) as image:
            return {"pixel_values": self.prepare(image.convert("RGB")), "labels": label}


def load_features(job: Job, prepare: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
    """Return (Features or ImageFeatures, the tokenizer or None); for a check only its examples.

    prepare: turns a PIL image into a tensor; default transformers' processor.
    """
    rows = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    if job["task"] != "image-classification":
        tokenizer = load_tokenizer(Path(job["model"]))
        features = ENCODERS[job["task"]](rows, tokenizer, job)
        return [features[i] for i in job["examples"]] or features, tokenizer
    if prepare is None:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(job["model"])
        prepare = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    return ImageFeatures([rows[i] for i in job["examples"]] or rows, job, prepare), None


def num_tokens(feature: dict[str, Any], task: str) -> int:
    """Return the number of tokens read. The last token of a dialogue is a target only; an image counts as 1."""
    if "input_ids" not in feature:
        return 1
    return len(feature["input_ids"]) + (len(feature["labels"]) if task in SEQ2SEQ else 0) - (task == "dialogue")


def pool_tokens(features: Any, task: str) -> float:
    """Return the mean of num_tokens over the whole pool."""
    if isinstance(features, ImageFeatures):
        return 1.0
    return sum(num_tokens(feature, task) for feature in features) / len(features)
