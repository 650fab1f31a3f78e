"""A small WordPiece vocabulary, and texts that are hard to tokenize."""

from __future__ import annotations

import json
import random
from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]"]
# Every ASCII character and a few others alone and inside a word, so that hardly anything is unknown and one wrong
# character shows; and some whole words.
CHARACTERS = [*map(chr, range(33, 127)), *"éßñıİçÉ中文漢字あア안نमि♥🎉ﬁ"]
WORDS = ["the", "film", "was", "good", "not", "##ing", "##ed", "École", "ecole", "naive"]
VOCAB = [*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *WORDS]
PIECES = ["the film", "was GOOD", "École", "naïve", "Ｆｕｌｌ", "中文字", "漢a字b", "かな", "🎉", "👩‍👩‍👧", "🇩🇪"]
PIECES += ["İstanbul", "STRAẞE", "ﬁne", "don't", "1,000.5", "a-b", "$^`~|", "مرحبا", "हिन्दी", "안녕", "x" * 120]
PIECES += ["[MASK]", "[mask]", "[CLS]", "[unused1]", "<ent>", "MyTok", "mytok", "e\u0301", "\x00", "\x07", "\u200b"]
PIECES += ["\u2028", "\x85", "\ufeff", "\ufffd", "\u3000", "\xa0", "\t\n", "\u202e"]


def odd_texts(count: int, seed: int = 0) -> list[str]:
    """Random strings: half of the pieces above, half of any characters of the planes that are in use."""
    rng = random.Random(seed)
    pieces = [" ".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8))) for _ in range(count // 2)]
    ranges = [(32, 127), (160, 0x2FF), (0x300, 0x370), (0x370, 0x2FFF), (0x3000, 0x9FFF), (0x1F300, 0x1F700), (0, 32)]
    return pieces + ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(12)) for _ in range(count // 2)]


def write_vocab(folder: Path, vocab=VOCAB, **files: object) -> Path:
    """vocab.txt and, as JSON, the other files by the name before their suffix."""
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def added(content: str, **flags: bool) -> dict[str, object]:
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
    return {"content": content, "normalized": True} | off | flags
