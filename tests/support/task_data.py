"""A tiny data set and a tiny model for every row of TASKS, so that one test can run for all of them.

A new task needs a line in DATA (and a new head one in MODELS). The texts are of random length, some of them longer than
is read, and what is to be learned can be learned from the words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as vocabularies

from engine.tasks import TASKS
from models import TaskModel, from_pretrained
from support.tiny_models import config_folder

SPECIAL = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", "[MASK]", "<|endoftext|>", "</s>"]
COLOURS = ["red", "green", "blue"]
NAMES = ["anna", "bob", "ulm", "rome"]
WORDS = [
    *COLOURS,
    *NAMES,
    "the",
    "a",
    "cat",
    "dog",
    "saw",
    "likes",
    "very",
    "is",
    "house",
    "in",
    "and",
    "what",
    "?",
    ".",
]
MARKS = ["@", "#", "*", "^", "person", "place", "user", "assistant"]  # of entities, of roles
SENTINELS = [f"<extra_id_{i}>" for i in (2, 1, 0)]
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + WORDS + MARKS + SENTINELS)}
SIDE = 8  # of an image, in pixels

Row = dict[str, Any]


def words(rng: random.Random, shortest: int = 1, longest: int = 26) -> list[str]:
    """Return random words; at most more than data.max_length, which is 24."""
    return rng.choices(WORDS, k=rng.randint(shortest, longest))


def colour_of(text: list[str]) -> str:
    return next((word for word in text if word in COLOURS), COLOURS[0])


# One example of each task


def text_class(rng: random.Random) -> Row:
    text = words(rng)
    return {"text": " ".join(text), "label": colour_of(text)}


def text_labels(rng: random.Random) -> Row:
    text = words(rng)
    return {"text": " ".join(text), "labels": [name for name in COLOURS if name in text]}


def text_score(rng: random.Random) -> Row:
    text = words(rng)
    return {"text": " ".join(text), "score": sum(word in NAMES for word in text) / 2}


def tagged(rng: random.Random) -> Row:
    text = words(rng)
    tags = []
    for i, word in enumerate(text):
        inside = i > 0 and text[i - 1] in NAMES
        tags.append(("I-NAME" if inside else "B-NAME") if word in NAMES else "O")
    return {"tokens": text, "tags": tags}


def text_alone(rng: random.Random) -> Row:
    return {"text": " ".join(words(rng))}


def answered(rng: random.Random) -> Row:
    """Return a text, another one with the same words and names, and perhaps one with other ones."""
    text = words(rng, 3)
    negative = " ".join(words(rng)) if rng.random() < 0.5 else ""
    return {"anchor": " ".join(text), "positive": " ".join(rng.sample(text, len(text))), "negative": negative}


def conversation(rng: random.Random) -> Row:
    turns = []
    for _ in range(rng.randint(1, 3)):
        question = words(rng, 1, 5)
        turns += [("user", question), ("assistant", question[::-1])]
    return {"messages": [{"role": role, "content": " ".join(content)} for role, content in turns]}


def summary(rng: random.Random) -> Row:
    text = words(rng)
    return {"text": " ".join(text), "summary": " ".join(text[:3])}


def translation(rng: random.Random) -> Row:
    text = words(rng, 1, 9)
    return {"source": " ".join(text), "target": " ".join(reversed(text))}


def question(rng: random.Random) -> Row:
    context = [word for word in words(rng, 4, 30) if word not in NAMES]
    place = rng.randint(0, len(context))
    context.insert(place, rng.choice(NAMES))
    answer = {"text": context[place], "answer_start": len(" ".join([*context[:place], ""]))}
    return {"question": "what is in a house ?", "context": " ".join(context), "answers": [answer]}


def relation(rng: random.Random) -> Row:
    text = [word for word in words(rng, 3, 26) if word not in NAMES]
    entities = sorted(rng.sample(range(len(text) + 1), 2)) if len(text) > 1 else [0, 1]
    text = [*text, "."]
    for place, name in zip(reversed(entities), rng.sample(NAMES, 2), strict=True):
        text.insert(place, name)
    places = [entities[0], entities[1] + 1]
    spans = []
    for place, kind in zip(places, ("person", "place"), strict=True):
        start = len(" ".join([*text[:place], ""]))
        spans.append({"start": start, "end": start + len(text[place]), "type": kind})
    name = "lives_in" if "in" in text[places[0] : places[1]] else "no_relation"
    return {"text": " ".join(text), "subject": spans[0], "object": spans[1], "relation": name}


def choice(rng: random.Random) -> Row:
    """Return words and two to four other words, of which one is the last word of the text."""
    text = words(rng, 2, 30)
    choices = rng.sample(WORDS[: rng.randint(4, 9)], rng.randint(2, 4))
    label = rng.randrange(len(choices))
    return {"context": " ".join([*text, choices[label]]), "question": "what is", "choices": choices, "label": label}


DATA: dict[str, Callable[[random.Random], Row]] = {
    "text-classification": text_class,
    "multi-label-classification": text_labels,
    "text-regression": text_score,
    "token-classification": tagged,
    "multiple-choice": choice,
    "masked-lm": text_alone,
    "span-corruption": text_alone,
    "sentence-embedding": answered,
    "causal-lm": text_alone,
    "dialogue": conversation,
    "summarization": summary,
    "translation": translation,
    "question-answering": question,
    "relation-extraction": relation,
}


def write_images(folder: Path, count: int, rng: random.Random) -> Path:
    """Write a folder for each colour, with noisy images of it."""
    for i in range(count):
        name = COLOURS[i % 3]
        noise = [rng.randrange(100) for _ in range(3 * SIDE * SIDE)]
        image = np.array(noise, dtype=np.uint8).reshape(SIDE, SIDE, 3)
        image[..., COLOURS.index(name)] += 100
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def labelled_picture(rng: random.Random) -> Row:
    """Return a picture as "path", with a label for each colour of which it has much."""
    labels = [name for name in COLOURS if rng.random() < 0.4]
    noise = [rng.randrange(100) for _ in range(3 * SIDE * SIDE)]
    image = np.array(noise, dtype=np.uint8).reshape(SIDE, SIDE, 3)
    image[..., [COLOURS.index(name) for name in labels]] += 100
    return {"path": image, "labels": labels}


def write_pictures(file: Path, count: int, rng: random.Random) -> Path:
    """Write a list of pictures with several labels, and the pictures beside it; the list has absolute paths."""
    rows = [{"id": f"{file.stem}-{i}", **labelled_picture(rng)} for i in range(count)]
    for row in rows:
        image, row["path"] = row["path"], str(file.with_name(f"{row['id']}.png").absolute())
        Image.fromarray(image).save(row["path"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_rows(file: Path, task: str, count: int, rng: random.Random) -> Path:
    lines = [json.dumps({"id": f"{file.stem}-{i}", **DATA[task](rng)}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# A model for each head


@dataclass(frozen=True)
class Kind:
    """A tiny model. model_type: a key of zoo.ZOO; changes: fields of its config with other values here."""

    model_type: str
    changes: dict[str, Any]


BERT = Kind("bert", {"vocab_size": len(VOCABULARY), "max_position_embeddings": 40})
GPT2_IDS = dict.fromkeys(("bos_token_id", "eos_token_id"), VOCABULARY["<|endoftext|>"])
GPT2 = Kind("gpt2", {"vocab_size": len(VOCABULARY), "n_positions": 64, **GPT2_IDS})
T5 = Kind("t5", {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": VOCABULARY["</s>"]})
MODELS = {
    "sequence-classification": BERT,
    "token-classification": BERT,
    "question-answering": BERT,
    "relation-classification": BERT,
    "multiple-choice": BERT,
    "masked-lm": BERT,
    "sentence-embedding": BERT,
    "causal-lm": GPT2,
    "seq2seq-lm": T5,
    "image-classification": Kind("vit", {"image_size": SIDE}),
}
ENDS = {"bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"), "gpt2": ("$A", "$A $B"), "t5": ("$A </s>",) * 2}


def kind_of(task: str) -> Kind:
    return MODELS[TASKS[task].head]


def write_model(task: str, folder: Path) -> Path:
    """Write config.json and the tokenizer or preprocessing; without weights, it is for model.init = scratch."""
    kind = kind_of(task)
    config_folder(folder, kind.model_type, **kind.changes)
    if kind.model_type == "vit":
        preprocessing = {"size": SIDE, "do_rescale": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        return folder
    tokenizer = Tokenizer(vocabularies.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    single, pair = ENDS[kind.model_type]
    used = [(token, VOCABULARY[token]) for token in SPECIAL if token in single]
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair if "$B" in pair else None, special_tokens=used
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write(task: str, folder: Path, count: int = 24, seed: int = 0) -> dict[str, Any]:
    """Write the files of a task below `folder` and return the settings that a run on them needs.

    `count` examples to train on and half as many, of another seed, to validate on; the model starts from scratch.
    """
    rng = random.Random(seed)
    settings: dict[str, Any] = {
        "run.task": task,
        "run.device": "cpu",
        "model.name": str(write_model(task, folder / "model")),
        "model.init": "scratch",
        "data.max_length": 24,
        "train.global_batch_size": 8,
        "optim.lr": 1e-3,
        "log.every_steps": 1,
    }
    for name, size in (("train", count), ("validation", count // 2)):
        if TASKS[task].columns.label == "labels" and kind_of(task).model_type == "vit":
            settings[f"data.{name}"] = str(write_pictures(folder / f"{name}.jsonl", size, rng))
        elif kind_of(task).model_type == "vit":
            settings[f"data.{name}"] = str(write_images(folder / name, size, rng))
        else:
            settings[f"data.{name}"] = str(write_rows(folder / f"{name}.jsonl", task, size, rng))
    if TASKS[task].generates:
        settings["generate.max_new_tokens"] = 6
    if TASKS[task].section == "question_answering":
        settings["question_answering.doc_stride"] = 4
    if TASKS[task].section == "sentence_embedding":
        settings["sentence_embedding.negative_columns"] = "negative"
    if TASKS[task].section == "seq2seq":
        settings["seq2seq.max_target_length"] = 8
    return settings


def tiny_gpt2(folder: Path, seed: int = 0, **changes: Any) -> TaskModel:
    """Return a random language model that reads 64 tokens of a vocabulary of 260."""
    config_folder(folder, "gpt2", **{"vocab_size": 260, "n_positions": 64, "eos_token_id": 0} | changes)
    return from_pretrained(folder, head="causal-lm", init="scratch", seed=seed, dropout=0.0).eval()
