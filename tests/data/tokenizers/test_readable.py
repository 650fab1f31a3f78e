"""Tokens as the dry run shows them."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.tokenizers.readable import show_tokens


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("质量 好", "质 量 Ġ 好"),
        ("a é\n👍", "a Ġ é Ċ 👍"),
        ("ok", "o k"),
        ("a\u202eb", "a \\u202e b"),  # it would turn the direction of the line
    ],
)
def test_bytes_are_shown_as_their_characters(text, shown):
    assert show_tokens(byte_level().encode(text).tokens) == shown


def test_any_text_of_bytes_can_be_read_again():
    rng, tokenizer = random.Random(0), byte_level()
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(33, 127), rng.randrange(0x4E00, 0x9FFF)])) for _ in range(8))
        tokens = tokenizer.encode(text).tokens
        whole = [tokens.pop(0) + tokens.pop(0), *tokens]  # merges end within characters too
        assert show_tokens(whole).replace(" ", "") == text


@pytest.mark.parametrize(
    "tokens",
    [
        ["[CLS]", "这", "##次"],
        ["▁Caf", "é", "▁Ünal", "Ã"],
        ["Ġthe", "Ġcat", "<|endoftext|>"],
        ["ä", "x", "ä", "¹"],
        [None],
    ],
)
def test_other_tokens_are_shown_as_they_are(tokens):
    assert show_tokens(tokens) == " ".join(map(str, tokens))
