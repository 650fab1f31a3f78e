"""Special tokens that stand in texts, as `[SEP]` or `</s>`: read as the characters that they are, or as the tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from data.errors import DataError


def find_special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return {token: id} of the tokens that the files mark as special and of those that are added to every text."""
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added = tokenizer.encode("", "").ids
    return special | {str(tokenizer.id_to_token(i)): i for i in added}


def special_token_finder(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Return a function that returns the first special token in a text; "" for a text without one."""
    special = find_special_tokens(tokenizer)
    firsts = {token[0] for token in special}
    # The longest token first, where one begins another.
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) if special else "(?!)")

    def find(text: str) -> str:
        # Almost no text has the first character of a special token, and a search for one character is fast.
        if not any(first in text for first in firsts):
            return ""
        match = pattern.search(text)
        return match.group() if match else ""

    return find


def make_special_tokens_splittable(tokenizer: Tokenizer) -> None:
    """Change the tokenizer so that with `encode_special_tokens` a special token in a text becomes other tokens.

    The library then no longer looks for special tokens in a text. But the vocabulary has them too, and unigrams (T5), a
    WordLevel or a BPE with ignore_merges still find the whole word there. So such a word is split after its first
    character. Texts without special tokens, and tokenizers without the flag, are encoded as before.
    """
    special = {token: i for token, i in find_special_tokens(tokenizer).items() if len(token) > 1}
    was_split, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    texts = [(token, i, text) for token, i in special.items() for text in (token, f"a {token} a", f"a{token}a")]
    encodings = tokenizer.encode_batch([text for _, _, text in texts], add_special_tokens=False)
    tokenizer.encode_special_tokens = was_split
    found = {token for (token, i, _), encoding in zip(texts, encodings, strict=True) if i in encoding.ids}
    if not found:
        return
    splits = "|".join(f"{_escape(token[0])}(?={_escape(token[1:])})" for token in sorted(found))
    split = pre_tokenizers.Split(Regex(splits), "isolated")
    first = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = split if first is None else pre_tokenizers.Sequence([first, split])


def _escape(text: str) -> str:
    """Return text as a pattern of Oniguruma, the library of `Regex`."""
    return "".join(character if character.isalnum() or character == "_" else f"\\{character}" for character in text)


def require_tokens(
    path: Path, vocab: dict[str, int], special: dict[str, AddedToken], *roles: str
) -> list[tuple[str, int]]:
    """Return (token, id) of the roles that every text needs; DataError where the vocabulary lacks a token."""
    for role in roles:
        if special[role].content not in vocab:
            raise DataError(f"{path}: no token {special[role].content!r}, which every text needs")
    return [(special[role].content, vocab[special[role].content]) for role in roles]
