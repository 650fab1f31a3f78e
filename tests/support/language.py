"""Texts and conversations, and a tokenizer of bytes, for tests of language models."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from data import Row, TextExamples
from data.dialogue import Turn, encode_dialogues

END = "<|endoftext|>"
TEXTS = ["a very short one", "床前明月光，疑是地上霜。", "x", "smile 😀 é\u0301", "w " * 40, "  spaces  "]


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token for each byte, in GPT-2's alphabet, and for two merges; the end of text is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END, *alphabet, "sh", "ver"])}
    tokenizer = Tokenizer(BPE(vocabulary | {"ve": 259}, [("s", "h"), ("v", "e"), ("ve", "r")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def rows_of(texts: list[str]) -> list[Row]:
    return [Row(str(i), i, {"text": text}) for i, text in enumerate(texts, 1)]


def conversation(*contents: str, first: str = "user") -> list[Turn]:
    """Turns of the user and the assistant, or, where the system is first, after one of the system's."""
    roles = ["system"] if first == "system" else []
    roles += ["assistant", "user"] * len(contents) if first == "assistant" else ["user", "assistant"] * len(contents)
    return [Turn(role, content) for role, content in zip(roles, contents, strict=False)]


def encoded(
    tokenizer: Tokenizer, *talks: list[Turn], max_length: int = 24, labelled: bool = True, max_new_tokens: int = 0
) -> TextExamples:
    rows = [Row(str(i), i, {"messages": turns}) for i, turns in enumerate(talks, 1)]
    more = {"labelled": labelled, "max_new_tokens": max_new_tokens}
    return encode_dialogues(rows, tokenizer, max_length=max_length, **more)
