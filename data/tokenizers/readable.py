"""Tokens as a person reads them: the bytes of byte-level tokenizers as characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

# As in GPT-2: a visible byte is the character of that number, and the others are those from 256 on.
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
_SPELLING = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTES = {character: byte for byte, character in _SPELLING.items()}


def spell(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """Return the tokens of ids as a person reads them, with spaces between them."""
    return show_tokens([tokenizer.id_to_token(k) for k in ids])


def show_tokens(tokens: Sequence[str | None]) -> str:
    """Return tokens with spaces between them.

    A byte-level tokenizer writes each byte of UTF-8 as a character of its own, so a Chinese character reads as three
    Latin ones. Such tokens are written as their text, and those that share a character as one. ASCII stays as it is,
    with the marks of the tokenizer. Tokens that are no bytes of UTF-8 stay too.
    """
    shown, waiting = list[str](), list[str]()
    for token in tokens:
        waiting.append(str(token))
        text = _read("".join(waiting))
        if text is None:
            shown += waiting
        elif text:
            shown.append(text)
        if text != "":
            waiting = []
    return " ".join([*shown, *waiting])


def _read(piece: str) -> str | None:
    """Return the text of a byte-level piece: "" while its last character lacks bytes, None if it is not UTF-8."""
    try:
        text = bytes(_BYTES[character] for character in piece).decode()
    except KeyError:
        return None
    except UnicodeDecodeError as error:
        return "" if error.reason == "unexpected end of data" else None
    return "".join(_SPELLING[ord(c)] if ord(c) < 128 else c if c.isprintable() else repr(c)[1:-1] for c in text)
