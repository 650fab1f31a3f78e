"""The files of a work as the features that transformers' collators read, tokenised once, as its users do.

What a model reads and learns is what ours does, token by token; the losses of the first step show it. The features are
lists in memory, which costs the peers less than the arrow files of the package datasets would. Images are the same
files, decoded and prepared as each is asked for, by transformers' own processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

IGNORE = -100
END_TOKENS = ("<|endoftext|>", "</s>", "[SEP]")  # of what data/causal_lm.py knows, those of the works
PAD_TOKENS = ("<pad>", "[PAD]", *END_TOKENS)  # GPT-2 has no pad of its own
SEQ2SEQ = ("summarization", "translation")
Rows = Sequence[dict[str, Any]]
Job = dict[str, Any]  # what benchmarks/peers/__main__.py says of a run
Features = list[dict[str, Any]]


def load_tokenizer(folder: Path) -> Any:
    """tokenizer.json in transformers' class."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.pad_token = _first_known(tokenizer, PAD_TOKENS)
    tokenizer.padding_side = "right"
    return tokenizer


def _first_known(tokenizer: Any, tokens: Sequence[str]) -> str:
    known = tokenizer.get_vocab()
    return next(token for token in tokens if token in known)


def end_token(tokenizer: Any) -> int:
    """The id of what ends a text, as ours chooses it."""
    return int(tokenizer.convert_tokens_to_ids(_first_known(tokenizer, END_TOKENS)))


def label_numbers(job: Job) -> dict[str, int]:
    """{label: its number}, from config.json."""
    return dict(json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))["label2id"])


def classified_texts(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """input_ids, token_type_ids, and the number of the class."""
    numbers = label_numbers(job)
    texts = tokenizer([row[job["text"]] for row in rows], truncation=True, max_length=job["max_length"])
    types = texts.get("token_type_ids", [[0] * len(ids) for ids in texts["input_ids"]])
    return [
        {"input_ids": a, "token_type_ids": b, "labels": numbers[row[job["label"]]]}
        for a, b, row in zip(texts["input_ids"], types, rows, strict=True)
    ]


def dialogues(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """The turns end to end, each with the end of text behind it; labels on the replies only.

    One that is longer than ours reads loses its oldest exchanges, then the beginning of the last question, then the end
    of the last reply.
    """
    end, limit = end_token(tokenizer), job["max_length"] + 1  # the last token is a target only
    features = []
    for row in rows:
        turns = [[*tokenizer(turn, add_special_tokens=False)["input_ids"], end] for turn in row[job["text"]]]
        while sum(map(len, turns)) > limit and len(turns) > 2:
            turns = turns[2:]
        learned = [place % 2 == 1 for place, ids in enumerate(turns) for _ in ids]
        tokens = [token for ids in turns for token in ids]
        labels = [token if learn else IGNORE for token, learn in zip(tokens, learned, strict=True)]
        last = len(tokens) - max(0, len(turns[-1]) - (limit - 1))
        kept = slice(max(0, last - limit), last)
        features.append({"input_ids": tokens[kept], "labels": labels[kept]})
    return features


def blocks(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """All texts end to end in blocks of max_length. The labels are shifted already, so that a block learns all of its
    tokens, as ours and nanoGPT's do; transformers' own example leaves out one a block."""
    end, size = end_token(tokenizer), job["max_length"]
    texts = tokenizer([row[job["text"]] for row in rows], add_special_tokens=False)["input_ids"]
    stream = [end, *(token for ids in texts for token in (*ids, end))]
    parts = [(stream[i : i + size], stream[i + 1 : i + size + 1]) for i in range(0, len(stream) - 1, size)]
    return [{"input_ids": a[: len(b)], "labels": b} for a, b in parts]


def pairs(rows: Rows, tokenizer: Any, job: Job) -> Features:
    """A source and what to write for it."""
    sources = [job["prefix"] + row[job["text"]] for row in rows]
    read = tokenizer(sources, truncation=True, max_length=job["max_length"])["input_ids"]
    targets = [row[job["label"]] for row in rows]
    written = tokenizer(targets, truncation=True, max_length=job["max_target_length"])["input_ids"]
    return [{"input_ids": a, "labels": b} for a, b in zip(read, written, strict=True)]


ENCODERS: dict[str, Callable[[Rows, Any, Job], Features]] = {
    "text-classification": classified_texts,
    "dialogue": dialogues,
    "causal-lm": blocks,
    "summarization": pairs,
    "translation": pairs,
}


class Images:
    """Files and their classes; `prepare` makes a tensor of a PIL image each time it is asked for, as ours does."""

    def __init__(self, rows: Rows, job: Job, prepare: Callable[[Any], Any]):
        numbers, folder = label_numbers(job), Path(job["train"]).parent
        self.items = [(folder / row[job["text"]], numbers[row[job["label"]]]) for row in rows]
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        path, label = self.items[index]
        with Image.open(path) as image:
            return {"pixel_values": self.prepare(image.convert("RGB")), "labels": label}


def load_features(job: Job, prepare: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
    """(Features or Images, the tokenizer or None); of a check its examples only.

    prepare: what makes a tensor of an image, instead of transformers' processor.
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
    return Images([rows[i] for i in job["examples"]] or rows, job, prepare), None


def num_tokens(feature: dict[str, Any], task: str) -> int:
    """What ours counts as read: of a dialogue the last token is a target only. An image counts as 1."""
    if "input_ids" not in feature:
        return 1
    return len(feature["input_ids"]) + (len(feature["labels"]) if task in SEQ2SEQ else 0) - (task == "dialogue")


def pool_tokens(features: Any, task: str) -> float:
    """The mean of num_tokens over the whole pool."""
    if isinstance(features, Images):
        return 1.0
    return sum(num_tokens(feature, task) for feature in features) / len(features)
