"""The space before each word of a text that others have split into words, as byte-level tokenizers need it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer


def add_spaces(words: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Return the words with a space before each one that has none, as from transformers with add_prefix_space.

    An added token in a word, as RoBERTa's </s> where it is not split, gets no space; what stands before and after it
    gets one.
    """
    pattern = _added_tokens(tokenizer, tokenizer.encode_special_tokens)
    if pattern is None:
        return [_add_space(word) for word in words]
    return ["".join(p if i % 2 else _add_space(p) for i, p in enumerate(pattern.split(word))) for word in words]


def _add_space(text: str) -> str:
    return text if not text or text[0] == " " else " " + text


@lru_cache(maxsize=4)
def _added_tokens(tokenizer: Tokenizer, splits_special: bool) -> re.Pattern[str] | None:
    """Return a pattern, one group, of the added tokens that the tokenizer finds in texts; None without any."""
    added = tokenizer.get_added_tokens_decoder().values()
    found = [token.content for token in added if not (token.special and splits_special)]
    longest_first = sorted(found, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if found else None
