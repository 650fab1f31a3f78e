"""Mutated files of tokenizers and of image preprocessing, and texts encoded by what can still be loaded."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.task_data import write_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data import load_tokenizer
from data.image_preprocessing import read_preprocessing
from faults.fuzz_weights import damage_json
from faults.mutation import attempt, count, mutate

TEXTS = ["", "a", "the cat", "naïve ﬁne 电影 🎉", "a" * 300, " \n\t ", "[CLS] </s> <pad>", "\u0301\u202e\0"]
WORDS = ["a", "b", "ab", "the", "cat", "##t", "▁", "▁a", "Ġ", "Ġa"]


def piece(text: str, score: bytes = bytes(4), kind: int = 1) -> bytes:
    """Return a piece of a SentencePiece model, as protobuf writes it."""
    inner = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + score + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(inner)]) + inner


def seeds() -> dict[str, dict[str, bytes]]:
    """Return {kind: {name of a file: content}} of folders that can be loaded."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<s>", "</s>", "<unk>", "<pad>", "<mask>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*special, *WORDS])}
    word_piece = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    word_piece.normalizer, word_piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    word_piece.post_processor, word_piece.decoder = (
        processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        decoders.WordPiece(),
    )
    bpe = Tokenizer(models.BPE(vocab, [("a", "b")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    unigram = Tokenizer(models.Unigram([(token, -1.0) for token in vocab], 0))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 6)]
    )
    found = {f"{kind}.json": {"tokenizer.json": t.to_str().encode()} for kind, t in
             (("wordpiece", word_piece), ("bpe", bpe), ("unigram", unigram))}  # fmt: skip
    settings = {"do_lower_case": True, "additional_special_tokens": ["<ent>"], "pad_token": "[PAD]"}
    lines = "\n".join(vocab).encode()
    sentence_piece = piece("<unk>", kind=2) + piece("</s>", kind=3) + b"".join(piece(word) for word in WORDS)
    for kind, files in {
        "BertTokenizer": {"vocab.txt": lines},
        "GPT2Tokenizer": {"vocab.json": json.dumps(vocab).encode(), "merges.txt": b"#version: 0.2\na b\n"},
        "RobertaTokenizer": {"vocab.json": json.dumps(vocab).encode(), "merges.txt": b"a b\n"},
        "T5Tokenizer": {"spiece.model": sentence_piece},
    }.items():
        config = json.dumps(settings | {"tokenizer_class": kind}).encode()
        found[kind] = files | {"tokenizer_config.json": config, "added_tokens.json": b'{"<ent>": 30}'}
    with tempfile.TemporaryDirectory() as name:
        folder = write_model("image-classification", Path(name) / "model")
        found["images"] = {"preprocessor_config.json": (folder / "preprocessor_config.json").read_bytes()}
    return found


def load(folder: Path, kind: str) -> None:
    """Load what a folder holds, and encode and decode texts."""
    if kind == "images":
        read_preprocessing(folder)
        return
    tokenizer = load_tokenizer(folder)
    encodings = tokenizer.encode_batch([*TEXTS, *zip(TEXTS, TEXTS[::-1], strict=True)])
    tokenizer.decode_batch([encoding.ids for encoding in encodings])


def run(count_: int, seed: int) -> dict[str, Any]:
    """Change and load the files of `count_` folders."""
    return count(outcomes(count_, seed))


def outcomes(count_: int, seed: int) -> Iterator[tuple[str, str]]:
    rng, good = random.Random(seed), seeds()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for i in range(count_):
            kind = rng.choice(list(good))
            files = dict(good[kind])
            file = rng.choice(list(files))
            files[file] = (damage_json if file.endswith(".json") else mutate)(rng, files[file])
            for name_, content in files.items():
                (folder / name_).write_bytes(content)
            yield f"{kind}, {file}, try {i}", attempt(load, folder, kind)
            for name_ in files:
                os.unlink(folder / name_)
